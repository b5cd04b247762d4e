"""What a study has found: the runs of each variant over the seeds, their statistics and their costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from kdkit.checkpoints import write_atomically
from kdkit.errors import RunError
from kdkit.explain import explain
from kdkit.finite import or_nan

Number = Annotated[float, BeforeValidator(or_nan)]
"""A float; null in the file where it is NaN, for which JSON has no word."""


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
    """

    values: tuple[Number, ...]
    t: Interval | None
    bootstrap: Interval | None


@dataclass(frozen=True)
class Cost:
    """What a variant costs. Training figures are means over its seeds.

    Attributes:
        seconds: of training, as that run alone would need them, measurements included.
        cpu_seconds: likewise, of the processor.
        memory: bytes that a training step of that run alone allocates at most, beside what is there before it, gradients included.
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
        last: metrics on the test data of what the run leaves by name (`kdkit.evaluate.metrics`), one value a seed; `loss`: the training
            loss of the last epoch; `late_loss`: its mean over the last 60 % of the (last stage's) epochs.
        best: test metrics of the epoch that is best on validation, likewise; empty without a validation split.
        difference: to the baseline (None: it is the baseline, or they share no seed).
        cost: None where no run is finished.
        failures: reasons by seed.
        averaged: how many epochs, the best on validation, the weights are the mean of; 0: they are the last epoch's.
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


@dataclass(frozen=True)
class Teacher:
    """The teacher that all variants have that have one.

    Attributes:
        name: of its network, or its run.
        last: its metrics on the test data.
        parameters, macs, bytes, latency: see `Cost`.
    """

    name: str
    last: Mapping[str, Number]
    parameters: int
    macs: int
    bytes: int
    latency: float


@dataclass(frozen=True)
class Findings:
    """A whole study, as `study.json` keeps it.

    Attributes:
        name, question: of the study.
        baseline: name of the variant that the others are compared with.
        command: what repeats it.
        variants: in the study's order.
        teacher: None where no variant has one, or they have several different ones.
        together: wall and CPU seconds that the training of this study took in all, as it was carried out (`wall`, `cpu`), and how many runs
            it trained (`trained`) or found trained already (`reused`).
        versions: of Python and of packages; `machine`: processor and accelerator.
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
        return f"after the last epoch, but for {', '.join(variant.name for variant in averaged)}: {mean}"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `study.json`.

        Raises:
            RunError: it is not there, or is no such file.
        """
        try:
            found = TypeAdapter(cls).validate_json(path.read_bytes())
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}; `kdkit compare` writes it") from None
        except ValidationError as error:
            first, *_ = explain(error, None, None, lambda _: f"{path}: not the findings of a study").splitlines()
            raise RunError(first) from None
        if not found.variants:
            raise RunError(f"{path}: not the findings of a study: it has no variants")
        return found

    def save(self, path: Path) -> None:
        """Write a `study.json`."""
        write_atomically(path, TypeAdapter(Findings).dump_json(self, indent=1) + b"\n")
