"""The findings of a study: the runs of each variant over the seeds, their statistics and their
costs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, TypeAdapter

from kdkit import files
from kdkit.contracts.task import ScoreInfo
from kdkit.errors import RunError
from kdkit.finite import Number
from kdkit.students.curves import deciding

AGAIN = "`kdkit compare` with the same study writes it again"

SIGNIFICANT = 0.05  # threshold of corrected p-values for the verdicts "better" and "worse"
# training quantities that are reported like scores
LOSSES = {
    name: ScoreInfo(name=name, title=title, digits=3, higher_is_better=False)
    for name, title in (
        ("loss", "training loss"),
        ("late_loss", "training loss, last 60 % of epochs"),
    )
}


def rank(score: ScoreInfo, values: Sequence[float]) -> float:
    """Return the mean of a score over the seeds, with the sign that makes larger better; NaN is the
    worst.
    """
    found = score.rank(statistics.fmean(values))
    # `max` and `sorted` depend on the order of their items if one of them is NaN.
    return -math.inf if math.isnan(found) else found


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: Number
    high: Number


@dataclass(frozen=True)
class Difference:
    """The paired difference of a variant to the baseline, in the unit of the deciding score.

    Attributes:
        values: one for each seed that both have.
        t: interval of the mean by the paired t distribution (None: fewer than two seeds).
        bootstrap: interval of the mean by resampling the seeds (None: as for `t`).
        p: two-sided, by the paired t distribution (None: as for `t`).
        p_holm: the same, corrected by Holm's method for the number of variants that the study
            compares.
    """

    values: tuple[Number, ...]
    t: Interval | None
    bootstrap: Interval | None
    p: float | None = None
    p_holm: float | None = None

    def verdict(self, score: ScoreInfo) -> Literal["better", "worse", "inconclusive"]:
        """Return the verdict that the corrected p-value supports at 5 %; the difference is in that
        score.
        """
        # The verdict follows the corrected p-value, not the interval, which knows nothing of the
        # other variants.
        if self.p_holm is None or self.p_holm >= SIGNIFICANT:
            return "inconclusive"
        return "better" if score.rank(sum(self.values)) > 0 else "worse"


@dataclass(frozen=True)
class Length:
    """The length of a run's training, all its stages together.

    Attributes:
        samples: training images (or texts) that the run has.
        epochs: over these samples.
        steps: of the optimizer.
        images: number of images that these steps show, repetitions included.
    """

    samples: int
    epochs: int
    steps: int
    images: int

    def longer_than(self, other: Length) -> bool:
        """Check whether it takes more steps, or shows more images."""
        # Either is more training: larger batches show more images with as many steps.
        return self.steps > other.steps or self.images > other.images


@dataclass(frozen=True)
class Tuned:
    """The choice of a search on validation data for one variant.

    Attributes:
        point: name of the chosen point, such as `lr 0.1, epochs 75`.
        values: of the chosen point, by key.
        edges: keys with numbers of which the chosen one is the smallest or the largest: the best
            value may lie beyond.
        validation: deciding score on validation after the last epoch of each point that could be
            trained, mean over the search's seeds.
        cpu_seconds: of the processor, of all runs of the search of this variant.
    """

    point: str
    values: Mapping[str, Any]
    edges: tuple[str, ...]
    validation: Mapping[str, Number]
    cpu_seconds: float


@dataclass(frozen=True)
class Search:
    """The search that all variants of a study went through.

    Attributes:
        keys: the values that were tried, by key; all combinations.
        seeds: of its runs, none of which is a seed of the study itself.
        runs: number of runs, of all variants together.
        cpu_seconds: of the processor, for all of them.
    """

    keys: Mapping[str, tuple[Any, ...]]
    seeds: tuple[int, ...]
    runs: int
    cpu_seconds: float


@dataclass(frozen=True)
class Cost:
    """The costs of a variant. Training figures are means over its seeds.

    Attributes:
        seconds: of training, as the run would need if trained alone, measurements included.
        cpu_seconds: CPU time of training, in the same sense.
        memory: peak bytes that a training step of that run alone allocates, beyond those allocated
            before it, gradients included.
        images_per_second: trained on.
        parameters, macs, bytes: of the network that is exported.
        latency: seconds of one image on one thread, median.
    """

    seconds: float
    cpu_seconds: float
    memory: int
    images_per_second: float
    parameters: int
    macs: int
    bytes: int
    latency: float


@dataclass(frozen=True)
class Variant:
    """One recipe over the seeds.

    Attributes:
        name: unique in the study.
        about: description in one line: its objective and schedule.
        seeds: of the finished runs.
        folders: of the finished runs, one a seed.
        last: test scores of the run's resulting student, by name, one value a seed; `loss`: the
            training loss of the last epoch; `late_loss`: its mean over the last 60 % of the (last
            stage's) epochs.
        best: test scores of the epoch that is best on validation, in the same form; empty without a
            validation split.
        difference: to the baseline (None: it is the baseline, or they share no seed).
        cost: None if no run is finished.
        failures: reasons by seed.
        averaged: number of epochs, the best on validation, whose weights are averaged; 0: the
            weights are the last epoch's.
        validation: validation scores of the run's resulting student, in the same form; empty
            without a validation split.
        length: length of one run's training; None if no run is finished.
        tuned: the choice of a search for it; None without a search.
    """

    name: str
    about: str
    seeds: tuple[int, ...]
    folders: tuple[Path, ...]
    last: Mapping[str, tuple[Number, ...]]
    best: Mapping[str, tuple[Number, ...]]
    difference: Difference | None
    cost: Cost | None
    failures: Mapping[int, str] = field(default_factory=dict)
    averaged: int = 0
    validation: Mapping[str, tuple[Number, ...]] = field(default_factory=dict)
    length: Length | None = None
    tuned: Tuned | None = None


@dataclass(frozen=True)
class Teacher:
    """The teacher that all variants with a teacher share.

    Attributes:
        name: of its network, or its run.
        last: its scores on the test data.
        parameters, macs, bytes, latency: see `Cost`.
        lengths: training length of each teacher that another recipe trains; unknown for weights
            from elsewhere.
    """

    name: str
    last: Mapping[str, Number]
    parameters: int
    macs: int
    bytes: int
    latency: float
    lengths: tuple[Length, ...] = ()


@dataclass(frozen=True)
class Findings:
    """A whole study, in the form of `study.json`.

    Attributes:
        name, question: of the study.
        baseline: the variant that the others are compared with.
        command: the command that repeats it.
        variants: in the study's order.
        teacher: None if no variant has one, or they have different ones.
        together: total wall and CPU seconds of this study's training (`wall`, `cpu`), and the
            number of runs that it trained (`trained`) or reused (`reused`).
        versions: of Python and of packages; `machine`: processor and accelerator.
        search: the search before the training; None without one.
        scores: descriptions of the scores, in order; the first one decides. If they are not
            recorded, as by an older kdkit, the names found in the variants.
        agreement: descriptions of the scores of agreement with the teacher. If they are not
            recorded, the names that the teacher lacks.
    """

    name: str
    question: str
    baseline: str
    command: str
    variants: tuple[Variant, ...]
    teacher: Teacher | None
    together: Mapping[str, float]
    versions: Mapping[str, str]
    machine: Mapping[str, str]
    search: Search | None = None
    scores: tuple[ScoreInfo, ...] = ()
    agreement: tuple[ScoreInfo, ...] = ()

    # JSON has no NaN: a score that is not finite is null in the file.
    __pydantic_config__ = ConfigDict(ser_json_inf_nan="null")

    def __post_init__(self) -> None:
        if self.scores:
            return
        names = dict.fromkeys(name for variant in self.variants for name in variant.last)
        found = [ScoreInfo(name=name, title=name) for name in names if name not in LOSSES]
        # An older kdkit has not recorded which scores compare with a teacher: the teacher has all
        # others.
        known = self.teacher.last if self.teacher and self.teacher.last else names
        # the dataclass is frozen
        object.__setattr__(self, "scores", tuple(one for one in found if one.name in known))
        object.__setattr__(self, "agreement", tuple(one for one in found if one.name not in known))

    @property
    def deciding(self) -> ScoreInfo:
        """The score that is used to compare variants."""
        return deciding(self.scores)

    @property
    def ran(self) -> list[Variant]:
        """The variants with a finished run."""
        # A variant whose runs all failed has no scores.
        return [one for one in self.variants if one.last.get(self.deciding.name)]

    @property
    def moment(self) -> str:
        """The moment at which the measured weights of the students were taken, in words."""
        # Variants may differ in it, if a study allows that: the words name those that do.
        averaged = [variant for variant in self.variants if variant.averaged]
        if not averaged:
            return "after the last epoch"
        counts = " or ".join(map(str, sorted({variant.averaged for variant in averaged})))
        mean = f"with the mean of the weights of the {counts} epochs that are best on validation"
        if len(averaged) == len(self.variants):
            return mean
        return (
            f"after the last epoch, but for {', '.join(variant.name for variant in averaged)}:"
            f" {mean}"
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `study.json`.

        Raises:
            RunError: it is not there, or is no such file.
        """
        found = files.read_json(path, cls, AGAIN)
        # Any JSON with the right keys would pass, and a report of no variants fails later.
        if not found.variants:
            raise RunError(f"{path}: not the findings of a study: it has no variants; {AGAIN}")
        return found

    def save(self, path: Path) -> None:
        """Write a `study.json`."""
        files.write_json(path, TypeAdapter(Findings).dump_python(self, mode="json"))
