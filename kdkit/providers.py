"""What the author of a model source or a dataset implements: where networks and images come from."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kdkit.errors import DataError
from kdkit.options import BOOKKEEPING, LATER, Options, RecipePath
from kdkit.shapes import Shape

FIRST_WEIGHTS = frozenset({"checkpoint", "strip_prefix", "new_head", "init"})
"""Keys of a model that say what its weights begin with; once it is trained, they say nothing."""


class Normalize(Options):
    """Mean and standard deviation per channel of inputs in [0, 1]."""

    mean: tuple[float, ...] = Field(min_length=1, description="Mean per channel, of values in [0, 1].")
    std: tuple[float, ...] = Field(min_length=1, description="Standard deviation per channel, of values in [0, 1].")


class ModelOptions(Options):
    """What a recipe may say of any model; a source's `Options` adds to it."""

    model: str = Field(description="SOURCE/NAME; a bare NAME is timm's. `kdkit plugins` lists the sources.")
    checkpoint: RecipePath | None = Field(default=None, description="Weights: a safetensors file, or one that torch loads weights-only.")
    strip_prefix: str = Field(default="", description="Prefix to drop from the checkpoint's keys, such as `module.`.")
    new_head: bool = Field(
        default=False,
        description="Leave out the checkpoint's classifier, which may be of other classes; the network's own, with random weights, stays.",
        json_schema_extra=LATER,
    )
    normalize: Normalize | None = Field(default=None, description="What the network expects (default: the source's own values).")
    input_size: int | None = Field(default=None, gt=0, description="Side of the square images this model sees; others are resized.")
    interpolation: Literal["bilinear", "bicubic", "nearest", "area"] = Field(default="bilinear", description="How images are resized.")

    @model_validator(mode="after")
    def _a_head_to_leave_out(self) -> Self:
        if self.new_head and self.checkpoint is None:
            raise ValueError("new_head leaves a checkpoint's classifier out, but there is no `checkpoint`")
        return self


class InitOptions(Options):
    """Tensors of a teacher with which a student begins: all that have its names and shapes."""

    from_: str = Field(alias="from", description="Whose: `teacher`, or the name of one of several.")
    layers: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="Of a network that is a row of repeated blocks (a transformer's layers), the teacher's blocks that become the "
        "student's, numbered from 0: [0, 2, 4]; none: those of the same numbers.",
    )


class StudentOptions(Options):
    """What a recipe may say of a student beyond what it says of any model."""

    init: InitOptions | None = Field(
        default=None, description="Begin with a teacher's weights, as far as they fit.", json_schema_extra=LATER
    )


class CacheOptions(Options):
    """Keeps on disk what a frozen teacher says of each image and view, for later epochs and for other runs with this teacher and data."""

    views: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        description="K: how many augmentations of each image are shown and kept; after them the first comes again. `all`: every crop and "
        "flip of `data.augment`, which are finitely many, so that training sees what it would see without a cache."
    )
    what: Literal["logits", "taps"] = Field(
        default="logits", description="taps: also the layers that losses look at, which are large; logits: the predictions alone."
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="Keep the k largest logits only; the rest of the probability is spread evenly over the other classes. At temperature 1 "
        "the k largest probabilities stay exact; at higher ones the other classes together get more than they have (none: all logits).",
    )
    dtype: Literal["fp16", "bf16", "fp32"] = Field(default="fp16", description="In which numbers answers are kept; losses get fp32.")
    dir: RecipePath | None = Field(
        default=None, description="Folder of the caches (default: `teacher-cache` in `run.folder`).", json_schema_extra=BOOKKEEPING
    )
    max_gb: float = Field(
        default=20.0, gt=0, description="Largest size that the cache may grow to, in 10^9 bytes.", json_schema_extra=BOOKKEEPING
    )


class TeacherOptions(Options):
    """What a recipe may say of a teacher beyond what it says of any model."""

    name: str | None = Field(
        default=None,
        pattern=r"^[a-z][a-z0-9_]*$",
        description="What losses call it, of several (default: teacher1, teacher2...).",
    )
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None, description="The teacher's own precision (default: that of `train.precision`)."
    )
    mode: Literal["eval", "train"] = Field(
        default="eval", description="train: batch statistics in its BatchNorm layers (its buffers stay as they are)."
    )
    fold_batchnorm: bool = Field(
        default=False, description="Merge BatchNorm layers into the convolutions before them: faster, equal up to rounding."
    )
    cache: CacheOptions | None = Field(default=None, description="Keep the teacher's answers on disk and read them from there.")


class RecipeTeacher(TeacherOptions):
    """A teacher that another recipe trains: its run is made when it is not there yet, and reused when it is."""

    recipe: RecipePath = Field(description="Recipe file whose student is this teacher.")
    seed: int | None = Field(default=None, ge=0, description="Seed in place of that recipe's own.")


@dataclass(frozen=True)
class Portable:
    """How an exported network lives where its recipe is not.

    Attributes:
        options: what builds it from nothing else, in the place of the recipe's options, which may name files or what is fetched.
        config: what its source's library reads in `config.json` beside the weights.
        how: says how that library loads it; `{folder}` stands for where it is.
    """

    options: Mapping[str, Any]
    config: Mapping[str, Any]
    how: str


class ModelSource(abc.ABC):
    """Builds networks by name. `model: mlp/small` reaches the source called `mlp` with `model_name` "small"."""

    name: ClassVar[str]
    takes: ClassVar[Literal["images", "texts"]] = "images"
    Options: ClassVar[type[ModelOptions]] = ModelOptions

    def __init__(self, options: ModelOptions, model_name: str) -> None:
        self.options = options
        self.model_name = model_name

    @abc.abstractmethod
    def build(self, num_classes: int, image_shape: Any) -> nn.Module:
        """A network for images (C, H, W), or for texts of at most N tokens (N,), with `num_classes` logits. May run on the meta device.

        Raises:
            ModelError: no such model, or it cannot be built so.
        """

    def load(self, module: nn.Module) -> None:  # noqa: B027 -- most sources have no weights of their own
        """Load the weights that a model has of itself (`pretrained`), in place; `checkpoint` is loaded by kdkit."""

    def rename(self, key: str, module: nn.Module) -> str:
        """The network's own name of what a `checkpoint` calls `key`, where other code bases name its layers otherwise."""
        return key

    def normalization(self, module: nn.Module) -> Normalize | None:
        """What the network expects, if the source knows; None for inputs in [0, 1]."""
        return None

    def portable(self, module: nn.Module) -> Portable | None:
        """How the source's own library loads an exported network; None: it has no way of its own."""
        return None

    def in_channels(self, image_channels: int) -> int:
        """Channels that the network takes; grey images are repeated to that many."""
        return image_channels


class Split(Protocol):
    """One part of a dataset, as a map-style dataset: item i is (PIL image, class index).

    It is read by several processes at once; an image that cannot be read raises, best a DataError that names its file.
    """

    @property
    def labels(self) -> Sequence[int]:
        """Class index of each item, known without reading the images."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


@runtime_checkable
class Stream(Protocol):
    """One part of a dataset that can only be read from its start to its end, such as tar shards.

    What needs to know or to reach single images cannot be had with it: train_samples, train_fraction, validation, repeats (each raises
    a DataError), a teacher cache, losses that keep something per image. An interrupted epoch is taken up by reading it again up to that
    place. Which images come together depends on `data.workers`. Several processes can train on a `SharedStream` only.
    """

    def __len__(self) -> int:
        """Images of one epoch."""
        ...

    def read(self, seed: int | None, workers: int, batch_size: int) -> Iterable[tuple[Any, int]]:
        """(PIL image, class index) of one epoch; iterated in each worker process, it gives that worker's share.

        Args:
            seed: of this epoch's order; None: in the order of the files, every image once.
            workers: processes that read, 0 for the calling one alone.
            batch_size: images per batch, so that shares of a shuffled epoch can be made whole batches (by repetition).
        """
        ...


@runtime_checkable
class SharedStream(Stream, Protocol):
    """A stream that several training processes can read, each its own share."""

    def share(self, rank: int, world: int) -> Stream:
        """What process `rank` of `world` reads. Its length stays that of the whole.

        Shuffled, it must have its part of an epoch's batches at least, by repetition if need be, so that no process waits for another's.
        In the order of the files, all processes together read every image once.
        """
        ...


@dataclass(frozen=True)
class DataInfo:
    """What is known of a dataset before it is read.

    Attributes:
        image_shape: (C, H, W); H and W are 0 where images have many sizes, so that a recipe must set `data.image_size`. Of texts, (N,): so
            many tokens at most.
        num_classes: K.
        num_train, num_test: lengths of the parts.
        class_names: K names, or none.
        further: names of the tensors that a text has beside its token ids and their mask; none for a single text.
    """

    image_shape: Shape
    num_classes: int
    num_train: int
    num_test: int
    class_names: tuple[str, ...] = ()
    further: tuple[str, ...] = ()


class DatasetOptions(Options):
    """Options of a dataset; subclass it as `Options` in the dataset source."""


class DatasetSource(abc.ABC):
    """Reads one dataset."""

    name: ClassVar[str]
    Options: ClassVar[type[DatasetOptions]] = DatasetOptions

    def __init__(self, options: DatasetOptions) -> None:
        self.options = options

    @abc.abstractmethod
    def info(self) -> DataInfo:
        """Shape and class count, without reading the images.

        Raises:
            DataError: its files are not there (and may not be downloaded).
        """

    @abc.abstractmethod
    def split(self, part: Literal["train", "test"]) -> Split | InMemory | Texts | Stream:
        """One part: images in memory, a map-style dataset of PIL images, a stream of them, or texts.

        Raises:
            DataError: its files are missing or broken.
        """


@dataclass(frozen=True)
class InMemory:
    """A part of a dataset held as one tensor: images uint8 (N, C, H, W), labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or len(self.images) != len(self.labels):
            raise DataError(f"InMemory takes uint8 images (N, C, H, W) and N labels, got {self.images.dtype} {tuple(self.images.shape)}")

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Texts:
    """A part of a dataset held as token ids; batches are mappings, padded to their longest text, with an `attention_mask`.

    Attributes:
        tokens: whole numbers of each text by the name under which networks take them, such as `input_ids`; of one text, all as many.
        labels: int64 (N,).
        padding: what short texts are filled up with, by the same names (default: 0).
    """

    tokens: Mapping[str, Sequence[Sequence[int]]]
    labels: Tensor
    padding: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = {tuple(map(len, ids)) for ids in self.tokens.values()}
        if len(counts) != 1 or len(self.lengths) != len(self.labels) or not all(self.lengths):
            raise DataError("Texts takes as many labels as texts, and of each text at least one token, as many under every name")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(ids) for ids in next(iter(self.tokens.values()))]
