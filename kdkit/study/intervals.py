"""How sure a result over several seeds is: deviations, and confidence intervals of paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from kdkit.study.findings import Difference, Findings, Interval, Variant

LEVEL = 0.95
RESAMPLES = 9999


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`93.41 +- 0.80`: mean and standard deviation (n - 1) over the seeds; one value has no deviation."""
    if not values:
        return ""
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def paired(own: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """The difference of two results by seed, over the seeds that both have; None where there is none."""
    values = tuple(own[seed] - baseline[seed] for seed in own if seed in baseline)
    if not values:
        return None
    enough = len(values) > 1 and all(map(math.isfinite, values))
    return Difference(values, t_interval(values) if enough else None, bootstrap_interval(values) if enough else None)


def t_interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of two or more values, by Student's t: mean -+ t(n - 1) s / sqrt(n)."""
    from scipy import stats

    mean = statistics.mean(values)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean - half, mean + half)


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean by percentiles of resampled means; always of the same resamples."""
    import numpy as np
    from scipy import stats

    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def shown(difference: Difference) -> str:
    """`+1.72 [0.91, 2.53]`: the mean difference with its interval by t; one seed has no interval."""
    mean = f"{statistics.mean(difference.values):+.2f}"
    return f"{mean} [{difference.t.low:.2f}, {difference.t.high:.2f}]" if difference.t else mean


def at_best(found: Findings, variant: Variant) -> Difference | None:
    """A variant's difference to the baseline where each run is measured at the epoch that is best on validation."""
    baseline = next((other for other in found.variants if other.name == found.baseline), variant)
    own, known = (dict(zip(one.seeds, one.best.get("top1", ()), strict=False)) for one in (variant, baseline))
    return paired(own, known) if variant is not baseline else None
