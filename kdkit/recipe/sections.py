"""The sections of a recipe, without the options that plugins add."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

from kdkit.contracts.dataset_source import DatasetOptions
from kdkit.contracts.loss_options import LossOptions
from kdkit.contracts.model_source import ModelOptions, RecipeTeacher
from kdkit.contracts.options import (
    BOOKKEEPING,
    COUNT,
    LATER,
    LONGEST_NAME,
    RUN_NAME,
    SIDE,
    TERM_NAME,
    Arguments,
    FolderPath,
    Options,
    Rampable,
    RecipePath,
)
from kdkit.contracts.schedule import ScheduleOptions
from kdkit.contracts.task import TaskOptions


class BatchAugment(Options):
    """Augmentation on whole batches, drawn independently for every image."""

    crop_padding: int = Field(
        default=0,
        ge=0,
        le=SIDE,
        description=(
            "Pad by that many pixels (zeros), then crop at a random place: shifts of up to so many"
            " pixels."
        ),
    )
    flip: float = Field(
        default=0.0, ge=0, le=1, description="Share of the images mirrored left to right."
    )


class TimmAugment(Options):
    """Augmentation by timm's `create_transform`, image by image, in worker processes.

    Erased rectangles and the borders of rotated images are filled as in timm for ImageNet's mean
    and deviation.
    """

    scale: tuple[float, float] | None = Field(
        default=None, description="RandomResizedCrop: range of the area (timm: 0.08 to 1)."
    )
    ratio: tuple[float, float] | None = Field(
        default=None, description="RandomResizedCrop: range of the aspect ratio (timm: 3/4 to 4/3)."
    )
    flip: float = Field(
        default=0.5, ge=0, le=1, description="Share of the images mirrored left to right."
    )
    vertical_flip: float = Field(
        default=0.0, ge=0, le=1, description="Share of the images mirrored top to bottom."
    )
    color_jitter: float | None = Field(
        default=None, ge=0, description="Strength of brightness, contrast and saturation jitter."
    )
    auto_augment: str | None = Field(
        default=None,
        description="A timm policy string, such as `rand-m7-mstd0.5` or `augmix-m5-w4`.",
    )
    random_erasing: float = Field(
        default=0.0, ge=0, le=1, description="Share of the images with a rectangle erased."
    )
    erasing_mode: Literal["const", "rand", "pixel"] = Field(
        default="pixel", description="What fills the rectangle."
    )
    interpolation: Literal["random", "bilinear", "bicubic"] = Field(
        default="random", description="How crops are resized."
    )


class DatasetEntry(DatasetOptions):
    """The dataset plugin that reads the samples."""

    use: str = Field(description="Name of a dataset plugin.")


def named(value: Any) -> Any:
    """Expand a plugin's name to the section that it abbreviates."""
    return {"use": value} if isinstance(value, str) else value


class TaskEntry(TaskOptions):
    """The task: the question that is asked of every sample."""

    use: str = Field(description="Name of a task plugin.")


class MetricEntry(Options):
    """A metric that is reported in addition to the task's scores; further keys are its
    arguments.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    use: str = Field(
        description=(
            "Name of a metric plugin, or of a torchmetrics class, such as `MulticlassCohenKappa`."
        )
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """Return all keys except `use`."""
        return dict(self.model_extra or {})


MetricOrName = Annotated[
    MetricEntry, BeforeValidator(named, json_schema_input_type=MetricEntry | str)
]


class DataSpec(Options):
    """The data for training and measuring."""

    dataset: DatasetEntry = Field(description="A dataset plugin and its options.")
    image_size: int | None = Field(
        default=None,
        gt=0,
        le=SIDE,
        description=(
            "Side of the square images that batches hold (default: the dataset's own size)."
        ),
    )
    crop_pct: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description=(
            "Share of the side that the central crop keeps when measuring, of images read one by"
            " one."
        ),
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        default="bilinear", description="How images are resized to `image_size`."
    )
    batch_size: int = Field(
        default=64, gt=0, le=COUNT, description="Images per step, over all processes together."
    )
    eval_batch_size: int = Field(
        default=256, gt=0, le=COUNT, description="Images per step when measuring, per process."
    )
    train_samples: int | None = Field(
        default=None,
        gt=0,
        le=1000 * COUNT,
        description="Train on so many images only, drawn by class shares and `data.seed`.",
    )
    train_fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Train on that share of the images only, drawn likewise.",
    )
    validation: float | int | None = Field(
        default=None,
        gt=0,
        description="Share (below 1) or number of training images set aside for validation.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="Which images `train_samples`, `train_fraction` and `validation` draw.",
    )
    augment: BatchAugment | None = Field(default=None, description="Batched crops and flips.")
    timm_augment: TimmAugment | None = Field(
        default=None, description="timm's augmentations, image by image (instead of `augment`)."
    )
    repeats: int = Field(
        default=1,
        gt=0,
        le=COUNT,
        description=(
            "Repeated augmentation: each image of an epoch comes so many times side by side, each"
            " time augmented differently. The epoch keeps its length, so that it shows that part of"
            " the images."
        ),
        json_schema_extra=LATER,
    )
    sampling: Literal["all", "balanced"] = Field(
        default="all",
        description=(
            "all: every image once an epoch. balanced: images of each class equally often, in an"
            " epoch of the same length; of a large class others in each epoch, of a small one the"
            " same again, in further augmentations."
        ),
        json_schema_extra=LATER,
    )
    drop_last: bool = Field(
        default=True, description="Leave out an epoch's last batch when it is not full."
    )
    workers: int = Field(
        default=2,
        ge=0,
        le=1024,
        description="Processes that load and augment images which are not held in memory.",
        json_schema_extra=BOOKKEEPING,
    )

    @model_validator(mode="after")
    def _one_of(self) -> DataSpec:
        if self.train_samples and self.train_fraction:
            raise ValueError("give train_samples or train_fraction, not both")
        if self.augment and self.timm_augment:
            raise ValueError("give augment or timm_augment, not both")
        if self.repeats > 1 and not self.augment and not self.timm_augment:
            raise ValueError(
                "repeats needs augment or timm_augment: without them an image's copies are all the"
                " same"
            )
        if self.repeats > 1 and self.sampling == "balanced":
            raise ValueError("give repeats or sampling: balanced, not both")
        return self

    @property
    def repeating(self) -> str | None:
        """Name of the key that repeats images within an epoch, if one does."""
        return (
            "repeats" if self.repeats > 1 else "sampling" if self.sampling == "balanced" else None
        )


class LossEntry(LossOptions):
    """One term of the objective."""

    use: str = Field(description="Name of a loss plugin.")
    name: str | None = Field(
        default=None,
        pattern=TERM_NAME,
        max_length=LONGEST_NAME,
        description="Name of the term in logs and stages (default: `use`).",
    )
    weight: Rampable = Field(
        default=1.0, ge=0, description="Multiplies this loss in the total; a number or a ramp."
    )
    teacher: str | None = Field(
        default=None,
        description=(
            "Of several teachers, the one that this loss looks at (default: all that teach)."
        ),
    )
    output: int = Field(
        default=0,
        ge=0,
        description=(
            "Of a student that gives several outputs while it is trained, the one that this loss"
            " takes for its predictions, counted from 0; layers may also be called `output1` and"
            " so on."
        ),
        json_schema_extra=LATER,
    )


class ScheduleEntry(ScheduleOptions):
    """The schedule: who teaches whom."""

    use: str = Field(description="Name of a schedule plugin.")


class OptimizerSpec(Options):
    """An optimizer of timm's factory."""

    name: str = Field(
        default="sgd",
        description="Any name that timm knows: sgd (Nesterov), momentum (plain), adamw, lamb...",
    )
    lr: float = Field(gt=0, description="Learning rate.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay.")
    momentum: float = Field(
        default=0.9, ge=0, lt=1, description="Momentum, where the optimizer has one."
    )
    decay_norm_and_bias: bool = Field(
        default=False,
        description="Decay normalisation parameters and biases too, as the CIFAR papers do.",
    )
    layer_decay: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Factor on the learning rate per layer, from the last to the first.",
    )
    args: Arguments = Field(default_factory=dict, description="Further arguments of the optimizer.")


class AdapterSpec(Options):
    """Optimizer group of the losses' learnable parts."""

    lr: float | None = Field(
        default=None, gt=0, description="Learning rate (default: the optimizer's)."
    )
    weight_decay: float | None = Field(
        default=None, ge=0, description="Weight decay (default: the optimizer's)."
    )


class LrScheduleSpec(Options):
    """A learning-rate schedule of timm's factory."""

    name: Literal["constant", "cosine", "tanh", "step", "multistep", "plateau", "poly"] = Field(
        default="cosine", description="Shape."
    )
    warmup_epochs: int = Field(
        default=0,
        ge=0,
        le=COUNT,
        description=(
            "Epochs of linear warm-up. One that is longer than the stage, with the cool-down, is"
            " shortened with it in proportion, so that both together take half of the stage."
        ),
    )
    warmup_lr: float = Field(
        default=1e-5, ge=0, description="Learning rate at the start of the warm-up."
    )
    cooldown_epochs: int = Field(
        default=0, ge=0, le=COUNT, description="Last epochs at `min_lr`, part of `train.epochs`."
    )
    min_lr: float = Field(default=0.0, ge=0, description="Learning rate at the end.")
    milestones: tuple[int, ...] = Field(
        default=(), description="multistep: epochs at which the rate is multiplied by `decay_rate`."
    )
    step_epochs: int = Field(default=30, gt=0, le=COUNT, description="step: epochs between decays.")
    decay_rate: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="step, multistep, plateau, poly (power): factor of a decay.",
    )
    patience: int = Field(
        default=10,
        ge=0,
        le=COUNT,
        description=(
            "plateau: epochs without improvement of the validation accuracy (without a validation"
            " split: training loss)."
        ),
    )

    def within(self, epochs: int) -> Self:
        """Return the same shape for a stage of `epochs` epochs, of which warm-up and cool-down take
        at most half if they are longer than it.
        """
        both = self.warmup_epochs + self.cooldown_epochs
        if both <= epochs:
            return self
        shorter = {
            key: getattr(self, key) * epochs // (2 * both)
            for key in ("warmup_epochs", "cooldown_epochs")
        }
        return self.model_copy(update=shorter)

    def shortened(self, stage: str, epochs: int) -> str | None:
        """Describe what `within` changes, in words; None if it changes nothing."""
        used = self.within(epochs)
        if used is self:
            return None
        lengths = f"warm-up and cool-down ({self.warmup_epochs} + {self.cooldown_epochs} epochs)"
        shorter = f"they are shortened to {used.warmup_epochs} + {used.cooldown_epochs}"
        return f"{lengths} are longer than the {epochs} of stage '{stage}': {shorter}"


class EmaSpec(Options):
    """Exponential moving average of the student's weights, which is then measured and exported."""

    decay: float = Field(
        default=0.9999, gt=0, lt=1, description="Share of the old average kept at each step."
    )
    warmup: bool = Field(default=False, description="Begin with a small decay (timm's warm-up).")


class MixupSpec(Options):
    """timm's mixup and cutmix."""

    mixup_alpha: float = Field(default=0.0, ge=0, description="Mixup's alpha; 0 switches it off.")
    cutmix_alpha: float = Field(default=0.0, ge=0, description="Cutmix's alpha; 0 switches it off.")
    prob: float = Field(default=1.0, ge=0, le=1, description="Share of the batches that are mixed.")
    switch_prob: float = Field(
        default=0.5, ge=0, le=1, description="Share of cutmix where both are on."
    )
    mode: Literal["batch", "pair", "elem"] = Field(
        default="batch", description="How mixing is drawn."
    )
    off_epoch: int = Field(
        default=0, ge=0, le=COUNT, description="Epoch from which nothing is mixed; 0: never."
    )

    @model_validator(mode="after")
    def _something(self) -> MixupSpec:
        if not self.mixup_alpha and not self.cutmix_alpha:
            raise ValueError("one of mixup_alpha, cutmix_alpha must be above 0")
        return self


def _name_of_a_device(name: str) -> str:
    try:
        torch.device("cpu" if name == "auto" else name)
    except RuntimeError:
        known = "`auto` takes the accelerator there is, others are cpu, cuda, cuda:1, mps, xpu"
        raise ValueError(f"torch knows no device '{name}'; {known}") from None
    return name


Device = Annotated[str, AfterValidator(_name_of_a_device)]


class TrainSpec(Options):
    """Training of a student, whatever it learns from."""

    epochs: int = Field(gt=0, le=COUNT, description="Epochs per stage.")
    optimizer: OptimizerSpec = Field(description="Optimizer.")
    adapters: AdapterSpec = Field(
        default=AdapterSpec(), description="The optimizer's group of the losses' learnable parts."
    )
    lr_schedule: LrScheduleSpec = Field(
        default=LrScheduleSpec(), description="Learning-rate schedule."
    )
    ema: EmaSpec | None = Field(default=None, description="Moving average of the weights.")
    average_best: int | None = Field(
        default=None,
        gt=0,
        le=COUNT,
        description=(
            "Leave the mean of the weights of so many epochs, those of the last stage that are best"
            " on validation data, instead of the last epoch's weights. Needs `data.validation`;"
            " every epoch is measured."
        ),
        json_schema_extra=LATER,
    )
    patience: int | None = Field(
        default=None,
        gt=0,
        description=(
            "End a stage when its validation score has not improved for so many epochs. The last"
            " epoch's weights are left; with `average_best: 1`, the best epoch's. Needs"
            " `data.validation`."
        ),
        json_schema_extra=LATER,
    )
    mixup: MixupSpec | None = Field(default=None, description="Mixed images and labels.")
    clip_grad: float | None = Field(
        default=None, gt=0, description="Largest norm of the gradient of all parameters together."
    )
    accumulate: int = Field(default=1, gt=0, le=COUNT, description="Batches per optimizer step.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Precision of the students' forward pass (losses run in fp32)."
    )
    channels_last: Literal["auto", True, False] = Field(
        default="auto",
        description=(
            "Keep images and convolutions channels-last in memory; auto: on an accelerator only."
        ),
    )
    compile: bool = Field(default=False, description="Compile the networks with torch.compile.")
    device: Device = Field(
        default="auto",
        description=(
            "auto: the accelerator there is, else the processor; or a device by torch's name: cpu,"
            " cuda, cuda:1, mps..."
        ),
    )
    evaluate_every: int = Field(
        default=1,
        gt=0,
        le=COUNT,
        description="Epochs between measurements on validation and test data.",
    )


class RunSpec(Options):
    """The folder and the logging of a run; changes no result."""

    folder: FolderPath = Field(
        default=Path("runs"),
        description="Folder in which run folders are made (relative to the current one).",
    )
    checkpoint_epochs: int = Field(
        default=1, gt=0, le=COUNT, description="Epochs between checkpoints."
    )
    checkpoint_steps: int | None = Field(
        default=None,
        gt=0,
        le=COUNT,
        description="Optimizer steps between checkpoints inside an epoch.",
    )
    snapshots: int | None = Field(
        default=None,
        gt=0,
        le=COUNT,
        description=(
            "Epochs between snapshots: the student's weights on its way, kept in the run folder."
        ),
    )
    log_steps: int = Field(
        default=50, gt=0, le=COUNT, description="Optimizer steps between lines in metrics.jsonl."
    )
    trackers: tuple[str, ...] = Field(
        default=(),
        description="Accelerate trackers that also get the metrics: tensorboard, wandb...",
    )


class RecipeBase(Options):
    """A recipe: teacher, student, losses, schedule, data, training."""

    name: str = Field(
        pattern=RUN_NAME, max_length=LONGEST_NAME, description="Name of the run and of its folder."
    )
    plugins: tuple[RecipePath, ...] = Field(
        default=(), description="Plugin files or folders of your own."
    )
    seed: int = Field(default=0, ge=0, description="Everything random follows from it.")
    task: TaskEntry | None = Field(
        default=None,
        description="A task plugin, by name or with options (default: the one of the dataset).",
        json_schema_extra=LATER,
    )
    metrics: tuple[MetricOrName, ...] = Field(
        default=(),
        description=(
            "Numbers to tell beside the task's own: names of torchmetrics classes or of metric"
            " plugins, each alone or with arguments (`{use: NAME, ...}`)."
        ),
        json_schema_extra=BOOKKEEPING,
    )
    data: DataSpec
    teacher: ModelOptions | RecipeTeacher | None = Field(
        default=None, description="Who teaches; none for schedules without a teacher."
    )
    teachers: tuple[ModelOptions | RecipeTeacher, ...] = Field(
        default=(),
        description=(
            "Several teachers instead; `{recipe: FILE, seeds: [0, 1]}` is one recipe with several"
            " seeds."
        ),
    )
    student: ModelOptions
    schedule: ScheduleEntry
    losses: tuple[LossEntry, ...] = Field(min_length=1, description="total = sum of weight * loss")
    train: TrainSpec
    run: RunSpec = Field(
        default=RunSpec(), description="Bookkeeping.", json_schema_extra=BOOKKEEPING
    )

    @field_validator("teachers", mode="before")
    @classmethod
    def _one_for_each_seed(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "seeds" in value and isinstance(value["seeds"], list):
            rest = {key: part for key, part in value.items() if key != "seeds"}
            return [{**rest, "seed": seed} for seed in value["seeds"]]
        return value

    def all_teachers(self) -> dict[str, ModelOptions | RecipeTeacher]:
        """Return its teachers by name; a single one is called `teacher`."""
        if self.teacher is not None:
            return {"teacher": self.teacher}
        return {
            getattr(one, "name", None) or f"teacher{number}": one
            for number, one in enumerate(self.teachers, 1)
        }

    def place_of(self, teacher: str) -> list[str | int]:
        """Return the place of a teacher in the recipe."""
        return (
            ["teacher"]
            if self.teacher is not None
            else ["teachers", list(self.all_teachers()).index(teacher)]
        )
