"""The sections of a recipe, without the options that plugins add."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
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

from kdkit.contracts.balance import BalanceOptions
from kdkit.contracts.data_distiller import DataDistillerOptions
from kdkit.contracts.loss_options import LossOptions
from kdkit.contracts.model_source import ModelOptions, RecipeTeacher
from kdkit.contracts.options import (
    BOOKKEEPING,
    COUNT,
    LATER,
    LONGEST_NAME,
    RUN_NAME,
    TERM_NAME,
    Arguments,
    FolderPath,
    Options,
    Rampable,
    RecipePath,
)
from kdkit.contracts.schedule import ScheduleOptions
from kdkit.contracts.task import TaskOptions
from kdkit.recipe.data_section import DataSpec
from kdkit.recipe.walk import Key, models_in


def named(value: Any) -> Any:
    """Expand a plugin's name to the section that it abbreviates."""
    return {"use": value} if isinstance(value, str) else value


class TaskEntry(TaskOptions):
    """The task: the question that is asked of every sample."""

    use: str = Field(description="Name of the task plugin.")


class MetricEntry(Options):
    """A metric in addition to the task's scores; further keys are its arguments."""

    # which arguments a torchmetrics class takes is known only when it is imported
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    use: str = Field(
        description="Metric plugin, or torchmetrics class such as `MulticlassCohenKappa`."
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """Return all keys except `use`."""
        return dict(self.model_extra or {})


MetricOrName = Annotated[
    MetricEntry, BeforeValidator(named, json_schema_input_type=MetricEntry | str)
]


class LossEntry(LossOptions):
    """One term of the objective."""

    use: str = Field(description="Name of the loss plugin.")
    name: str | None = Field(
        default=None,
        pattern=TERM_NAME,
        max_length=LONGEST_NAME,
        description="Name of the loss in logs and stages (default: `use`).",
    )
    weight: Rampable = Field(
        default=1.0, ge=0, description="Weight of the loss in the total; a number or a ramp."
    )
    teacher: str | None = Field(
        default=None,
        description="Name of the teacher to compare with (default: all teachers of the stage).",
    )
    output: int = Field(
        default=0,
        ge=0,
        description=(
            "Index, from 0, of the student's output to use as its predictions, for networks with"
            " several outputs in training; layers can also be named `output1` and so on."
        ),
        json_schema_extra=LATER,
    )
    view: str | None = Field(
        default=None,
        description=(
            "View of the images that the schedule shows (`attacked`): the loss compares the answers"
            " to it; a teacher that has not seen it is taken by its answer to the images."
        ),
        json_schema_extra=LATER,
    )


def names_of(losses: Iterable[LossEntry]) -> list[str]:
    """List the names of losses: `name`, or `use` (numbered if it is repeated)."""
    names: list[str] = []
    for entry in losses:
        name = called = entry.name or entry.use
        numbers = itertools.count(2)
        while name in names:
            name = f"{called}_{next(numbers)}"
        names.append(name)
    return names


class ScheduleEntry(ScheduleOptions):
    """The schedule: who teaches whom."""

    use: str = Field(description="Name of the schedule plugin.")


class BalanceEntry(BalanceOptions):
    """How the gradients of the losses are combined."""

    use: str = Field(description="Name of the balance plugin.")


class DistillerEntry(DataDistillerOptions):
    """How `kdkit distill-data` makes a few images that stand for the dataset."""

    use: str = Field(description="Name of the distiller plugin.")


class OptimizerSpec(Options):
    """An optimizer of timm's factory."""

    name: str = Field(
        default="sgd",
        description="timm optimizer: sgd (Nesterov), momentum (plain momentum), adamw, lamb...",
    )
    lr: float = Field(gt=0, description="Learning rate.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay.")
    momentum: float = Field(
        default=0.9, ge=0, lt=1, description="Momentum, for optimizers that have one."
    )
    decay_norm_and_bias: bool = Field(
        default=False,
        description="Apply weight decay to norm parameters and biases, as the CIFAR papers do.",
    )
    layer_decay: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Learning-rate factor per layer, from the last to the first (default: none).",
    )
    args: Arguments = Field(default_factory=dict, description="Further arguments of the optimizer.")


class AdapterSpec(Options):
    """Optimizer settings of the losses' learnable parts."""

    lr: float | None = Field(
        default=None, gt=0, description="Learning rate (default: the optimizer's)."
    )
    weight_decay: float | None = Field(
        default=None, ge=0, description="Weight decay (default: the optimizer's)."
    )


class LrScheduleSpec(Options):
    """A learning-rate schedule of timm's factory."""

    name: Literal["constant", "cosine", "tanh", "step", "multistep", "plateau", "poly"] = Field(
        default="cosine", description="Shape of the learning-rate curve."
    )
    warmup_epochs: int = Field(
        default=0,
        ge=0,
        le=COUNT,
        description=(
            "Epochs of linear warm-up. If warm-up and cool-down are longer than the stage, both are"
            " shortened in proportion to half of it."
        ),
    )
    warmup_lr: float = Field(
        default=1e-5, ge=0, description="Learning rate at the start of the warm-up."
    )
    cooldown_epochs: int = Field(
        default=0,
        ge=0,
        le=COUNT,
        description="Final epochs at `min_lr`, included in `train.epochs`.",
    )
    min_lr: float = Field(default=0.0, ge=0, description="Final learning rate.")
    milestones: tuple[int, ...] = Field(default=(), description="Epochs of the decays (multistep).")
    step_epochs: int = Field(
        default=30, gt=0, le=COUNT, description="Epochs between decays (step)."
    )
    decay_rate: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="Factor of each decay (step, multistep, plateau), or the exponent (poly).",
    )
    patience: int = Field(
        default=10,
        ge=0,
        le=COUNT,
        description=(
            "Epochs without an improvement of the validation score, or of the training loss without"
            " validation data, before a decay (plateau)."
        ),
    )

    def within(self, epochs: int) -> Self:
        """Fit warm-up and cool-down to a stage: longer ones take half of it."""
        both = self.warmup_epochs + self.cooldown_epochs
        # half of the stage: otherwise a short trial of a long recipe would only warm up
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
        default=0.9999, gt=0, lt=1, description="Decay of the average per optimizer step."
    )
    warmup: bool = Field(default=False, description="Increase the decay from 0 (timm's warm-up).")


class MixupSpec(Options):
    """timm's mixup and cutmix."""

    mixup_alpha: float = Field(default=0.0, ge=0, description="Alpha of mixup; 0: no mixup.")
    cutmix_alpha: float = Field(default=0.0, ge=0, description="Alpha of cutmix; 0: no cutmix.")
    prob: float = Field(default=1.0, ge=0, le=1, description="Probability of mixing a batch.")
    switch_prob: float = Field(
        default=0.5, ge=0, le=1, description="Probability of cutmix if both are used."
    )
    mode: Literal["batch", "pair", "elem"] = Field(
        default="batch", description="Draw the mixing per batch, per pair of images, or per image."
    )
    off_epoch: int = Field(
        default=0, ge=0, le=COUNT, description="Epoch from which mixing is off; 0: never off."
    )

    @model_validator(mode="after")
    def _something(self) -> MixupSpec:
        if not self.mixup_alpha and not self.cutmix_alpha:
            raise ValueError("one of mixup_alpha, cutmix_alpha must be above 0")
        return self


def _name_of_a_device(name: str) -> str:
    # torch knows names of devices that this machine lacks; whether it has one is checked later
    try:
        torch.device("cpu" if name == "auto" else name)
    except RuntimeError:
        known = "`auto` takes the accelerator there is, others are cpu, cuda, cuda:1, mps, xpu"
        raise ValueError(f"torch knows no device '{name}'; {known}") from None
    return name


Device = Annotated[str, AfterValidator(_name_of_a_device)]


class TrainSpec(Options):
    """Training of a student."""

    epochs: int = Field(gt=0, le=COUNT, description="Epochs per stage.")
    optimizer: OptimizerSpec = Field(description="Optimizer and its settings.")
    adapters: AdapterSpec = Field(
        default=AdapterSpec(), description="Optimizer settings of the losses' learnable parts."
    )
    lr_schedule: LrScheduleSpec = Field(
        default=LrScheduleSpec(), description="Learning-rate schedule."
    )
    ema: EmaSpec | None = Field(
        default=None, description="Moving average of the weights (default: none)."
    )
    average_best: int | None = Field(
        default=None,
        gt=0,
        le=COUNT,
        description=(
            "Number of the last stage's best epochs, by validation score, whose mean weights are"
            " the result (default: the last epoch's weights). Needs `data.validation`; every epoch"
            " is measured."
        ),
        json_schema_extra=LATER,
    )
    patience: int | None = Field(
        default=None,
        gt=0,
        description=(
            "Early stopping: end a stage after that number of epochs without a better validation"
            " score. The result is the last epoch's weights, or with `average_best: 1` the best"
            " epoch's. Needs `data.validation`."
        ),
        json_schema_extra=LATER,
    )
    mixup: MixupSpec | None = Field(
        default=None, description="Mixup and cutmix of images and labels (default: none)."
    )
    clip_grad: float | None = Field(
        default=None, gt=0, description="Maximum norm of the whole gradient (default: no clipping)."
    )
    accumulate: int = Field(default=1, gt=0, le=COUNT, description="Batches per optimizer step.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Precision of the students' forward pass; losses are in fp32."
    )
    channels_last: Literal["auto", True, False] = Field(
        default="auto",
        description="Channels-last memory format of images and convolutions; auto: not on the CPU.",
    )
    compile: bool = Field(default=False, description="Compile the networks with torch.compile.")
    capture: Literal["auto", True, False] = Field(
        default="auto",
        description=(
            "Record the optimizer step once and launch it as a whole (a CUDA graph) instead of"
            " kernel by kernel; auto: on a CUDA device, where the stage allows it."
        ),
        json_schema_extra=BOOKKEEPING,
    )
    device: Device = Field(
        default="auto",
        description=(
            "Device by torch's name: cpu, cuda, cuda:1, mps...; auto: the accelerator, or the CPU"
            " if there is none."
        ),
    )
    evaluate_every: int = Field(
        default=1,
        gt=0,
        le=COUNT,
        description="Epochs between evaluations on validation and test data.",
    )


class RunSpec(Options):
    """The folder and the logging of a run; none of it changes the result."""

    folder: FolderPath = Field(
        default=Path("runs"),
        description="Parent of the run folders, relative to the current folder.",
    )
    checkpoint_epochs: int = Field(
        default=1, gt=0, le=COUNT, description="Epochs between checkpoints."
    )
    checkpoint_steps: int | None = Field(
        default=None,
        gt=0,
        le=COUNT,
        description="Optimizer steps between checkpoints within an epoch (default: none).",
    )
    snapshots: int | None = Field(
        default=None,
        gt=0,
        le=COUNT,
        description="Epochs between snapshots of the student's weights (default: no snapshots).",
    )
    log_steps: int = Field(
        default=50, gt=0, le=COUNT, description="Optimizer steps between lines in metrics.jsonl."
    )
    trackers: tuple[str, ...] = Field(
        default=(),
        description="Accelerate trackers that also receive the metrics: tensorboard, wandb...",
    )


class RecipeBase(Options):
    """A recipe: teacher, student, losses, schedule, data, training."""

    name: str = Field(
        pattern=RUN_NAME, max_length=LONGEST_NAME, description="Name of the run and of its folder."
    )
    plugins: tuple[RecipePath, ...] = Field(
        default=(), description="Further plugin files or folders."
    )
    seed: int = Field(default=0, ge=0, description="Random seed of the run.")
    task: TaskEntry | None = Field(
        default=None,
        description="Task plugin, by name or with options (default: the dataset's task).",
        json_schema_extra=LATER,
    )
    metrics: tuple[MetricOrName, ...] = Field(
        default=(),
        description=(
            "Metrics in addition to the task's scores: torchmetrics classes or metric plugins, by"
            " name or with arguments (`{use: NAME, ...}`)."
        ),
        json_schema_extra=BOOKKEEPING,
    )
    decide_by: MetricOrName | None = Field(
        default=None,
        description=(
            "Score that chooses epochs, students and variants, and stands first: one of the task's"
            " or a metric as in `metrics` (default: the task's first)."
        ),
        json_schema_extra=LATER,
    )
    data: DataSpec
    teacher: ModelOptions | RecipeTeacher | None = Field(
        default=None, description="The teacher; none for schedules without a teacher."
    )
    teachers: tuple[ModelOptions | RecipeTeacher, ...] = Field(
        default=(),
        description=(
            "Several teachers, instead of `teacher`; `{recipe: FILE, seeds: [0, 1]}` is one recipe"
            " with several seeds."
        ),
    )
    student: ModelOptions
    schedule: ScheduleEntry
    losses: tuple[LossEntry, ...] = Field(
        min_length=1, description="Losses to minimise: the sum of weight * loss."
    )
    balance: BalanceEntry | None = Field(
        default=None,
        description=(
            "Balance of the losses by their gradients, which costs a backward pass for each"
            " (default: none, the weighted sum)."
        ),
        json_schema_extra=LATER,
    )
    distill_data: DistillerEntry | None = Field(
        default=None,
        description=(
            "What `kdkit distill-data` does with this recipe's dataset; training ignores it"
            " (default: nothing)."
        ),
        json_schema_extra=BOOKKEEPING,
    )
    train: TrainSpec
    run: RunSpec = Field(
        default=RunSpec(),
        description="Folder, checkpoints and logging; none of it changes the result.",
        json_schema_extra=BOOKKEEPING,
    )

    # before validation, as the type of a teacher has one seed
    @field_validator("teachers", mode="before")
    @classmethod
    def _one_for_each_seed(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "seeds" in value and isinstance(value["seeds"], list):
            rest = {key: option for key, option in value.items() if key != "seeds"}
            return [{**rest, "seed": seed} for seed in value["seeds"]]
        return value

    def loss_names(self) -> list[str]:
        """List the names of the losses: `name`, or `use` (numbered if it is repeated)."""
        return names_of(self.losses)

    def all_teachers(self) -> dict[str, ModelOptions | RecipeTeacher]:
        """Return its teachers by name; a single one is called `teacher`."""
        if self.teacher is not None:
            return {"teacher": self.teacher}
        return {
            getattr(teacher, "name", None) or f"teacher{number}": teacher
            for number, teacher in enumerate(self.teachers, 1)
        }

    def named_models(self) -> Iterable[tuple[Key, ModelOptions]]:
        """Yield every network that the recipe names, with its location; schedules may name peers
        and assistants.
        """
        return models_in(
            {
                "teacher": self.teacher,
                "teachers": self.teachers,
                "student": self.student,
                "schedule": self.schedule,
            }
        )

    def place_of(self, teacher: str) -> list[str | int]:
        """Return the place of a teacher in the recipe."""
        if self.teacher is not None:
            return ["teacher"]
        return ["teachers", list(self.all_teachers()).index(teacher)]
