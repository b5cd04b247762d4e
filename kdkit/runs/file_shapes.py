"""The content of a run's files, as far as kdkit reads them back: validated by pydantic."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import BeforeValidator, ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.synonyms import renamed
from kdkit.contracts.task import ScoreInfo
from kdkit.finite import Number


class Marker(TypedDict):
    """Content of run.json."""

    fingerprint: str
    content: Content
    data: Annotated[DataInfo, BeforeValidator(renamed)]
    versions: dict[str, str]
    scores: NotRequired[list[ScoreInfo]]
    agreement: NotRequired[list[ScoreInfo]]


class Content(TypedDict):
    """Everything that the weights depend on; see `Recipe.content`."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    data: dict[str, Any]
    teacher: dict[str, Any] | None
    teachers: list[dict[str, Any]]


class Line(TypedDict):
    """Fields of every line of metrics.jsonl, and further ones of an epoch's line."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    kind: Literal["step", "epoch"]
    stage: str
    epoch: int
    step: int
    lr: NotRequired[float]
    train: NotRequired[dict[str, Number]]
    test: NotRequired[dict[str, Number]]
    validation: NotRequired[dict[str, Number]]


LINE: TypeAdapter[dict[str, Any]] = TypeAdapter(cast("Any", Line))


class PlainRecipe(TypedDict):
    """Minimum content of a resolved recipe when it is read without its plugins."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    name: str
    seed: int
    data: PlainData
    student: dict[str, Any]
    schedule: PlainEntry
    losses: list[PlainEntry]
    train: PlainTraining


class PlainEntry(TypedDict):
    """The section of a plugin."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    use: str


class PlainData(TypedDict):
    """The data section."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    dataset: PlainEntry
    batch_size: int


class PlainNamed(TypedDict):
    """A section with a name."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    name: str


class PlainOptimizer(PlainNamed):
    """The optimizer's section."""

    lr: float
    weight_decay: float


class PlainTraining(TypedDict):
    """The train section."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    epochs: int
    precision: str
    optimizer: PlainOptimizer
    lr_schedule: PlainNamed


RECIPE: TypeAdapter[dict[str, Any]] = TypeAdapter(cast("Any", PlainRecipe))
