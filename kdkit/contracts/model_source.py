"""The interface of a model source: where networks come from, and which options a recipe may set."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kdkit.contracts.options import (
    BOOKKEEPING,
    COUNT,
    LATER,
    LONGEST_NAME,
    SIDE,
    TERM_NAME,
    Options,
    RecipePath,
)

FIRST_WEIGHTS = frozenset({"checkpoint", "strip_prefix", "new_head", "init"})
"""Keys of a model that define its initial weights; they are irrelevant after training."""
OWN_OUTPUTS = "num_classes"
"""Key of a teacher for the number of its network's outputs, if it differs from the data's."""


class Normalize(Options):
    """Mean and standard deviation per channel of inputs in [0, 1]."""

    mean: tuple[float, ...] = Field(
        min_length=1, description="Mean per channel, of values in [0, 1]."
    )
    std: tuple[float, ...] = Field(
        min_length=1, description="Standard deviation per channel, of values in [0, 1]."
    )


class ModelOptions(Options):
    """Options of every model; a source's `Options` adds to them."""

    model: str = Field(
        description="SOURCE/NAME; a bare NAME is timm's. `kdkit plugins` lists the sources."
    )
    checkpoint: RecipePath | None = Field(
        default=None,
        description="Weights: a safetensors file, or one that torch loads weights-only.",
    )
    strip_prefix: str = Field(
        default="",
        description=(
            "Prefix to drop from the checkpoint's keys, such as `teacher.`; also the key under"
            " which its weights lie (`net.`). A prefix that all keys have is dropped in any case."
        ),
    )
    new_head: bool = Field(
        default=False,
        description=(
            "Leave out the checkpoint's classifier, which may be of other classes; the network's"
            " own, with random weights, stays."
        ),
        json_schema_extra=LATER,
    )
    normalize: Normalize | None = Field(
        default=None, description="What the network expects (default: the source's own values)."
    )
    input_size: int | None = Field(
        default=None,
        gt=0,
        le=SIDE,
        description="Side of the square images this model sees; others are resized.",
    )
    interpolation: Literal["bilinear", "bicubic", "nearest", "area"] = Field(
        default="bilinear", description="How images are resized."
    )

    @model_validator(mode="after")
    def _a_head_to_leave_out(self) -> Self:
        if self.new_head and self.checkpoint is None:
            raise ValueError(
                "new_head leaves a checkpoint's classifier out, but there is no `checkpoint`"
            )
        return self


class InitOptions(Options):
    """Initialisation of a student from a teacher: copies all tensors whose names and shapes
    match.
    """

    from_: str = Field(alias="from", description="Whose: `teacher`, or the name of one of several.")
    layers: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description=(
            "Of a network that is a row of repeated blocks (a transformer's layers), the teacher's"
            " blocks that become the student's, numbered from 0: [0, 2, 4]; none: those of the same"
            " numbers."
        ),
    )


class StudentOptions(Options):
    """Options of a student beyond those of every model."""

    init: InitOptions | None = Field(
        default=None,
        description="Begin with a teacher's weights, as far as they fit.",
        json_schema_extra=LATER,
    )


class CacheOptions(Options):
    """Options of a cache on disk for a frozen teacher's answers to each image and view, reused in
    later epochs and by other runs with this teacher and data.
    """

    views: Annotated[int, Field(ge=1, le=COUNT)] | Literal["all"] = Field(
        description=(
            "K: how many augmentations of each image are shown and kept; after them the first comes"
            " again. `all`: every crop and flip of `data.augment`, which are finitely many, so that"
            " training sees what it would see without a cache."
        )
    )
    what: Literal["logits", "taps"] = Field(
        default="logits",
        description=(
            "taps: also the layers that losses look at, which are large; logits: the predictions"
            " alone."
        ),
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Keep the k largest logits only; the rest of the probability is spread evenly over the"
            " other classes. At temperature 1 the k largest probabilities stay exact; at higher"
            " ones the other classes together get more than they have (none: all logits)."
        ),
    )
    dtype: Literal["fp16", "bf16", "fp32"] = Field(
        default="fp16", description="In which numbers answers are kept; losses get fp32."
    )
    dir: RecipePath | None = Field(
        default=None,
        description="Folder of the caches (default: `teacher-cache` in `run.folder`).",
        json_schema_extra=BOOKKEEPING,
    )
    max_gb: float = Field(
        default=20.0,
        gt=0,
        description="Largest size that the cache may grow to, in 10^9 bytes.",
        json_schema_extra=BOOKKEEPING,
    )


class TeacherOptions(Options):
    """Options of a teacher beyond those of every model."""

    name: str | None = Field(
        default=None,
        pattern=TERM_NAME,
        max_length=LONGEST_NAME,
        description="What losses call it, of several (default: teacher1, teacher2...).",
    )
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None,
        description="The teacher's own precision (default: that of `train.precision`).",
    )
    mode: Literal["eval", "train"] = Field(
        default="eval",
        description=(
            "train: batch statistics in its BatchNorm layers (its buffers stay as they are)."
        ),
    )
    fold_batchnorm: bool = Field(
        default=False,
        description=(
            "Merge BatchNorm layers into the convolutions before them: faster, equal up to"
            " rounding."
        ),
    )
    num_classes: int | None = Field(
        default=None,
        ge=0,
        description=(
            "How many classes the network has, where they are not those of the data; 0: it has none"
            " (an encoder), so that only losses on layers can look at it."
        ),
        json_schema_extra=LATER,
    )
    classes: (
        tuple[Annotated[int, Field(ge=0)], ...] | dict[str, Annotated[int, Field(ge=0)]] | None
    ) = Field(
        default=None,
        min_length=1,
        description=(
            "Which of its classes, counted from 0, are those of the data: a list in the data's"
            " order, or a number for each name of a class. The others are left out wherever its"
            " answers are read."
        ),
        json_schema_extra=LATER,
    )
    answers: Literal["logits", "softmax", "sigmoid"] = Field(
        default="logits",
        description=(
            "The network's last operation: probabilities by `softmax` or `sigmoid` are turned into"
            " logits again."
        ),
        json_schema_extra=LATER,
    )
    cache: CacheOptions | None = Field(
        default=None, description="Keep the teacher's answers on disk and read them from there."
    )


class RecipeTeacher(TeacherOptions):
    """A teacher that another recipe trains: its run is made if it does not exist yet, and reused if
    it does.
    """

    recipe: RecipePath = Field(description="Recipe file whose student is this teacher.")
    seed: int | None = Field(default=None, ge=0, description="Seed in place of that recipe's own.")

    @model_validator(mode="after")
    def _knows_its_classes(self) -> Self:
        if self.num_classes is not None:
            raise ValueError("num_classes is that of the recipe's own data; leave it out")
        return self


@dataclass(frozen=True)
class Portable:
    """Instructions for rebuilding an exported network without its recipe.

    Attributes:
        options: options that build it without other files; they replace the recipe's options, which
            may name files or downloads.
        config: entries that its source's library reads from `config.json` beside the weights.
        how: the code with which that library loads it; `{folder}` stands for the exported folder.
    """

    options: Mapping[str, Any]
    config: Mapping[str, Any]
    how: str


@dataclass(frozen=True)
class Meaning:
    """The meaning of a network's inputs and outputs, as far as its source knows it.

    Attributes:
        class_names: of its logits, in order; none if unknown.
        tokenizer: digest of the tokenizer that it was trained with (`DataInfo.tokenizer`); empty if
            unknown.
        num_tokens: of its embedding; 0 if unknown.
    """

    class_names: tuple[str, ...] = ()
    tokenizer: str = ""
    num_tokens: int = 0


class ModelSource(abc.ABC):
    """Builds networks by name. `model: mlp/small` reaches the source called `mlp` with
    `model_name` "small".
    """

    name: ClassVar[str]
    takes: ClassVar[Literal["images", "texts", "any"]] = "images"
    Options: ClassVar[type[ModelOptions]] = ModelOptions

    def __init__(self, options: ModelOptions, model_name: str) -> None:
        self.options = options
        self.model_name = model_name

    @abc.abstractmethod
    def build(self, outputs: int, image_shape: Any) -> nn.Module:
        """Build a network for images (C, H, W), or for texts of at most N tokens (N,), that gives
        `outputs` values for each row. May run on the meta device.

        Raises:
            ModelError: no such model, or it cannot be built so.
        """

    def load(self, module: nn.Module) -> None:  # noqa: B027 -- most sources have no weights of their own
        """Load the model's own weights (`pretrained`) in place; kdkit itself loads a
        `checkpoint`.
        """

    def rename(self, key: str, module: nn.Module) -> str:
        """Return the network's own name of a key in a `checkpoint`, for code bases that name its
        layers differently.
        """
        return key

    def normalization(self, module: nn.Module) -> Normalize | None:
        """Return the normalisation that the network expects, if the source knows it; None for
        inputs in [0, 1].
        """
        return None

    def meaning(self, module: nn.Module) -> Meaning:
        """Return the meaning of its inputs and outputs, if the source knows it: `kdkit check`
        compares it with the data.
        """
        return Meaning()

    def portable(self, module: nn.Module) -> Portable | None:
        """Describe how the source's own library loads an exported network; None if it has no way to
        do so.
        """
        return None

    def in_channels(self, image_channels: int) -> int:
        """Return the number of channels that the network takes; grey images are repeated to that
        many.
        """
        return image_channels


class AnswersOptions(ModelOptions):
    """Options of a teacher whose answers exist already; keys that describe a network are
    refused.
    """


NETWORK_KEYS = (
    *("checkpoint", "strip_prefix", "new_head", "normalize", "input_size", "interpolation"),
    *("precision", "mode", "fold_batchnorm", "cache"),
)
"""Keys of a teacher that describe its network, or the way it is run."""


class KnownAnswers(ModelSource):
    """A source that has a teacher's answers to the training images, but no network.

    Such a teacher answers only the images of the training part, without augmentation: it is not
    measured.
    """

    takes: ClassVar[Literal["images", "texts", "any"]] = "any"
    Options: ClassVar[type[ModelOptions]] = AnswersOptions

    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the answers without reading them; it must be (N, K).

        Raises:
            ModelError: there are none, or they are no floating-point numbers.
        """

    @abc.abstractmethod
    def read(self) -> Tensor:
        """Return the answers (N, K): row i answers the image with `Batch.index` i.

        Raises:
            ModelError: they cannot be read.
        """

    def build(self, outputs: int, image_shape: Any) -> nn.Module:
        """Build a stand-in for the network."""
        return _PassedOn(outputs)


class _PassedOn(nn.Module):
    """Passes answers (N, K) through unchanged. Anything else is a batch that a check tries: it
    returns random numbers of that shape.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *inputs: Tensor, **texts: Tensor) -> Tensor:
        first = inputs[0] if inputs else next(iter(texts.values()))
        if first.ndim == 2 and first.is_floating_point():
            return first
        return torch.randn(len(first), self.outputs, device=first.device)
