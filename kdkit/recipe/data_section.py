"""The `data` section of a recipe, without the options that plugins add."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from kdkit.contracts.dataset_source import DatasetOptions
from kdkit.contracts.options import BOOKKEEPING, COUNT, LATER, SIDE, Options, RecipePath

LARGEST_SCALE = 16
"""Largest factor that an image is resized by in augmentation."""


class BatchAugment(Options):
    """Augmentation on whole batches, drawn independently for every image."""

    crop_padding: int = Field(
        default=0,
        ge=0,
        le=SIDE,
        description="Zero padding in pixels before a random crop: the maximum shift.",
    )
    flip: float = Field(default=0.0, ge=0, le=1, description="Probability of a horizontal flip.")

    @property
    def moves(self) -> bool:
        """Whether it moves what is in an image."""
        return self.crop_padding > 0 or self.flip > 0


class TimmAugment(Options):
    """Augmentation by timm's `create_transform`, image by image, in worker processes.

    Erased rectangles and the borders of rotated images are filled as in timm for ImageNet's mean
    and deviation.
    """

    scale: tuple[float, float] | None = Field(
        default=None,
        description="Range of areas for RandomResizedCrop (default: timm's, 0.08 to 1).",
    )
    ratio: tuple[float, float] | None = Field(
        default=None,
        description="Range of aspect ratios for RandomResizedCrop (default: timm's, 3/4 to 4/3).",
    )
    flip: float = Field(default=0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    vertical_flip: float = Field(
        default=0.0, ge=0, le=1, description="Probability of a vertical flip."
    )
    color_jitter: float | None = Field(
        default=None,
        ge=0,
        description="Strength of brightness, contrast and saturation jitter (default: none).",
    )
    auto_augment: str | None = Field(
        default=None,
        description="timm policy, such as `rand-m7-mstd0.5` or `augmix-m5-w4` (default: none).",
    )
    random_erasing: float = Field(
        default=0.0, ge=0, le=1, description="Probability of random erasing."
    )
    erasing_mode: Literal["const", "rand", "pixel"] = Field(
        default="pixel",
        description=(
            "Fill of the erased rectangle: const (the mean), rand (one random colour) or pixel (a"
            " random colour per pixel)."
        ),
    )
    interpolation: Literal["random", "bilinear", "bicubic"] = Field(
        default="random", description="Interpolation for resizing crops."
    )

    @property
    def moves(self) -> bool:
        """Whether it moves what is in an image; policies may."""
        crops = not self.scale == self.ratio == (1.0, 1.0)
        return crops or self.flip > 0 or self.vertical_flip > 0 or self.auto_augment is not None


Side = Annotated[int, Field(gt=0, le=SIDE)]

Size = tuple[Side, Side]
"""Height and width of images, pixels."""


class JointAugment(Options):
    """Augmentation of an image together with its target, by torchvision, in worker processes.

    For tasks whose targets move with the image, such as masks. Applied in this order.
    """

    scale: tuple[float, float] | None = Field(
        default=None,
        description="Range of the factor that image and target are resized by (default: none).",
    )
    crop: Size | None = Field(
        default=None,
        description=(
            "Height and width of a random crop, padded where the image is smaller (default: the"
            " size in which images are measured)."
        ),
    )
    flip: float = Field(default=0.0, ge=0, le=1, description="Probability of a horizontal flip.")
    color_jitter: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Strength of brightness, contrast and saturation jitter of the image.",
    )

    @field_validator("scale")
    @classmethod
    def _range(cls, scale: tuple[float, float] | None) -> tuple[float, float] | None:
        if scale is not None and not 0 < scale[0] <= scale[1] <= LARGEST_SCALE:
            raise ValueError(f"must be a range [low, high] above 0, of at most {LARGEST_SCALE}")
        return scale


class DatasetEntry(DatasetOptions):
    """The dataset plugin that reads the samples."""

    use: str = Field(description="Name of the dataset plugin.")


class UnlabelledSpec(Options):
    """Further training samples, whose labels nothing reads: only teachers teach from them.

    An epoch has each labelled sample once. The unlabelled ones come in epochs of their own, in
    another random order each, which go on from one epoch of the labelled samples to the next.
    """

    dataset: DatasetEntry | None = Field(
        default=None,
        description=(
            "Dataset plugin and its options, of which the training part is used (default: the"
            " samples that `train_samples` or `train_fraction` leaves out)."
        ),
    )
    share: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Share of the unlabelled samples in a batch; their number is rounded.",
    )


class DistilledSpec(Options):
    """Distilled images in the place of the dataset's training images."""

    file: RecipePath = Field(description="The file that `kdkit distill-data` has written.")
    labels: Literal["shares", "hard", "solved"] = Field(
        default="shares",
        description=(
            "What learnt labels become: `shares` of the classes (negative ones are 0, the sum is"
            " 1); `hard`, the largest one's class; or as they were `solved`, for a loss such as"
            " `label_mse`."
        ),
    )


class DataSpec(Options):
    """The data for training and measuring."""

    dataset: DatasetEntry = Field(description="Dataset plugin and its options.")
    distilled: Annotated[
        DistilledSpec | None,
        BeforeValidator(
            lambda value: {"file": value} if isinstance(value, str) else value,
            json_schema_input_type=DistilledSpec | str | None,
        ),
    ] = Field(
        default=None,
        description=(
            "A file of `kdkit distill-data`, whose images are trained on in the place of the"
            " dataset's (default: none)."
        ),
        json_schema_extra=LATER,
    )
    image_size: Side | Size | None = Field(
        default=None,
        description=(
            "Side of the square images in a batch, or [height, width], in pixels (default: the"
            " dataset's). Images are scaled to cover it, and cut off; those with targets that move"
            " with them, such as masks, are scaled to fit in it, and padded."
        ),
    )
    crop_pct: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Fraction of the side that evaluation's centre crop keeps, for image files.",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        default="bilinear", description="Interpolation for resizing to `image_size`."
    )
    batch_size: int = Field(
        default=64, gt=0, le=COUNT, description="Samples per training batch, over all processes."
    )
    eval_batch_size: int = Field(
        default=256,
        gt=0,
        le=COUNT,
        description=(
            "Samples per evaluation batch, per process; at most `batch_size` where targets are as"
            " large as images."
        ),
    )
    train_samples: int | None = Field(
        default=None,
        gt=0,
        le=1000 * COUNT,
        description="Number of training samples, stratified by class, by `seed` (default: all).",
    )
    train_fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Fraction of training samples, stratified by class, by `seed` (default: all).",
    )
    validation: float | int | None = Field(
        default=None,
        gt=0,
        description=(
            "Fraction (below 1) or number of training samples held out for validation (default:"
            " none)."
        ),
    )
    synthetic_batches: int | None = Field(
        default=None,
        gt=0,
        le=COUNT,
        description=(
            "Batches in an epoch whose images the schedule makes: no training image is read, and"
            " none has to be there (default: the dataset's images)."
        ),
        json_schema_extra=LATER,
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="Random seed of `train_samples`, `train_fraction` and `validation`.",
    )
    augment: BatchAugment | None = Field(
        default=None, description="Random crops and flips of whole batches (default: none)."
    )
    timm_augment: TimmAugment | None = Field(
        default=None,
        description="timm's augmentations of single images, instead of `augment` (default: none).",
    )
    joint_augment: JointAugment | None = Field(
        default=None,
        description="Augmentation of images together with targets such as masks (default: none).",
        json_schema_extra=LATER,
    )
    repeats: int = Field(
        default=1,
        gt=0,
        le=COUNT,
        description=(
            "Repeated augmentation: number of differently augmented copies of an image, side by"
            " side in an epoch, which keeps its length and so shows 1/`repeats` of the images."
        ),
        json_schema_extra=LATER,
    )
    sampling: Literal["all", "balanced"] = Field(
        default="all",
        description=(
            "Sampling of an epoch. all: every image once; balanced: every class equally often, in"
            " an epoch of the same length (large classes are subsampled, small ones repeated with"
            " further augmentations)."
        ),
        json_schema_extra=LATER,
    )
    drop_last: bool = Field(
        default=True, description="Drop the last batch of an epoch if it is incomplete."
    )
    unlabelled: UnlabelledSpec | None = Field(
        default=None,
        description="Unlabelled samples beside the labelled ones in each batch (default: none).",
        json_schema_extra=LATER,
    )
    workers: int = Field(
        default=2,
        ge=0,
        le=1024,
        description="Worker processes that load and augment images that are not in memory.",
        json_schema_extra=BOOKKEEPING,
    )

    @model_validator(mode="after")
    def _one_of(self) -> DataSpec:
        if self.train_samples and self.train_fraction:
            raise ValueError("give train_samples or train_fraction, not both")
        if self.augment and self.timm_augment:
            raise ValueError("give augment or timm_augment, not both")
        if self.repeats > 1 and not (self.augment or self.timm_augment or self.joint_augment):
            raise ValueError(
                "repeats needs augment, timm_augment or joint_augment: without them an image's"
                " copies are all the same"
            )
        # both number the copies of an image, and both decide what an epoch shows
        if self.repeats > 1 and self.sampling == "balanced":
            raise ValueError("give repeats or sampling: balanced, not both")
        return self

    @model_validator(mode="after")
    def _has_images(self) -> DataSpec:
        if self.synthetic_batches is None:
            return self
        about_images = {
            "train_samples": self.train_samples,
            "train_fraction": self.train_fraction,
            "validation": self.validation,
            "augment": self.augment,
            "timm_augment": self.timm_augment,
            "joint_augment": self.joint_augment,
            "repeats": self.repeats > 1,
            "sampling": self.sampling != "all",
            "unlabelled": self.unlabelled,
        }
        if asked := [key for key, value in about_images.items() if value]:
            raise ValueError(
                f"synthetic_batches: there are no training images; leave {', '.join(asked)} out"
            )
        return self

    @model_validator(mode="after")
    def _has_both(self) -> DataSpec:
        if self.unlabelled is None:
            return self
        if not 0 < self.labelled_size < self.batch_size:
            raise ValueError(
                f"unlabelled.share: {self.unlabelled.share:g} of {self.batch_size} samples leaves"
                " none of one kind in a batch"
            )
        # in an incomplete batch the shares would be others
        if not self.drop_last:
            raise ValueError("unlabelled needs drop_last: true, so that all batches have its share")
        return self

    @property
    def labelled_size(self) -> int:
        """Number of samples with labels in a training batch."""
        share = 0.0 if self.unlabelled is None else self.unlabelled.share
        return round((1 - share) * self.batch_size)

    @property
    def size(self) -> Size | None:
        """Height and width of measured images, if `image_size` is set."""
        side = self.image_size
        return (side, side) if isinstance(side, int) else side

    @property
    def repeating(self) -> str | None:
        """Name of the key that repeats images within an epoch, if one does."""
        if self.repeats > 1:
            return "repeats"
        return "sampling" if self.sampling == "balanced" else None
