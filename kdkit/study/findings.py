"""What a study has found: the runs of each variant over the seeds, their statistics and their
costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, TypeAdapter

from kdkit import files
from kdkit.errors import RunError
from kdkit.finite import Number

AGAIN = "`kdkit compare` with the same study writes it again"

SIGNIFICANT = 0.05  # p-values below it, corrected, allow to call a variant better or worse


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: Number
    high: Number


@dataclass(frozen=True)
class Difference:
    """Of a variant to the baseline, seed by seed, in points of top-1 (percent).

    Attributes:
        values: one for each seed that both have.
        t: interval of the mean by the paired t distribution (None: fewer than two seeds).
        bootstrap: interval of the mean by resampling the seeds (None likewise).
        p: two-sided, by the paired t distribution (None likewise).
        p_holm: the same, corrected by Holm's method for the number of variants that the study
            compares.
    """

    values: tuple[Number, ...]
    t: Interval | None
    bootstrap: Interval | None
    p: float | None = None
    p_holm: float | None = None

    @property
    def verdict(self) -> Literal["better", "worse", "inconclusive"]:
        """What the corrected p-value allows to say at 5 %."""
        if self.p_holm is None or self.p_holm >= SIGNIFICANT:
            return "inconclusive"
        return "better" if sum(self.values) > 0 else "worse"


@dataclass(frozen=True)
class Length:
    """How long a run trains, all its stages together.

    Attributes:
        samples: training images (or texts) that it has.
        epochs: over these.
        steps: of the optimizer.
        images: how many images these steps show, each as often as it comes.
    """

    samples: int
    epochs: int
    steps: int
    images: int

    def longer_than(self, other: Length) -> bool:
        """Whether it takes more steps, or shows more images."""
        return self.steps > other.steps or self.images > other.images


@dataclass(frozen=True)
class Tuned:
    """What a search on validation data has chosen for a variant.

    Attributes:
        point: what the chosen point is called, such as `lr 0.1, epochs 75`.
        values: of the chosen point, by key.
        edges: keys with numbers of which the chosen one is the smallest or the largest: the best
            value may lie beyond.
        validation: top-1 on validation after the last epoch of each point that could be trained,
            mean over the search's seeds.
        cpu_seconds: of the processor, of all runs of the search of this variant.
    """

    point: str
    values: Mapping[str, Any]
    edges: tuple[str, ...]
    validation: Mapping[str, Number]
    cpu_seconds: float


@dataclass(frozen=True)
class Search:
    """The search that every variant of a study had.

    Attributes:
        keys: the values that were tried, by key; all combinations.
        seeds: of its runs, none of them one of the study's own.
        runs: how many there were, of all variants together.
        cpu_seconds: of the processor, for all of them.
    """

    keys: Mapping[str, tuple[Any, ...]]
    seeds: tuple[int, ...]
    runs: int
    cpu_seconds: float


@dataclass(frozen=True)
class Cost:
    """What a variant costs. Training figures are means over its seeds.

    Attributes:
        seconds: of training, as that run alone would need them, measurements included.
        cpu_seconds: likewise, of the processor.
        memory: bytes that a training step of that run alone allocates at most, beside what is there
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
        about: what it is, in one line: its objective and schedule.
        seeds: of the finished runs.
        folders: of the finished runs, one a seed.
        last: metrics on the test data of what the run leaves by name
            (`kdkit.engine.evaluate.metrics`), one value a seed; `loss`: the training loss of the
            last epoch; `late_loss`: its mean over the last 60 % of the (last stage's) epochs.
        best: test metrics of the epoch that is best on validation, likewise; empty without a
            validation split.
        difference: to the baseline (None: it is the baseline, or they share no seed).
        cost: None where no run is finished.
        failures: reasons by seed.
        averaged: how many epochs, the best on validation, the weights are the mean of; 0: they are
            the last epoch's.
        validation: metrics on the validation data of what the run leaves, likewise; empty without a
            validation split.
        length: how long one of its runs trains; None where no run is finished.
        tuned: what a search has chosen for it; None without a search.
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
    """The teacher that all variants have that have one.

    Attributes:
        name: of its network, or its run.
        last: its metrics on the test data.
        parameters, macs, bytes, latency: see `Cost`.
        lengths: how long each of those was trained that another recipe trains; what weights from
            elsewhere have seen is not known.
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
    """A whole study, as `study.json` keeps it.

    Attributes:
        name, question: of the study.
        baseline: name of the variant that the others are compared with.
        command: what repeats it.
        variants: in the study's order.
        teacher: None where no variant has one, or they have several different ones.
        together: wall and CPU seconds that the training of this study took in all, as it was
            carried out (`wall`, `cpu`), and how many runs it trained (`trained`) or found trained
            already (`reused`).
        versions: of Python and of packages; `machine`: processor and accelerator.
        search: that every variant had before it was trained; None without one.
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

    __pydantic_config__ = ConfigDict(ser_json_inf_nan="null")

    @property
    def moment(self) -> str:
        """Which weights of the students were measured, in words."""
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
        if not found.variants:
            raise RunError(f"{path}: not the findings of a study: it has no variants; {AGAIN}")
        return found

    def save(self, path: Path) -> None:
        """Write a `study.json`."""
        files.write_json(path, TypeAdapter(Findings).dump_python(self, mode="json"))
