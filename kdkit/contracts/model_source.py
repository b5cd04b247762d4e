"""The interface of a model source: where networks come from, and which options a recipe may set."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from torch import nn

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


class CropOptions(Options):
    """A square cut out of each image."""

    size: int = Field(gt=0, le=SIDE, description="Side of the square, in pixels.")
    place: Literal["centre", "random"] = Field(
        default="centre",
        description=(
            "Place of the square. random: another one for each image and training step; the centre"
            " wherever the network is measured or exported."
        ),
    )


def _square(value: Any) -> Any:
    """Expand a side to the section that it abbreviates."""
    return {"size": value} if isinstance(value, int) and not isinstance(value, bool) else value


class InputOptions(Options):
    """What a network sees of each sample, in this order: a field, a crop, grey, another size."""

    field: str | None = Field(
        default=None,
        description=(
            "Field of the sample, for datasets whose samples have several, such as colour and depth"
            " (default: all of them, as channels)."
        ),
    )
    crop: Annotated[
        CropOptions | None, BeforeValidator(_square, json_schema_input_type=CropOptions | int)
    ] = Field(
        default=None,
        description="Square cut out of each image: its side in pixels, or its options.",
    )
    grey: bool = Field(
        default=False, description="Luminance of colour images (ITU-R BT.601), in one channel."
    )
    size: int | None = Field(
        default=None,
        gt=0,
        le=SIDE,
        description="Side of the square images that the network sees, in pixels.",
    )
    interpolation: Literal["bilinear", "bicubic", "nearest", "area"] = Field(
        default="bilinear", description="Interpolation for resizing to `size`."
    )

    @property
    def is_drawn(self) -> bool:
        """True if it differs from step to step."""
        return self.crop is not None and self.crop.place == "random"

    def __str__(self) -> str:
        said = [f"field {self.field}"] if self.field is not None else []
        if self.crop is not None:
            said.append(f"{self.crop.place} crop of {self.crop.size} x {self.crop.size}")
        said += ["grey"] if self.grey else []
        said += [f"{self.size} x {self.size} ({self.interpolation})"] if self.size else []
        return ", ".join(said) or "whole samples"


SEES = "What the network sees of each sample (default: all of it)."


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
            "Prefix to drop from the checkpoint's keys, such as `teacher.`, or the entry that holds"
            " the weights, such as `net.`. A prefix common to all keys is always dropped."
        ),
    )
    new_head: bool = Field(
        default=False,
        description=(
            "Ignore the checkpoint's classifier, for example because its classes differ, and keep"
            " the network's randomly initialised one."
        ),
        json_schema_extra=LATER,
    )
    normalize: Normalize | None = Field(
        default=None,
        description="Normalisation that the network expects (default: the source's values).",
    )
    input: InputOptions | None = Field(default=None, description=SEES, json_schema_extra=LATER)
    input_size: int | None = Field(
        default=None,
        gt=0,
        le=SIDE,
        description="Side of the network's square input, in pixels (default: as it sees samples).",
    )
    interpolation: Literal["bilinear", "bicubic", "nearest", "area"] = Field(
        default="bilinear", description="Interpolation for resizing to `input_size`."
    )

    @model_validator(mode="after")
    def _a_head_to_leave_out(self) -> Self:
        if self.new_head and self.checkpoint is None:
            raise ValueError(
                "new_head leaves a checkpoint's classifier out, but there is no `checkpoint`"
            )
        return self


class InitOptions(Options):
    """Initialisation of a student by the teacher's tensors of the same names and shapes."""

    from_: str = Field(
        alias="from", description="Source of the weights: `teacher`, or the name of one of several."
    )
    layers: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description=(
            "Teacher blocks to copy into the student's, numbered from 0, such as [0, 2, 4], for"
            " networks of repeated blocks such as transformers (default: the same numbers)."
        ),
    )


class StudentOptions(Options):
    """Options of a student beyond those of every model."""

    init: InitOptions | None = Field(
        default=None,
        description="Initialise from a teacher's weights, where names and shapes match.",
        json_schema_extra=LATER,
    )


ADDRESS = r"^[A-Za-z0-9._-]+:[0-9]{1,5}$"


class CacheOptions(Options):
    """Options of a cache on disk for a frozen teacher's answers, reused by epochs and runs."""

    views: Annotated[int, Field(ge=1, le=COUNT)] | Literal["all"] = Field(
        description=(
            "Number K of augmentations of each image to cache; training cycles through them. With"
            " `train.mixup`, number of epochs after which order and mixes come again. `all`:"
            " every possible crop and flip of `data.augment`, so that training sees the same images"
            " as without a cache."
        )
    )
    what: Literal["logits", "taps"] = Field(
        default="logits",
        description=(
            "Content of the cache. logits: predictions only; taps: also the layers that losses read"
            " (large)."
        ),
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Cache only the k largest logits; the remaining probability is spread evenly over the"
            " other classes. The k largest probabilities are exact at temperature 1; at higher"
            " temperatures the other classes are overestimated (default: all logits)."
        ),
    )
    dtype: Literal["fp16", "bf16", "fp32"] = Field(
        default="fp16", description="Storage precision of the answers; losses receive fp32."
    )
    dir: RecipePath | None = Field(
        default=None,
        description="Cache folder (default: `teacher-cache` in `run.folder`).",
        json_schema_extra=BOOKKEEPING,
    )
    max_gb: float = Field(
        default=20.0,
        gt=0,
        description="Maximum size of the cache, in GB (10^9 bytes).",
        json_schema_extra=BOOKKEEPING,
    )


class TeacherOptions(Options):
    """Options of a teacher beyond those of every model."""

    name: str | None = Field(
        default=None,
        pattern=TERM_NAME,
        max_length=LONGEST_NAME,
        description="Name that losses refer to (default: teacher1, teacher2...).",
    )
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None,
        description="Precision of the teacher's forward pass (default: `train.precision`).",
    )
    mode: Literal["eval", "train"] = Field(
        default="eval",
        description=(
            "Mode of BatchNorm layers. eval: running statistics; train: batch statistics (buffers"
            " stay unchanged)."
        ),
    )
    fold_batchnorm: bool = Field(
        default=False,
        description=(
            "Fold BatchNorm layers into the preceding convolutions: faster, equal up to rounding."
        ),
    )
    num_classes: int | None = Field(
        default=None,
        ge=0,
        description=(
            "Number of the network's classes, if they differ from the data's; 0: no classifier (an"
            " encoder), so that only losses on layers can use it."
        ),
        json_schema_extra=LATER,
    )
    classes: (
        tuple[Annotated[int, Field(ge=0)], ...] | dict[str, Annotated[int, Field(ge=0)]] | None
    ) = Field(
        default=None,
        min_length=1,
        description=(
            "The network's classes that correspond to the data's, counted from 0: a list in the"
            " data's order, or a mapping from class name to number. All others are dropped."
        ),
        json_schema_extra=LATER,
    )
    answers: Literal["logits", "softmax", "sigmoid"] = Field(
        default="logits",
        description=(
            "Form of the network's output; probabilities after a `softmax` or `sigmoid` are"
            " converted back to logits."
        ),
        json_schema_extra=LATER,
    )
    cache: CacheOptions | None = Field(
        default=None, description="Cache of the teacher's answers on disk (default: none)."
    )
    at: Annotated[
        tuple[Annotated[str, Field(pattern=ADDRESS)], ...] | None,
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ] = Field(
        default=None,
        min_length=1,
        description=(
            "Where `kdkit serve` answers for this teacher, such as [localhost:7070]; several"
            " servers share the work (default: it answers here)."
        ),
        json_schema_extra=BOOKKEEPING,
    )
    sends: Literal["logits", "hidden"] = Field(
        default="logits",
        description=(
            "What a served teacher sends of its answer. hidden: what its last, linear layer reads;"
            " that layer is then applied here. Fewer bytes with many classes, the same numbers."
        ),
        json_schema_extra=BOOKKEEPING,
    )


class RecipeTeacher(TeacherOptions):
    """A teacher that another recipe trains; its run is reused if it exists."""

    recipe: RecipePath = Field(description="Recipe file that trains this teacher as its student.")
    seed: int | None = Field(
        default=None, ge=0, description="Seed of that recipe (default: the one in the file)."
    )
    input: InputOptions | None = Field(
        default=None,
        description="What it sees of each sample (default: what it saw in its own training).",
        json_schema_extra=LATER,
    )

    @model_validator(mode="after")
    def _knows_its_classes(self) -> Self:
        if self.num_classes is not None:
            raise ValueError("num_classes is that of the recipe's own data; leave it out")
        return self


@dataclass(frozen=True)
class Portable:
    """Instructions for rebuilding an exported network without its recipe.

    Attributes:
        options: options that build it without other files; they replace those of the recipe that
            name files or downloads.
        config: entries that its source's library reads from `config.json` beside the weights.
        how: the code with which that library loads it; `{folder}` stands for the exported folder,
            `{outputs}` for the number of values in each row of an answer.
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
    """Builds networks by name: `mlp/small` reaches the source `mlp` with `model_name` "small"."""

    name: ClassVar[str]
    takes: ClassVar[Literal["images", "texts", "any"]] = "images"
    Options: ClassVar[type[ModelOptions]] = ModelOptions

    def __init__(self, options: ModelOptions, model_name: str) -> None:
        self.options = options
        self.model_name = model_name

    @abc.abstractmethod
    def build(self, outputs: int, image_shape: Any) -> nn.Module:
        """Build a network of `outputs` values a row for a shape (C, H, W) or (N,), maybe on meta.

        Raises:
            ModelError: no such model, or it cannot be built so.
        """

    def load(self, module: nn.Module) -> None:  # noqa: B027 -- most sources have no weights of their own
        """Load the model's own weights (`pretrained`) in place; a `checkpoint` is kdkit's work."""

    def rename(self, key: str, module: nn.Module) -> str:
        """Return the network's name of a key in a `checkpoint`, which may use other names."""
        return key

    def normalization(self, module: nn.Module) -> Normalize | None:
        """Return the normalisation that the network expects; None: unknown, or inputs in [0, 1]."""
        return None

    def meaning(self, module: nn.Module) -> Meaning:
        """Return the meaning of inputs and outputs, which `kdkit check` compares with the data."""
        return Meaning()

    def portable(self, module: nn.Module) -> Portable | None:
        """Describe how the source's library loads an exported network; None if it cannot."""
        return None

    def in_channels(self, image_channels: int) -> int:
        """Return the network's number of channels; grey images are repeated to it."""
        return image_channels
