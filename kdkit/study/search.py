"""The search of a study: every variant tries all points, and continues with the one that is best on
validation data.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdkit.contracts.task import ScoreInfo
from kdkit.errors import RunError
from kdkit.runs.result import Result
from kdkit.students.curves import deciding
from kdkit.study.findings import Search, Tuned, rank
from kdkit.study.trainings import StudyRun, judges, scores_of
from kdkit.study.variants import Point, Study, point_name

# by the name of a variant's point, one a seed; None: it could not be trained
Results = Mapping[str, Sequence[Result | None]]


@dataclass(frozen=True)
class Searched:
    """The choice of a search for each variant, and the search as a whole."""

    tuned: Mapping[str, Tuned]
    whole: Search


def after_search(study: Study, planned: Sequence[StudyRun]) -> tuple[Study, Searched]:
    """Replace each variant by its chosen point, and describe the choice; `planned` are the
    trainings of its search.

    Raises:
        RunError: no point of some variant could be trained.
    """
    results: dict[str, list[Result | None]] = {}
    for each in planned:
        results.setdefault(each.variant, []).append(each.result)
    score = deciding(scores_of(judges(planned))[0])
    points = choose(study, results, score)
    tuned = tuned_by(study, points, results, score)
    return study.chosen(points), Searched(tuned, summary(study, tuned, study.search.seeds))


def choose(study: Study, results: Results, score: ScoreInfo) -> dict[str, Point]:
    """Choose for each variant the point with the best mean score on validation after the last
    epoch; the first of equal ones.

    Raises:
        RunError: no point of some variant could be trained with every seed.
    """
    chosen = {}
    for name, points in study.points.items():
        scores = validation(name, points, results, score)
        if not scores:
            raise RunError(
                f"{name}: no point of its search could be trained with every seed, so that nothing"
                " can be chosen"
            )
        best = max(scores, key=lambda label: rank(score, [scores[label]]))
        chosen[name] = next(point for point in points if point.label == best)
    return chosen


def validation(
    variant: str, points: Sequence[Point], results: Results, score: ScoreInfo
) -> dict[str, float]:
    """Compute the mean score on validation of each point that was trained with every seed, by the
    point's label.
    """
    means: dict[str, float] = {}
    for point in points:
        values = [
            result.validation[score.name]
            for result in results[point_name(variant, point)]
            if result and result.validation
        ]
        if len(values) == len(results[point_name(variant, point)]):
            means[point.label] = statistics.fmean(values)
    return means


def tuned_by(
    study: Study, chosen: Mapping[str, Point], results: Results, score: ScoreInfo
) -> dict[str, Tuned]:
    """Describe the choice for each variant, and its cost."""
    return {
        name: Tuned(
            chosen[name].label,
            chosen[name].values,
            tuple(
                key
                for key, values in study.tune.items()
                if at_edge(chosen[name].values[key], values)
            ),
            validation(name, points, results, score),
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
    """Check whether a value is the smallest or the largest of several numbers."""
    numbers = [
        number
        for number in values
        if isinstance(number, int | float) and not isinstance(number, bool)
    ]
    return len(numbers) == len(values) > 1 and value in (min(numbers), max(numbers))


def summary(study: Study, tuned: Mapping[str, Tuned], seeds: Sequence[int]) -> Search:
    """Describe the search as a whole."""
    runs = sum(map(len, study.points.values())) * len(seeds)
    keys = {key: tuple(values) for key, values in study.tune.items()}
    return Search(keys, tuple(seeds), runs, sum(choice.cpu_seconds for choice in tuned.values()))
