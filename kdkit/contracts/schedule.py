"""What the author of a schedule implements and receives: Schedule, Stage, Lesson, and the usual
step.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from kdkit.contracts.model_source import ModelOptions
from kdkit.contracts.options import Options
from kdkit.contracts.records import Batch, Inputs, Outputs
from kdkit.errors import RunError, ShapeError


@dataclass(frozen=True)
class Lesson:
    """A student's answer and those it learns from on this batch.

    Attributes:
        student: what learns.
        teachers: what it learns from; a loss is averaged over them.
        weights: shares of the teachers in that average (None: equal ones).
        named: answers that a loss of the recipe may ask for by its `teacher:`, instead of the
            above.
        batch: the images of these answers, row by row (None: the whole batch).
        supervised: the lesson that losses on labels get instead of this one, where not every image
            has a teacher.
    """

    student: Outputs
    teachers: Sequence[Outputs] = ()
    weights: Sequence[float] | None = None
    named: Mapping[str, Outputs] = field(default_factory=dict)
    batch: Batch | None = None
    supervised: Lesson | None = None


class Model(Protocol):
    """A network that adapts its inputs and is observed at its tapped layers."""

    module: nn.Module

    def __call__(self, inputs: Inputs) -> Outputs: ...

    def freeze(self) -> Model:
        """Put it in eval mode without gradients, for good."""


class Models(Protocol):
    """Hands out the recipe's models."""

    def student(self, options: ModelOptions | None = None, taps: Sequence[str] = ()) -> Model:
        """A fresh, independent student: the recipe's, or one of the schedule's own options.

        `taps` are layers that the schedule itself reads in `Outputs.features`, beside those of the
        losses.
        """
        ...

    def teacher(self, name: str | None = None, epoch: int | None = None) -> Model:
        """A frozen teacher: the recipe's only one, or the one of that name; as it was after an
        epoch of its own training.
        """
        ...

    def teachers(self) -> Mapping[str, Model]:
        """All frozen teachers by name."""
        ...


Arrange = Callable[[Tensor, Tensor, int], Tensor]
"""From an epoch's images in random order (N,), their classes (N,) and the batch size to another
order (N,), some perhaps repeated.

Each process gets a contiguous share of every batch, so images that belong together must stand side
by side.
"""


@dataclass(frozen=True)
class Stage:
    """One stretch of training with a fixed set of students.

    Attributes:
        name: unique within the schedule, snake_case.
        students: the models that learn.
        step: who teaches whom on a batch; one lesson per student, in their order, then any of
            answers that only `parts` and several students make together: in those, losses that read
            layers do not count.
        after_step: called after each optimizer step.
        losses: names of the recipe's losses that count here (None: all); a mapping gives them other
            weights than the recipe's.
        epochs: how long (None: the recipe's `train.epochs`).
        lr: learning rate before its schedule (None: the recipe's `train.optimizer.lr`).
        train: what learns (None: everything): `student`, a layer of it (`student.layer1`,
            `student.stage2`), a loss's learnable parts by its name (`hint`), or one of them
            (`ft.paraphrasers`). All else is frozen for the stage, its batch norms included.
        buffers: frozen models that `after_step` or `after_epoch` changes (moving averages): saved
            and restored with the stage.
        after_epoch: called after the last step of each epoch.
        parts: what the schedule itself learns or remembers: its parameters learn beside the first
            student's, its buffers are saved.
        arrange: which images of an epoch come together (None: chance alone).
        views: augmentations of each image in a batch; those beyond the first are in `Batch.views`.
        company: models that are measured as an ensemble together with the students.
        teachers: for each student, whose network its losses may look into (none: the recipe's first
            teacher's).
        result: which student the stage leaves: the first, or the best by accuracy on validation
            after the last epoch.
        apart: in several processes, each trains students of its own on its share of every batch: no
            gradients are averaged, no statistics made equal. All are measured, each on the whole
            data; the first process's are exported. It goes on in as many processes only.
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
    company: Sequence[Model] = ()
    teachers: Sequence[Model] = ()
    result: Literal["first", "best"] = "first"
    apart: bool = False


class ScheduleOptions(Options):
    """Options of a schedule; subclass it as `Options` in the schedule."""


class Schedule(abc.ABC):
    """Who teaches whom, and when. It owns no loop and computes no loss."""

    name: ClassVar[str]
    scheme: ClassVar[Literal["none", "offline", "online", "self"]]
    needs_teacher: ClassVar[bool]
    students_teach: ClassVar[bool] = False
    """Whether students teach each other or later ones, so that losses read them at the teacher's
    layers too.
    """
    Options: ClassVar[type[ScheduleOptions]] = ScheduleOptions

    def __init__(self, options: ScheduleOptions) -> None:
        self.options = options

    @abc.abstractmethod
    def stages(self, models: Models) -> Iterator[Stage]:
        """Yield the stages in order. Code after a `yield` runs once that stage is trained (or
        restored).

        What the last stage leaves is the run's result.
        """


View = Callable[[Batch], Tensor]


def teach(
    student: Model, by: Sequence[Model] = (), views: Mapping[str, View] | None = None
) -> Callable[[Batch], Sequence[Lesson]]:
    """The usual step: one student, fixed teachers.

    Args:
        student: who learns.
        by: its teachers.
        views: further views of a batch's images, which all models answer together with the images
            themselves; what a model says of them is in `Outputs.views` under the same names. A view
            may hold several copies of each image.
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
    if len(shown) <= len(views):
        raise ShapeError("texts have no further views")
    answer, sizes = model(torch.cat(shown)), [len(images) for images in shown]
    own, *others = (
        answer.map(functools.partial(_rows, sizes=sizes, part=i)) for i in range(len(sizes))
    )
    return own.seen_beside(dict(zip(views, others, strict=True)))


def _rows(x: Tensor, sizes: Sequence[int], part: int) -> Tensor:
    return x.narrow(0, sum(sizes[:part]), sizes[part])


def turned(batch: Batch) -> Tensor:
    """Each image turned by 90, 180 and 270 degrees: (B, C, H, W) to (3B, C, H, W), all images at
    one angle, then at the next.
    """
    images = batch.inputs
    if not isinstance(images, Tensor):
        raise ShapeError("only images can be turned")
    return torch.cat([images.rot90(quarters, (2, 3)) for quarters in (1, 2, 3)])


def by_class(size: int) -> Arrange:
    """An arrangement that puts images of one class side by side in groups of `size`, the groups
    in random order.

    An epoch has each image once, but for classes whose number of images the size does not divide:
    their last group is filled up with images of other groups, and as many groups are left out as
    that makes too many.
    """

    def arrange(order: Tensor, classes: Tensor, batch_size: int) -> Tensor:
        if batch_size % size or len(order) % size:
            raise RunError(
                f"images come in groups of {size}, which must divide `data.batch_size`"
                f" ({batch_size}) and what an epoch has ({len(order)} images; `data.drop_last:"
                " true` leaves out what is over)"
            )
        sorted_places = classes.argsort(stable=True)
        counts = classes.bincount()[classes[sorted_places]]
        nth = torch.arange(len(order), device=order.device) - torch.searchsorted(
            classes[sorted_places], classes[sorted_places]
        )
        heads = (nth % size == 0).nonzero()  # (groups, 1)
        members = (
            heads
            - nth[heads]
            + (nth[heads] + torch.arange(size, device=order.device)) % counts[heads]
        )
        groups = sorted_places[members]
        return order[groups[groups[:, 0].argsort()][: len(order) // size].flatten()]

    return arrange
