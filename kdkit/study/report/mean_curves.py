"""How the runs of a variant went: curves of several seeds as one mean with a deviation."""

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
    """What is known of a variant's training.

    Attributes:
        top1: test accuracy in percent.
        losses: "loss" (the total) and each term as it counts in the total.
        to_teacher: `agreement`, `logit_difference`, `kl_to_teacher` on the test data, as far as
            they were measured.
        stages: where each begins, and its name.
        epochs: of all stages.
        seeds: how many runs these are means of.
    """

    top1: Course | None = None
    losses: Mapping[str, Course] = field(default_factory=dict)
    to_teacher: Mapping[str, Course] = field(default_factory=dict)
    stages: Sequence[tuple[float, str]] = ()
    epochs: int = 0
    seeds: int = 0


def read(folders: Sequence[Path]) -> Courses:
    """The courses of one variant, of those of its runs that are there and have logged something."""
    found = [one for one in (curves.read(RunFolder(folder)) for folder in folders) if one.epochs]
    if not found:
        return Courses()
    return Courses(
        top1=_mean([one.top1["test"] for one in found if "test" in one.top1]),
        losses=_means([one.losses for one in found]),
        to_teacher=_means([one.to_teacher for one in found]),
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
    """Over the epochs that every seed has."""
    values = [dict(zip(curve.x, curve.y, strict=True)) for curve in found]
    shared = sorted(set.intersection(*(set(one) for one in values))) if values else []
    if not shared:
        return None
    columns = [[one[x] for one in values] for x in shared]
    deviation = tuple(statistics.stdev(column) for column in columns) if len(values) > 1 else ()
    return Course(tuple(shared), tuple(statistics.fmean(column) for column in columns), deviation)
