"""Uncertainty of results over several seeds: deviations, and confidence intervals of paired
differences.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from kdkit.study.findings import Difference, Findings, Interval, Variant

# Of the intervals; verdicts go by `findings.SIGNIFICANT`.
LEVEL = 0.95
# SciPy's default
RESAMPLES = 9999


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Format `93.41 +- 0.80`: mean and standard deviation (n - 1) over the seeds; without a
    deviation for a single value. Nothing where all are NaN: there was nothing to measure.
    """
    if all(map(math.isnan, values)):
        return ""
    # `statistics.stdev` raises for values that are not finite.
    several = len(values) > 1 and all(map(math.isfinite, values))
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if several else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def paired(
    own: Mapping[int, float], baseline: Mapping[int, float], *, bootstrap: bool = True
) -> Difference | None:
    """Return the difference of two results by seed, over the seeds that both have; None if there is
    none. The interval by `bootstrap` takes most of the time.
    """
    values = tuple(own[seed] - baseline[seed] for seed in own if seed in baseline)
    if not values:
        return None
    # SciPy's functions give NaN, with a warning, for values that are not finite.
    enough = len(values) > 1 and all(map(math.isfinite, values))
    return Difference(
        values,
        t_interval(values) if enough else None,
        bootstrap_interval(values) if enough and bootstrap else None,
    )


def t_interval(values: Sequence[float]) -> Interval:
    """Compute the 95 % interval of the mean of two or more values, by Student's t: mean -+ t(n - 1)
    s / sqrt(n).
    """
    # SciPy is slow to import, and most commands do without it.
    from scipy import stats

    mean = statistics.mean(values)
    half = (
        float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
        * statistics.stdev(values)
        / math.sqrt(len(values))
    )
    return Interval(mean - half, mean + half)


def p_value(values: Sequence[float]) -> float:
    """Compute the p-value of two or more values, by Student's t: the probability of a mean at least
    as far from 0 if the true mean is 0.
    """
    from scipy import stats

    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    # Equal differences: t is infinite, or undefined if all are 0.
    if error == 0:
        return 0.0 if mean else 1.0
    return float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))


def holm(values: Sequence[float]) -> list[float]:
    """Apply Holm's correction to m p-values: the i-th smallest (i from 0) times m - i, none below
    the one before it, none above 1.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of
    Statistics 1979.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    # Made monotonic by the running maximum: a larger p-value never gets a smaller correction.
    times = (min(1.0, (len(values) - i) * values[place]) for i, place in enumerate(order))
    corrected = dict(zip(order, itertools.accumulate(times, max), strict=True))
    return [corrected[place] for place in range(len(values))]


def corrected(variants: Iterable[Variant]) -> tuple[Variant, ...]:
    """Return the variants of one study, each difference with its p-value and the p-value corrected
    for the number of variants.
    """
    known = list(variants)
    differences = {i: v.difference for i, v in enumerate(known) if v.difference and v.difference.t}
    ps = {i: p_value(one.values) for i, one in differences.items()}
    for (i, p), p_holm in zip(ps.items(), holm(list(ps.values())), strict=True):
        known[i] = replace(known[i], difference=replace(differences[i], p=p, p_holm=p_holm))
    return tuple(known)


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """Compute the 95 % interval of the mean from percentiles of resampled means; the resamples are
    always the same.
    """
    import numpy as np
    from scipy import stats

    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        # SciPy's default, BCa, has no interval for equal differences, and few seeds are usual here.
        method="percentile",
        # The same resamples each time, so that a report written again has the same interval.
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def shown(difference: Difference, digits: int = 2) -> str:
    """Format `+1.72 [0.91, 2.53]`: the mean difference with its interval by t; a single seed has no
    interval.
    """
    mean, interval = f"{statistics.mean(difference.values):+.{digits}f}", difference.t
    return f"{mean} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]" if interval else mean


def p_value_shown(difference: Difference | None) -> str:
    """Format the corrected p-value, as in `0.013` or `< 0.001`; empty if there is none."""
    if difference is None or difference.p_holm is None:
        return ""
    return f"{difference.p_holm:.3f}" if difference.p_holm >= 0.001 else "< 0.001"


def gained(
    found: Findings, variant: Variant, *, best: bool = False, bootstrap: bool = True
) -> Difference | None:
    """Return a variant's difference to the baseline: of the resulting students, or with each
    measured at the epoch that is best on validation; None for the baseline.
    """

    def by_seed(one: Variant) -> dict[int, float]:
        values = (one.best if best else one.last).get(found.deciding.name, ())
        # Not strict: a score that some runs lack has no values.
        return dict(zip(one.seeds, values, strict=False))

    baseline = next((other for other in found.variants if other.name == found.baseline), variant)
    if variant is baseline:
        return None
    return paired(by_seed(variant), by_seed(baseline), bootstrap=bootstrap)


def with_differences(found: Findings, *, bootstrap: bool = True) -> Findings:
    """Return the findings with each variant's difference to the baseline."""
    compared = (
        replace(one, difference=gained(found, one, bootstrap=bootstrap)) for one in found.variants
    )
    return replace(found, variants=corrected(compared))
