"""Computes the weighted sum of losses for one student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdkit.contracts.ensembles import with_logits
from kdkit.contracts.features import constants
from kdkit.contracts.loss import Context, Loss
from kdkit.contracts.loss_options import LayerPair
from kdkit.contracts.options import ramps_of
from kdkit.contracts.records import Batch, Outputs
from kdkit.contracts.schedule import Lesson
from kdkit.contracts.task import Task
from kdkit.errors import PluginError, ShapeError, TapError
from kdkit.recipe import Recipe
from kdkit.recipe.sections import LossEntry

Ramps = Mapping[tuple[str, str], Any]
"""Values of ramped options by (loss, option); in a step that is recorded, tensors."""


def no_teacher() -> Outputs:
    """Return the placeholder for the teacher of a loss on labels."""
    return Outputs.lacking(PluginError("a loss with knowledge 'labels' has no teacher to read"))


@dataclass(frozen=True)
class Value:
    """The losses of one lesson: the weighted total (with gradient), and each term unweighted and
    weighted (without gradient).
    """

    total: Tensor
    terms: Mapping[str, Tensor]
    weighted: Mapping[str, Tensor]
    samples: int  # in the batch


class _ByName(nn.ModuleDict):
    """Modules by any name, including names of `nn.Module` attributes, such as `half`."""

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module


class Objective(nn.Module):
    """total = sum of weight * loss; each loss is averaged over the lesson's teachers."""

    def __init__(
        self, losses: Mapping[str, tuple[LossEntry, Loss]], task: Task | None = None
    ) -> None:
        super().__init__()
        self.task = task
        self.losses = _ByName({name: loss for name, (_, loss) in losses.items()})
        self.entries = {name: entry for name, (entry, _) in losses.items()}
        self._ramps = {
            (name, option): ramp
            for name, entry in self.entries.items()
            for option, ramp in ramps_of(entry).items()
        }

    def setup(
        self,
        probe: Lesson,
        batch: Batch,
        context: Context,
        teachers: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Let each loss build its learnable parts.

        Args:
            probe: a lesson, whose first teacher determines the sizes of learnable parts.
            batch: the batch of the lesson.
            context: with the teacher's network, if all losses look at one.
            teachers: networks of teachers that losses may ask for by name.

        Raises:
            ShapeError, TapError: a loss cannot compare the two; begins with its name.
            PluginError: a loss took a network for one of its parts, which would train it (and save
                it) twice, or train the teacher.
        """
        probe = self._in_full_precision(probe)
        for name, loss in self.active(probe).items():
            read = self._read(name, probe, batch)
            network = (teachers or {}).get(self.entries[name].teacher or "", context.teacher)
            networks = {
                id(p)
                for part in (context.student, network)
                if part is not None
                for p in part.parameters()
            }
            try:
                loss.setup(
                    read.student, self._teachers(name, read)[0], replace(context, teacher=network)
                )
                self._compare_teachers(name, loss, probe)
            except (ShapeError, TapError) as error:
                raise type(error)(f"{name}: {error}") from None
            if any(id(p) in networks for p in loss.parameters()):
                raise PluginError(
                    f"{name}: holds a network of its context as its own part; keep a copy of what"
                    " it needs instead"
                )

    def _compare_teachers(self, name: str, loss: Loss, probe: Lesson) -> None:
        """Check that a loss can be averaged over the teachers: all must have the layer sizes of the
        first, which determine what the loss learns or remembers.

        Raises:
            ShapeError: layers of one name have several shapes.
        """
        teachers = (
            self._teachers(name, probe) if loss.knowledge != "labels" and loss.state_dict() else []
        )
        for layer in dict.fromkeys(pair.teacher for pair in loss.options.taps()):
            shapes = dict.fromkeys(
                tuple(teacher.features[layer].shape[1:])
                for teacher in teachers
                if layer in teacher.features
            )
            if len(shapes) > 1:
                raise ShapeError(
                    f"teacher layer '{layer}' is {' in one teacher, '.join(map(str, shapes))} in"
                    " another; say which of them this loss looks at: `teacher: NAME`"
                )

    def parts(self) -> dict[str, Loss]:
        """The losses by name."""
        return {name: loss for name, loss in self.losses.items() if isinstance(loss, Loss)}

    def deploy(self, student: nn.Module) -> nn.Module:
        """Return the network that is measured and exported in the student's place, after every loss
        has deployed it.
        """
        for loss in self.parts().values():
            student = loss.deploy(student)
        return student

    def active(self, lesson: Lesson) -> dict[str, Loss]:
        """Return the losses that apply to a lesson: those on labels, and those whose teacher it
        has.
        """
        return {name: loss for name, loss in self.parts().items() if self._teachers(name, lesson)}

    def _read(self, name: str, lesson: Lesson, batch: Batch) -> Lesson:
        """Return a loss's view of the lesson and its batch: the student output that it reads takes
        the place of the logits, and logits or labels are split into rows.
        """
        read = self._own(name, lesson)
        is_on_rows = self.losses[name].knowledge in ("labels", "response")
        if self.task is None or type(self.task).rows is Task.rows or not is_on_rows:
            return read  # a row is a sample
        return by_rows(self.task, read, read.batch or batch)

    def _own(self, name: str, lesson: Lesson) -> Lesson:
        read = lesson.supervised or lesson if self.losses[name].knowledge == "labels" else lesson
        if not (number := self.entries[name].output):
            return read
        if (other := read.student.features.get(f"output{number}")) is None:
            raise ShapeError(f"{name}: this answer has no output {number} of the student's network")
        return replace(read, student=with_logits(read.student, other))

    def _teachers(self, name: str, lesson: Lesson) -> Sequence[Outputs]:
        """Return the answers that a loss learns from."""
        wanted = self.entries[name].teacher
        if self.losses[name].knowledge == "labels":
            return [no_teacher()]
        if wanted is None:
            return lesson.teachers
        return [lesson.named[wanted]] if wanted in lesson.named else []

    def _in_full_precision(self, lesson: Lesson) -> Lesson:
        """Return the lesson in full precision, every answer converted once for all losses; of the
        named answers, only those in use.
        """
        asked = {entry.teacher for entry in self.entries.values()}
        return replace(
            lesson,
            student=in_full_precision(lesson.student),
            teachers=[in_full_precision(teacher) for teacher in lesson.teachers],
            named={
                name: in_full_precision(teacher)
                for name, teacher in lesson.named.items()
                if name in asked
            },
            supervised=self._in_full_precision(lesson.supervised) if lesson.supervised else None,
        )

    def ramps(self, epoch: float) -> Ramps:
        """Return the values of all ramped options at a (fractional) epoch of the stage."""
        return {key: ramp.at(epoch) for key, ramp in self._ramps.items()}

    def forward(self, lesson: Lesson, batch: Batch, ramps: Ramps | None = None) -> Value:
        """Compute the losses of the lesson, with these values of ramped options (None: those at
        the beginning of the stage).
        """
        ramps = self.ramps(0.0) if ramps is None else ramps
        terms: dict[str, Tensor] = {}
        weighted: dict[str, Tensor] = {}
        with torch.autocast(lesson.student.logits.device.type, enabled=False):
            lesson = self._in_full_precision(lesson)
            for name, loss in self.active(lesson).items():
                now = {option: value for (whose, option), value in ramps.items() if whose == name}
                entry = self.entries[name]
                if now:
                    entry = entry.model_copy(update=now)
                loss.options = entry
                read = self._read(name, lesson, batch)
                values = [
                    loss(read.student, teacher, read.batch or batch)
                    for teacher in self._teachers(name, read)
                ]
                terms[name] = values[0] if len(values) == 1 else mean_of(values, lesson.weights)
                weighted[name] = terms[name] * entry.weight
        total = sum_of(weighted.values(), like=lesson.student.logits)
        return Value(
            total,
            {n: v.detach() for n, v in terms.items()},
            {n: v.detach() for n, v in weighted.items()},
            len(batch.labels),
        )


def by_rows(task: Task, lesson: Lesson, batch: Batch) -> Lesson:
    """Return the lesson with its answers and its batch split into the task's rows."""
    named = [*lesson.named]
    answers = [lesson.student, *lesson.teachers, *lesson.named.values()]
    (student, *others), batch = task.rows(answers, batch)
    count = len(lesson.teachers)
    return replace(
        lesson,
        student=student,
        teachers=others[:count],
        named=dict(zip(named, others[count:], strict=True)),
        batch=batch,
    )


def in_full_precision(outputs: Outputs) -> Outputs:
    """Convert half-precision tensors to fp32; fp32 and fp64 stay as they are."""
    return outputs.map(
        lambda value: value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    )


def mean_of(values: Sequence[Tensor], weights: Sequence[float] | Tensor | None) -> Tensor:
    """Return the mean of the values, weighted if there are shares."""
    stacked = torch.stack(list(values))
    if weights is None:
        return stacked.mean()
    shares = weights if isinstance(weights, Tensor) else constants(weights, like=stacked)
    return (stacked * shares.to(stacked)).sum() / shares.sum()


def sum_of(values: Iterable[Tensor], like: Tensor) -> Tensor:
    """Return the sum of the values; zero on the device of `like` if there are none."""
    return sum(values, start=torch.zeros((), device=like.device))


Expand = Callable[[Sequence[LayerPair], str | None, bool], Sequence[LayerPair]]


def _as_written(pairs: Sequence[LayerPair], teacher: str | None, own: bool) -> Sequence[LayerPair]:
    return pairs


def build(
    recipe: Recipe,
    only: Sequence[str] | Mapping[str, float] | None = None,
    expand: Expand = _as_written,
    *,
    layers: bool = True,
) -> Objective:
    """Build the recipe's objective, or that of the losses in `only`, with its weights if it has
    any.

    Args:
        recipe: the recipe that names the losses.
        only: names of the losses to use (None: all); a mapping gives them other weights.
        expand: expands globs in pairs of layers.
        layers: False omits losses that read layers.
    """
    weights = only if isinstance(only, Mapping) else {}
    losses = {}
    for name, entry in zip(recipe.loss_names(), recipe.spec.losses, strict=True):
        if (only is None or name in only) and (layers or not entry.taps()):
            loss = recipe.plugins.losses[entry.use]
            entry = _expanded(entry, expand, loss.knowledge == "labels")
            entry = entry.model_copy(update={"weight": weights[name]} if name in weights else {})
            losses[name] = (entry, loss(entry))
    return Objective(losses, recipe.task)


def _expanded(entry: LossEntry, expand: Expand, own: bool) -> LossEntry:
    return (
        entry.model_copy(update={"layers": tuple(expand(entry.taps(), entry.teacher, own))})
        if entry.taps()
        else entry
    )
