"""The search of a study: of the points that every variant tries, the best on validation data is
what goes on.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from kdkit.errors import RunError
from kdkit.runs.folder import Result
from kdkit.study.findings import Search, Tuned
from kdkit.study.variants import Point, Study, point_name

# by the name of a point of a variant, one a seed; None: it could not be trained
Results = Mapping[str, Sequence[Result | None]]


def choose(study: Study, results: Results) -> dict[str, Point]:
    """For each variant the point with the highest mean top-1 on validation after the last epoch,
    the first of equal ones.

    Raises:
        RunError: of some variant no point could be trained with every seed.
    """
    found = {}
    for name, points in study.points.items():
        scores = validation(name, points, results)
        if not scores:
            raise RunError(
                f"{name}: no point of its search could be trained with every seed, so that nothing"
                " can be chosen"
            )
        best = max(scores, key=scores.__getitem__)
        found[name] = next(point for point in points if point.label == best)
    return found


def validation(variant: str, points: Sequence[Point], results: Results) -> dict[str, float]:
    """Mean top-1 on validation of each point that was trained with every seed, by what the point
    is called.
    """
    found: dict[str, float] = {}
    for point in points:
        scores = [
            result.validation["top1"]
            for result in results[point_name(variant, point)]
            if result and result.validation
        ]
        if len(scores) == len(results[point_name(variant, point)]):
            found[point.label] = statistics.fmean(scores)
    return found


def told(study: Study, chosen: Mapping[str, Point], results: Results) -> dict[str, Tuned]:
    """What was chosen for each variant, and what it took."""
    return {
        name: Tuned(
            chosen[name].label,
            chosen[name].values,
            tuple(
                key
                for key, values in study.tune.items()
                if at_edge(chosen[name].values[key], values)
            ),
            validation(name, points, results),
            sum(
                result.cpu_seconds
                for point in points
                for result in results[point_name(name, point)]
                if result
            ),
        )
        for name, points in study.points.items()
    }


def at_edge(value: object, values: Sequence[object]) -> bool:
    """Whether it is the smallest or the largest of several numbers."""
    numbers = [one for one in values if isinstance(one, int | float) and not isinstance(one, bool)]
    return len(numbers) == len(values) > 1 and value in (min(numbers), max(numbers))


def summary(study: Study, tuned: Mapping[str, Tuned], seeds: Sequence[int]) -> Search:
    """The whole search."""
    runs = sum(map(len, study.points.values())) * len(seeds)
    keys = {key: tuple(values) for key, values in study.tune.items()}
    return Search(keys, tuple(seeds), runs, sum(one.cpu_seconds for one in tuned.values()))
