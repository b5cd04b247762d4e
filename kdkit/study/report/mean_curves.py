"""Learning curves of a variant: the runs of several seeds as one mean with a deviation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdkit.runs.folder import RunFolder
from kdkit.students import curves
from kdkit.students.curves import Curve, Curves


@dataclass(frozen=True)
class Course:
    """A quantity over the epochs of all stages: its mean over the seeds and its standard
    deviation (empty for one seed).
    """

    x: tuple[float, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


@dataclass(frozen=True)
class Courses:
    """The curves of a variant's training.

    Attributes:
        scores: on the test data, by name.
        losses: "loss" (the total) and each term with its weight.
        stages: the beginning and the name of each stage.
        epochs: number over all stages.
        seeds: number of runs in the means.
    """

    scores: Mapping[str, Course] = field(default_factory=dict)
    losses: Mapping[str, Course] = field(default_factory=dict)
    stages: Sequence[tuple[float, str]] = ()
    epochs: int = 0
    seeds: int = 0


def read(folders: Sequence[Path]) -> Courses:
    """Read the curves of one variant, from those of its runs that exist and have logged
    something.
    """
    # A run without a logged epoch would leave no epoch that all seeds have.
    found = [one for one in (curves.read(RunFolder(folder)) for folder in folders) if one.epochs]
    if not found:
        return Courses()
    return Courses(
        scores=_means([one.scores.get("test", {}) for one in found]),
        losses=_means([one.losses for one in found]),
        # Runs may end early, by `train.patience` or a failure.
        stages=_longest(found).stages,
        epochs=_longest(found).epochs,
        seeds=len(found),
    )


def _longest(found: Sequence[Curves]) -> Curves:
    return max(found, key=lambda one: one.epochs)


def _means(found: Sequence[Mapping[str, Curve]]) -> dict[str, Course]:
    names = dict.fromkeys(name for one in found for name in one)
    means = {name: _mean([one[name] for one in found if name in one]) for name in names}
    return {name: course for name, course in means.items() if course is not None}


def _mean(found: Sequence[Curve]) -> Course | None:
    """Average over the epochs that every seed has."""
    values = [dict(zip(curve.x, curve.y, strict=True)) for curve in found]
    shared = sorted(set.intersection(*(set(one) for one in values))) if values else []
    if not shared:
        return None
    # A mean over other seeds at each epoch would jump where a run ends.
    columns = [[one[x] for one in values] for x in shared]
    deviation = tuple(statistics.stdev(column) for column in columns) if len(values) > 1 else ()
    return Course(tuple(shared), tuple(statistics.fmean(column) for column in columns), deviation)
