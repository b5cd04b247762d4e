"""What the author of a loss or a schedule implements and receives: Loss, Schedule, and what passes between them."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from kdkit.errors import TapError
from kdkit.layers import classifier_path, norm_path
from kdkit.loss_options import LossOptions
from kdkit.options import Options
from kdkit.parts import frozen_copy
from kdkit.records import Batch, Inputs, Outputs


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

    def student_classifier(self) -> nn.Module:
        """The student's layer from embedding to logits itself: it learns. Keep it in a tuple, as it is the student's part, not the loss's.

        Raises:
            TapError: it has none, or several.
        """
        return self.student.get_submodule(classifier_path(self.student, self.num_classes))

    def teacher_classifier(self) -> nn.Module:
        """A frozen copy of the teacher's layer from embedding to logits.

        Raises:
            TapError: it has none, or several.
        """
        return frozen_copy(self._teacher().get_submodule(classifier_path(self._teacher(), self.num_classes)))

    def teacher_norm(self, layer: str) -> nn.Module:
        """The teacher's batch normalisation that a layer's values come from: the layer itself, or the last one in or before it.

        Raises:
            TapError: there is none.
        """
        return self._teacher().get_submodule(norm_path(layer, self._teacher()))

    def _teacher(self) -> nn.Module:
        if self.teacher is None:
            raise TapError("there is no teacher network to take a layer from")
        return self.teacher


class Loss(nn.Module, abc.ABC):
    """One term of the objective, unweighted: the recipe's `weight` multiplies it.

    Tensors arrive in fp32 (or fp64) with autocast off, the teacher's without gradient. A `Rampable` option is a plain float here.
    """

    name: ClassVar[str]
    knowledge: ClassVar[Literal["labels", "response", "feature", "relation"]]
    needs_teacher_logits: ClassVar[bool] = False
    """Whether a feature or relation loss also reads `teacher.logits` (response losses always may)."""
    needs_networks: ClassVar[bool] = False
    """Whether `setup` reads the networks of its context. `kdkit check` then runs real ones; batch norms are not folded away."""
    Options: ClassVar[type[LossOptions]] = LossOptions

    def __init__(self, options: LossOptions) -> None:
        super().__init__()
        self.options = options

    def setup(self, student: Outputs, teacher: Outputs, context: Context | None = None) -> None:
        """Build learnable parts, sized by a probe batch's outputs. Called once, before the optimizer exists.

        By itself it builds nothing, and looks whether the options can compare the two.

        Raises:
            ShapeError: the two cannot be compared.
        """
        self.options.check(student, teacher)

    @abc.abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The scalar loss."""

    def deploy(self, student: nn.Module) -> nn.Module:
        """The network that is measured and exported in the student's place: the student itself, unless the loss adds a part to it."""
        return student


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
        losses: names of the recipe's losses that count here (None: all); a mapping gives them other weights than the recipe's.
        epochs: how long (None: the recipe's `train.epochs`).
        lr: learning rate before its schedule (None: the recipe's `train.optimizer.lr`).
        train: what learns (None: everything): `student`, a layer of it (`student.layer1`, `student.stage2`), a loss's learnable parts by
            its name (`hint`), or one of them (`ft.paraphraser`). All else is frozen for the stage, its batch norms included.
        buffers: frozen models that `after_step` changes (moving averages): saved and restored with the stage.
    """

    name: str
    students: Sequence[Model]
    step: Callable[[Batch], Sequence[Lesson]]
    after_step: Callable[[], None] = lambda: None
    losses: Sequence[str] | Mapping[str, float] | None = None
    epochs: int | None = None
    lr: float | None = None
    train: Sequence[str] | None = None
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


View = Callable[[Tensor], Tensor]


def teach(student: Model, by: Sequence[Model] = (), views: Mapping[str, View] | None = None) -> Callable[[Batch], Sequence[Lesson]]:
    """The usual step: one student, fixed teachers.

    Args:
        student: who learns.
        by: its teachers.
        views: further views of the images that all models answer together with the images themselves; what a model says of them is in
            `Outputs.views` under the same names. A view may hold several copies of each image.
    """

    def step(batch: Batch) -> Sequence[Lesson]:
        with torch.no_grad():
            teachers = [see(teacher, batch.inputs, views or {}).detach() for teacher in by]
        return [Lesson(see(student, batch.inputs, views or {}), teachers)]

    return step


def see(model: Model, inputs: Inputs, views: Mapping[str, View]) -> Outputs:
    """A model's answer to images and their views, in one forward."""
    if not views or not isinstance(inputs, Tensor):
        return model(inputs)
    shown = [inputs, *(view(inputs) for view in views.values())]
    answer, sizes = model(torch.cat(shown)), [len(images) for images in shown]
    own, *others = (answer.map(functools.partial(_rows, sizes=sizes, part=i)) for i in range(len(sizes)))
    return replace(own, views=dict(zip(views, others, strict=True)))


def _rows(x: Tensor, sizes: Sequence[int], part: int) -> Tensor:
    return x.narrow(0, sum(sizes[:part]), sizes[part])


def turned(images: Tensor) -> Tensor:
    """Each image turned by 90, 180 and 270 degrees: (B, C, H, W) to (3B, C, H, W), all images at one angle, then at the next."""
    return torch.cat([images.rot90(quarters, (2, 3)) for quarters in (1, 2, 3)])
