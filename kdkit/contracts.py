"""What the author of a loss or a schedule implements and receives: Loss, Schedule, and what passes between them."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from kdkit.errors import ShapeError, TapError
from kdkit.layers import classifier_path, norm_path
from kdkit.loss_options import LossOptions
from kdkit.options import Options
from kdkit.parts import frozen_copy
from kdkit.providers import ModelOptions
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
    needs_views: ClassVar[Mapping[str, int]] = {}
    """The views it reads in `Outputs.views`, with how many copies of each image they hold; `setup` refuses outputs without them."""
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
    """A student's answer and those it learns from on this batch.

    Attributes:
        student: what learns.
        teachers: what it learns from; a loss is averaged over them.
        weights: shares of the teachers in that average (None: equal ones).
        named: answers that a loss of the recipe may ask for by its `teacher:`, instead of the above.
    """

    student: Outputs
    teachers: Sequence[Outputs] = ()
    weights: Sequence[float] | None = None
    named: Mapping[str, Outputs] = field(default_factory=dict)


class Model(Protocol):
    """A network that adapts its inputs and is observed at its tapped layers."""

    module: nn.Module

    def __call__(self, inputs: Inputs) -> Outputs: ...

    def freeze(self) -> Model:
        """Put it in eval mode without gradients, for good."""


class Models(Protocol):
    """Hands out the recipe's models."""

    def student(self, options: ModelOptions | None = None) -> Model:
        """A fresh, independent student: the recipe's, or one of the schedule's own options."""
        ...

    def teacher(self, name: str | None = None) -> Model:
        """A frozen teacher: the recipe's only one, or the one of that name."""
        ...

    def teachers(self) -> Mapping[str, Model]:
        """All frozen teachers by name."""
        ...


Arrange = Callable[[Tensor, Tensor, int], Tensor]
"""From an epoch's images in random order (N,), their classes (N,) and the batch size to another order (N,), some perhaps repeated.

Each process gets a contiguous share of every batch, so images that belong together must stand side by side."""


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
        buffers: frozen models that `after_step` or `after_epoch` changes (moving averages): saved and restored with the stage.
        after_epoch: called after the last step of each epoch.
        parts: what the schedule itself learns or remembers: its parameters learn beside the first student's, its buffers are saved.
        arrange: which images of an epoch come together (None: chance alone).
        views: augmentations of each image in a batch; those beyond the first are in `Batch.views`.
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
    after_epoch: Callable[[], None] = lambda: None
    parts: nn.Module | None = None
    arrange: Arrange | None = None
    views: int = 1


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


View = Callable[[Batch], Tensor]


def teach(student: Model, by: Sequence[Model] = (), views: Mapping[str, View] | None = None) -> Callable[[Batch], Sequence[Lesson]]:
    """The usual step: one student, fixed teachers.

    Args:
        student: who learns.
        by: its teachers.
        views: further views of a batch's images, which all models answer together with the images themselves; what a model says of them
            is in `Outputs.views` under the same names. A view may hold several copies of each image.
    """

    def step(batch: Batch) -> Sequence[Lesson]:
        shown = {name: view(batch) for name, view in (views or {}).items()}
        with torch.no_grad():
            teachers = [see(teacher, batch.inputs, shown).detach() for teacher in by]
        return [Lesson(see(student, batch.inputs, shown), teachers)]

    return step


def see(model: Model, inputs: Inputs, views: Mapping[str, Inputs]) -> Outputs:
    """A model's answer to images and to views of them, in one forward."""
    if not views:
        return model(inputs)
    shown = [images for images in (inputs, *views.values()) if isinstance(images, Tensor)]
    answer, sizes = model(torch.cat(shown)), [len(images) for images in shown]
    own, *others = (answer.map(functools.partial(_rows, sizes=sizes, part=i)) for i in range(len(sizes)))
    return replace(own, views=dict(zip(views, others, strict=True)))


def _rows(x: Tensor, sizes: Sequence[int], part: int) -> Tensor:
    return x.narrow(0, sum(sizes[:part]), sizes[part])


def turned(batch: Batch) -> Tensor:
    """Each image turned by 90, 180 and 270 degrees: (B, C, H, W) to (3B, C, H, W), all images at one angle, then at the next."""
    images = batch.inputs
    if not isinstance(images, Tensor):
        raise ShapeError("only images can be turned")
    return torch.cat([images.rot90(quarters, (2, 3)) for quarters in (1, 2, 3)])
