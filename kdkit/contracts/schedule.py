"""The interface of a schedule plugin: Schedule, Stage, Lesson, and the usual step."""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.model_source import ModelOptions
from kdkit.contracts.options import Options
from kdkit.contracts.records import Batch, Inputs, Outputs
from kdkit.contracts.task import Task
from kdkit.errors import RunError, ShapeError


@dataclass(frozen=True)
class Lesson:
    """A student's answer and the answers that it learns from, on one batch.

    Attributes:
        student: the answer that learns.
        teachers: answers that it learns from; a loss is averaged over them.
        weights: shares of the teachers in that average, (M,) (None: equal ones).
        named: answers that a loss of the recipe may ask for by its `teacher:`, instead of the
            above.
        batch: the images of these answers, row by row (None: the whole batch).
        supervised: the lesson that losses on labels get instead of this one, where not every image
            has a teacher.
    """

    student: Outputs
    teachers: Sequence[Outputs] = ()
    weights: Sequence[float] | Tensor | None = None
    named: Mapping[str, Outputs] = field(default_factory=dict)
    batch: Batch | None = None
    supervised: Lesson | None = None


class Model(Protocol):
    """A network that adapts its inputs and is observed at its tapped layers."""

    module: nn.Module

    def __call__(self, inputs: Inputs) -> Outputs: ...

    def freeze(self) -> Model:
        """Put it in eval mode without gradients, permanently."""


class Models(Protocol):
    """Hands out the recipe's models.

    Attributes:
        task: of the recipe; it combines several answers into one.
        info: of the data; `info.image_shape` is that of the batches.
    """

    task: Task
    info: DataInfo

    def student(self, options: ModelOptions | None = None, taps: Sequence[str] = ()) -> Model:
        """Build a fresh, independent student: the recipe's, or one of the schedule's own options.

        `taps` are layers that the schedule itself reads in `Outputs.features`, in addition to those
        of the losses.
        """
        ...

    def teacher(self, name: str | None = None, epoch: int | None = None) -> Model:
        """Return a frozen teacher: the recipe's only one, or the one of that name; `epoch` selects
        its weights after an epoch of its own training.
        """
        ...

    def teachers(self) -> Mapping[str, Model]:
        """Return all frozen teachers by name."""
        ...

    def differentiable(self, model: Model, taps: Sequence[str] = ()) -> Model:
        """Return a view of a model for gradients with respect to its images.

        Each call runs the network itself, up to its logits: no cache or run beside this one
        answers. `taps` are the layers in `Outputs.features`.

        Raises:
            TapError: there is no such layer.
        """
        ...


Arrange = Callable[[Tensor, Tensor, int], Tensor]
"""Maps an epoch's images in random order (N,), their groups (N,) (classes, see `Task.strata`)
and the batch size to another order (N,), possibly with repetitions. Each process gets a
contiguous share of every batch, so images that belong together must be adjacent.
"""


@dataclass(frozen=True)
class Moment:
    """Progress of a stage.

    Attributes:
        epoch: finished epochs.
        step: finished optimizer steps, including those of earlier epochs.
    """

    epoch: int
    step: int


START = Moment(0, 0)


class Step(Protocol):
    def __call__(self, batch: Batch, moment: Moment = START, /) -> Sequence[Lesson]: ...


class Hook(Protocol):
    def __call__(self, moment: Moment = START, /) -> None: ...


class Prepare(Protocol):
    def __call__(self, batch: Batch, moment: Moment = START, /) -> Batch: ...


class Stateful(Protocol):
    """A module, an optimizer, or another object whose state can be saved."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


Pictures = Callable[[], Mapping[str, Tensor]]
"""Returns images (N, C, H, W) in [0, 1] by the name of the picture that shows them together."""


def no_pictures() -> Mapping[str, Tensor]:
    """Return no pictures, as a stage that has none."""
    return {}


@dataclass(frozen=True)
class StageData:
    """Requirements of a stage on its batches.

    Attributes:
        views: augmentations of each image; those beyond the first are in `Batch.views`.
        arrange: decides which images of an epoch share a batch (None: random).
    """

    views: int = 1
    arrange: Arrange | None = None


@dataclass(frozen=True)
class StageTraining:
    """Length of a stage, the losses that it uses, and the parts that it trains.

    Attributes:
        losses: names of the recipe's losses that count (None: all); a mapping gives them other
            weights than the recipe's.
        epochs: number of epochs (None: the recipe's `train.epochs`).
        lr: learning rate before its schedule (None: the recipe's `train.optimizer.lr`).
        train: parts that learn (None: everything): `student`, a layer of it (`student.layer1`,
            `student.stage2`), a loss's learnable parts by its name (`hint`), or one of them
            (`ft.paraphrasers`). Everything else is frozen for the stage, including its batch norms.
    """

    losses: Sequence[str] | Mapping[str, float] | None = None
    epochs: int | None = None
    lr: float | None = None
    train: Sequence[str] | None = None


def nothing(moment: Moment = START, /) -> None:
    """Do nothing, as the hook of a stage that has none."""


@dataclass(frozen=True, init=False)
class Stage:
    """One phase of training with a fixed set of students.

    `prepare`, `step`, `after_step` and `after_epoch` receive the moment if they have a parameter
    `moment`, or one more parameter without a default than they otherwise need. The fields of `data`
    and `training` may also be given to the stage itself: `Stage(..., views=2, epochs=5)`.

    Attributes:
        name: unique within the schedule, snake_case.
        students: the models that learn.
        step: decides who teaches whom on a batch, at the moment before the step; returns one lesson
            per student, in their order, then further lessons about answers that `parts` and several
            students make together: losses that read layers are ignored in these.
        prepare: called before each optimizer step, outside of its forward, on each of its batches
            (several with `train.accumulate`); returns the batch that the step gets in place of the
            loader's, with as many samples. It may train objects of the schedule (`keeps`), but must
            leave no gradients in the students.
        after_step: called after each optimizer step, which the moment counts.
        after_epoch: called after the last step of each epoch, which the moment counts.
        data: requirements on the batches.
        training: its length, losses and trained parts.
        buffers: frozen models that `after_step` or `after_epoch` changes (moving averages): saved
            and restored with the stage.
        parts: the schedule's own learnable or stored tensors: the parameters are optimised by the
            first student's optimizer, the buffers are saved.
        keeps: objects of the schedule by name that `prepare` or the hooks change, such as a
            generator and its optimizer: saved and restored with the stage.
        pictures: called after each epoch; the images are drawn in the run's folder.
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
    step: Step
    prepare: Prepare | None
    after_step: Hook
    after_epoch: Hook
    data: StageData
    training: StageTraining
    buffers: Sequence[Model]
    parts: nn.Module | None
    keeps: Mapping[str, Stateful]
    pictures: Pictures
    company: Sequence[Model]
    teachers: Sequence[Model]
    result: Literal["first", "best"]
    apart: bool

    def __init__(
        self,
        name: str,
        students: Sequence[Model],
        step: Callable[[Batch], Sequence[Lesson]] | Callable[[Batch, Moment], Sequence[Lesson]],
        *,
        prepare: Callable[[Batch], Batch] | Callable[[Batch, Moment], Batch] | None = None,
        after_step: Callable[[], None] | Callable[[Moment], None] = nothing,
        after_epoch: Callable[[], None] | Callable[[Moment], None] = nothing,
        data: StageData | None = None,
        training: StageTraining | None = None,
        buffers: Sequence[Model] = (),
        parts: nn.Module | None = None,
        keeps: Mapping[str, Stateful] | None = None,
        pictures: Pictures = no_pictures,
        company: Sequence[Model] = (),
        teachers: Sequence[Model] = (),
        result: Literal["first", "best"] = "first",
        apart: bool = False,
        views: int | None = None,
        arrange: Arrange | None = None,
        losses: Sequence[str] | Mapping[str, float] | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        train: Sequence[str] | None = None,
    ) -> None:
        lessons = _told(step, 1)
        prepared = None if prepare is None else _told(prepare, 1)
        follow, close = _told(after_step, 0), _told(after_epoch, 0)
        more_data = _given(views=views, arrange=arrange)
        more_training = _given(losses=losses, epochs=epochs, lr=lr, train=train)
        vars(self).update(  # a frozen instance cannot be assigned to
            name=name,
            students=students,
            step=lambda batch, moment=START: lessons(batch, moment),
            prepare=prepared and (lambda batch, moment=START: prepared(batch, moment)),
            after_step=nothing if after_step is nothing else lambda moment=START: follow(moment),
            after_epoch=nothing if after_epoch is nothing else lambda moment=START: close(moment),
            data=replace(data or StageData(), **more_data),
            training=replace(training or StageTraining(), **more_training),
            buffers=buffers,
            parts=parts,
            keeps=keeps or {},
            pictures=pictures,
            company=company,
            teachers=teachers,
            result=result,
            apart=apart,
        )

    @property
    def has_hooks(self) -> bool:
        """True if code of the schedule runs between steps or epochs."""
        return self.after_step is not nothing or self.after_epoch is not nothing


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


T = TypeVar("T")


def _told(hook: Callable[..., T], others: int) -> Callable[..., T]:
    """Adapt a hook to a function of `others` arguments and the moment; the moment is passed on only
    if the hook takes it.
    """
    try:
        signature = inspect.signature(hook)
    except ValueError:  # some functions written in C have no signature
        return lambda *given: hook(*given[:others])
    parameters = signature.parameters.values()
    if "moment" in [p.name for p in parameters if p.kind != p.KEYWORD_ONLY][others : others + 1]:
        return hook
    if "moment" in signature.parameters:
        return lambda *given: hook(*given[:others], moment=given[others])
    try:
        signature.bind(*range(others))
    except TypeError:  # it needs one more argument: the moment
        return hook
    return lambda *given: hook(*given[:others])


class ScheduleOptions(Options):
    """Options of a schedule; subclass it as `Options` in the schedule."""


class Schedule(abc.ABC):
    """Decides who teaches whom, and when. It owns no loop and computes no loss."""

    name: ClassVar[str]
    scheme: ClassVar[Literal["none", "offline", "online", "self"]]
    needs_teacher: ClassVar[bool]
    tasks: ClassVar[Set[str] | Literal["any"]] = "any"
    """Names of the supported tasks, or the meaning of their rows (`classes`, `labels`,
    `numbers`).
    """
    needs_images: ClassVar[bool] = True
    """Whether it trains on images of the data; if not, its stages make their own (`prepare`)."""
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

        The networks that the last stage leaves are the run's result.
        """


View = Callable[[Batch], Tensor]


def teach(
    student: Model, by: Sequence[Model] = (), views: Mapping[str, View] | None = None
) -> Callable[[Batch], Sequence[Lesson]]:
    """Make the usual step: one student, fixed teachers.

    Args:
        student: the model that learns.
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
    """Return a model's answer to images and to views of them, from one forward."""
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
    """Rotate each image by 90, 180 and 270 degrees: (B, C, H, W) to (3B, C, H, W), all images at
    one angle, then at the next.
    """
    images = batch.inputs
    if not isinstance(images, Tensor):
        raise ShapeError("only images can be turned")
    return torch.cat([images.rot90(quarters, (2, 3)) for quarters in (1, 2, 3)])


def by_class(size: int) -> Arrange:
    """Make an arrangement that puts images of one class next to each other in groups of `size`, the
    groups in random order.

    An epoch has each image once, except for classes whose number of images is not divisible by the
    size: their last group is filled up with images of other groups, and the surplus is removed by
    leaving out whole groups.
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
