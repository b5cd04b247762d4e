"""The result of a finished run, and the content of a run's files as far as kdkit reads them back:
validated by pydantic.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import BeforeValidator, ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.synonyms import renamed
from kdkit.contracts.task import ScoreInfo
from kdkit.finite import Number

VERSIONS = ("kdkit", "torch", "torchvision", "timm", "accelerate")


@dataclass(frozen=True)
class Result:
    """The result of a finished run.

    Attributes:
        folder: the run folder.
        name, seed: the recipe's.
        test: metrics of the student (`kdkit.engine.evaluate.metrics`): after the last epoch, or of
            the mean of its best epochs' weights.
        validation: the same metrics on the validation split, if there is one.
        best: of the epoch with the best validation accuracy: `epoch`, `validation` and `test`
            metrics.
        averaged: the epochs over which `train.average_best` took the mean; none without it.
        last: metrics of the student after the last epoch, if it is such a mean: `validation` and
            `test` metrics.
        files: SHA-256 of each file of weights that the run leaves, and of its metrics.jsonl, by its
            path in the folder (none: written by an older kdkit).
        teacher: the teacher's own metrics on the test data.
        peers: metrics of the other students on the test data.
        ensemble: of all students (and models in their company) together, on the test data.
        network: options of the student's network, if it is not the recipe's `student` (a peer that
            a schedule names).
        parameters: of the student.
        seconds: training time, measurements included.
        cpu_seconds: CPU time of this process, without its loader workers.
    """

    folder: Path
    name: str
    seed: int
    test: Mapping[str, float]
    parameters: int
    seconds: float
    cpu_seconds: float
    epochs: int
    validation: Mapping[str, float] | None = None
    best: Mapping[str, Any] | None = None
    teacher: Mapping[str, float] | None = None
    peers: tuple[Mapping[str, float], ...] = ()
    ensemble: Mapping[str, float] | None = None
    network: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = field(default=())
    averaged: tuple[int, ...] = ()
    last: Mapping[str, Mapping[str, float]] | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def moment(self) -> str:
        """The moment at which the measured weights were taken, in words."""
        return (
            f"mean of epochs {', '.join(map(str, self.averaged))}"
            if self.averaged
            else "last epoch"
        )

    @property
    def student(self) -> Path:
        """Path of the student's weights, safetensors."""
        return self.folder / "student.safetensors"


class _Open(TypedDict):
    """May hold more keys than those named."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]


class Marker(TypedDict):
    """Content of run.json."""

    fingerprint: str
    content: Content
    # Files of an older kdkit name some fields otherwise.
    data: Annotated[DataInfo, BeforeValidator(renamed)]
    versions: dict[str, str]
    task: NotRequired[str]
    scores: NotRequired[list[ScoreInfo]]
    agreement: NotRequired[list[ScoreInfo]]


class Content(_Open):
    """Everything that the weights depend on; see `Recipe.content`."""

    data: dict[str, Any]
    teacher: dict[str, Any] | None
    teachers: list[dict[str, Any]]


# Open, as schedules and older versions write further fields.
class Line(_Open):
    """Fields of every line of metrics.jsonl, and further ones of an epoch's line."""

    kind: Literal["step", "epoch"]
    stage: str
    epoch: int
    step: int
    lr: NotRequired[float]
    train: NotRequired[dict[str, Number]]
    test: NotRequired[dict[str, Number]]
    validation: NotRequired[dict[str, Number]]


# Cast: what is read is used as a plain dictionary, which to mypy no TypedDict is.
LINE: TypeAdapter[dict[str, Any]] = TypeAdapter(cast("Any", Line))


class PlainRecipe(_Open):
    """Minimum content of a resolved recipe when it is read without its plugins."""

    name: str
    seed: int
    data: PlainData
    student: dict[str, Any]
    schedule: PlainEntry
    losses: list[PlainEntry]
    train: PlainTraining


class PlainEntry(_Open):
    """The section of a plugin."""

    use: str


class PlainData(_Open):
    """The data section."""

    dataset: PlainEntry
    batch_size: int


class PlainNamed(_Open):
    """A section with a name."""

    name: str


class PlainOptimizer(PlainNamed):
    """The optimizer's section."""

    lr: float
    weight_decay: float


class PlainTraining(_Open):
    """The train section."""

    epochs: int
    precision: str
    optimizer: PlainOptimizer
    lr_schedule: PlainNamed


RECIPE: TypeAdapter[dict[str, Any]] = TypeAdapter(cast("Any", PlainRecipe))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a run's numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}
