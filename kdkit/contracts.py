"""What the author of a loss or a schedule implements and receives: Loss, Schedule, and the records between them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from kdkit.errors import ShapeError
from kdkit.options import Options

Inputs = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """One batch, before any normalisation.

    Attributes:
        inputs: images (B, C, H, W) in [0, 1], or a mapping of tensors (text).
        labels: class indices (B,), or shares of the classes (B, K) when inputs are mixed.
        index: the samples' places in the dataset's whole training part (B,), whatever subset is trained on.
    """

    inputs: Inputs
    labels: Tensor
    index: Tensor

    @property
    def classes(self) -> Tensor:
        """Class indices (B,); of a mixed sample, the class with the largest share."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(1)


@dataclass(frozen=True)
class Outputs:
    """One model's answer to one batch.

    Attributes:
        logits: scores before softmax, (B, K).
        features: what the tapped layers gave, by the layer names of the recipe.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Outputs:
        """The same record with every tensor changed."""
        return Outputs(change(self.logits), {name: change(value) for name, value in self.features.items()})

    def detach(self) -> Outputs:
        """The same values as constants."""
        return self.map(Tensor.detach)


class LayerPair(Options):
    """Which student layer learns from which teacher layer."""

    student: str = Field(description="Student layer: a `named_modules()` path, a glob, stage1..N, penultimate or logits.")
    teacher: str = Field(description="Teacher layer, named in the same ways.")


class LossOptions(Options):
    """Options of a loss; subclass it as `Options` in the loss."""

    def taps(self) -> Sequence[LayerPair]:
        """Layers whose outputs the loss reads; none unless it is a feature or relation loss."""
        return ()


class FeatureOptions(LossOptions):
    """Options of a loss that compares layers."""

    layers: tuple[LayerPair, ...] = Field(min_length=1, description="Student/teacher layer pairs to compare.")

    def taps(self) -> Sequence[LayerPair]:
        return self.layers

    def pairs(self, student: Outputs, teacher: Outputs) -> Iterator[tuple[Tensor, Tensor]]:
        """The features of each pair, (f_s, f_t)."""
        return ((student.features[pair.student], teacher.features[pair.teacher]) for pair in self.layers)


class RelationOptions(FeatureOptions):
    """Options of a loss that compares how the samples of a batch relate to each other: it reads one embedding a sample."""

    def embeddings(self, student: Outputs, teacher: Outputs) -> Iterator[tuple[Tensor, Tensor]]:
        """The embeddings of each pair, (B, D_s) and (B, D_t); larger features are flattened to that.

        Raises:
            ShapeError: a layer does not give something for each sample.
        """
        for layers, (f_s, f_t) in zip(self.layers, self.pairs(student, teacher), strict=True):
            if f_s.ndim < 2 or f_t.ndim < 2 or len(f_s) != len(f_t):
                raise ShapeError(
                    f"student '{layers.student}' {tuple(f_s.shape)} and teacher '{layers.teacher}' {tuple(f_t.shape)} must hold "
                    "something for each sample of the batch, (B, ...); any stage or 'penultimate' does"
                )
            yield f_s.flatten(1), f_t.flatten(1)


@dataclass(frozen=True)
class Context:
    """What a loss may need beyond two outputs when it is set up.

    Attributes:
        student, teacher: the networks themselves (teacher is None without one).
        num_classes: K.
        num_samples: one more than the largest `Batch.index`; 0 where images have none (a stream).
        labels: class by `Batch.index`, (num_samples,); -1 where an image is not trained on.
    """

    student: nn.Module
    teacher: nn.Module | None
    num_classes: int
    num_samples: int
    labels: Tensor


class Loss(nn.Module, abc.ABC):
    """One term of the objective, unweighted: the recipe's `weight` multiplies it.

    Tensors arrive in fp32 (or fp64) with autocast off, the teacher's without gradient. A `Rampable` option is a plain float here.
    """

    name: ClassVar[str]
    knowledge: ClassVar[Literal["labels", "response", "feature", "relation"]]
    needs_teacher_logits: ClassVar[bool] = False
    """Whether a feature or relation loss also reads `teacher.logits` (response losses always may)."""
    Options: ClassVar[type[LossOptions]] = LossOptions

    def __init__(self, options: LossOptions) -> None:
        super().__init__()
        self.options = options

    def setup(self, student: Outputs, teacher: Outputs, context: Context | None = None) -> None:
        """Build learnable parts, sized by a probe batch's outputs. Called once, before the optimizer exists.

        Raises:
            ShapeError: the two cannot be compared.
        """

    @abc.abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The scalar loss."""


@dataclass(frozen=True)
class Lesson:
    """A student's answer and those it learns from on this batch; a loss is averaged over the teachers."""

    student: Outputs
    teachers: Sequence[Outputs] = ()


class Model(Protocol):
    """A network that adapts its inputs and is observed at its tapped layers."""

    module: nn.Module

    def __call__(self, inputs: Inputs) -> Outputs: ...

    def freeze(self) -> Model:
        """Put it in eval mode without gradients, for good."""


class Models(Protocol):
    """Hands out the recipe's models; each call of `student` gives a fresh, independent one."""

    def student(self) -> Model: ...

    def teacher(self) -> Model: ...


@dataclass(frozen=True)
class Stage:
    """One stretch of training with a fixed set of students.

    Attributes:
        name: unique within the schedule, snake_case.
        students: the models that learn.
        step: who teaches whom on a batch; one lesson per student, in their order.
        after_step: called after each optimizer step.
        losses: names of the recipe's losses that count here (None: all).
        epochs: how long (None: the recipe's `train.epochs`).
        buffers: frozen models that `after_step` changes (moving averages): saved and restored with the stage.
    """

    name: str
    students: Sequence[Model]
    step: Callable[[Batch], Sequence[Lesson]]
    after_step: Callable[[], None] = lambda: None
    losses: Sequence[str] | None = None
    epochs: int | None = None
    buffers: Sequence[Model] = ()


class ScheduleOptions(Options):
    """Options of a schedule; subclass it as `Options` in the schedule."""


class Schedule(abc.ABC):
    """Who teaches whom, and when. It owns no loop and computes no loss."""

    name: ClassVar[str]
    scheme: ClassVar[Literal["none", "offline", "online", "self"]]
    needs_teacher: ClassVar[bool]
    Options: ClassVar[type[ScheduleOptions]] = ScheduleOptions

    def __init__(self, options: ScheduleOptions) -> None:
        self.options = options

    @abc.abstractmethod
    def stages(self, models: Models) -> Iterator[Stage]:
        """Yield the stages in order. Code after a `yield` runs once that stage is trained (or restored).

        The last stage's first student is the run's result.
        """


def teach(student: Model, by: Sequence[Model] = ()) -> Callable[[Batch], Sequence[Lesson]]:
    """The usual step: one student, fixed teachers."""

    def step(batch: Batch) -> Sequence[Lesson]:
        with torch.no_grad():
            teachers = [teacher(batch.inputs).detach() for teacher in by]
        return [Lesson(student(batch.inputs), teachers)]

    return step
