"""How sure a result over several seeds is: deviations, and confidence intervals of paired
differences.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from kdkit.study.findings import Difference, Findings, Interval, Variant

LEVEL = 0.95
RESAMPLES = 9999


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`93.41 +- 0.80`: mean and standard deviation (n - 1) over the seeds; one value has no
    deviation.
    """
    if not values:
        return ""
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def paired(own: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """The difference of two results by seed, over the seeds that both have; None where there is
    none.
    """
    values = tuple(own[seed] - baseline[seed] for seed in own if seed in baseline)
    if not values:
        return None
    enough = len(values) > 1 and all(map(math.isfinite, values))
    return Difference(
        values,
        t_interval(values) if enough else None,
        bootstrap_interval(values) if enough else None,
    )


def t_interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of two or more values, by Student's t: mean -+ t(n - 1) s /
    sqrt(n).
    """
    from scipy import stats

    mean = statistics.mean(values)
    half = (
        float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
        * statistics.stdev(values)
        / math.sqrt(len(values))
    )
    return Interval(mean - half, mean + half)


def p_value(values: Sequence[float]) -> float:
    """Of two or more values, by Student's t: how probable a mean at least so far from 0 is where
    the true one is 0.
    """
    from scipy import stats

    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    if error == 0:
        return 0.0 if mean else 1.0
    return float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's correction of m p-values: the i-th smallest (i from 0) times m - i, none below the
    one before it, none above 1.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of
    Statistics 1979.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    times = (min(1.0, (len(values) - i) * values[place]) for i, place in enumerate(order))
    corrected = dict(zip(order, itertools.accumulate(times, max), strict=True))
    return [corrected[place] for place in range(len(values))]


def corrected(variants: Iterable[Variant]) -> tuple[Variant, ...]:
    """The variants of one study, each difference with its p-value, also as corrected for their
    number.
    """
    known = list(variants)
    differences = {i: v.difference for i, v in enumerate(known) if v.difference and v.difference.t}
    ps = {i: p_value(one.values) for i, one in differences.items()}
    for (i, p), p_holm in zip(ps.items(), holm(list(ps.values())), strict=True):
        known[i] = replace(known[i], difference=replace(differences[i], p=p, p_holm=p_holm))
    return tuple(known)


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean by percentiles of resampled means; always of the same resamples."""
    import numpy as np
    from scipy import stats

    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def shown(difference: Difference) -> str:
    """`+1.72 [0.91, 2.53]`: the mean difference with its interval by t; one seed has no
    interval.
    """
    mean = f"{statistics.mean(difference.values):+.2f}"
    return f"{mean} [{difference.t.low:.2f}, {difference.t.high:.2f}]" if difference.t else mean


def p_value_shown(difference: Difference | None) -> str:
    """The corrected p-value, `0.013` or `< 0.001`; nothing where there is none."""
    if difference is None or difference.p_holm is None:
        return ""
    return f"{difference.p_holm:.3f}" if difference.p_holm >= 0.001 else "< 0.001"


def at_best(found: Findings, variant: Variant) -> Difference | None:
    """A variant's difference to the baseline where each run is measured at the epoch that is
    best on validation.
    """
    baseline = next((other for other in found.variants if other.name == found.baseline), variant)
    own, known = (
        dict(zip(one.seeds, one.best.get("top1", ()), strict=False)) for one in (variant, baseline)
    )
    return paired(own, known) if variant is not baseline else None
