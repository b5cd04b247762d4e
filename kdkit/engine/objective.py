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
from kdkit.contracts.missing_labels import HIDDEN_LABELS
from kdkit.contracts.options import ramps_of
from kdkit.contracts.records import Batch, Outputs
from kdkit.contracts.schedule import Lesson
from kdkit.contracts.survey import Survey
from kdkit.contracts.task import Task
from kdkit.errors import PluginError, ShapeError, TapError, suggest
from kdkit.recipe import Recipe
from kdkit.recipe.sections import LossEntry

Ramps = Mapping[tuple[str, str], Any]
"""Values of ramped options by (loss, option); in a step that is recorded, tensors."""


def no_teacher() -> Outputs:
    """Return the placeholder for the teacher of a loss on labels."""
    return Outputs.lacking(PluginError("a loss with knowledge 'labels' has no teacher to read"))


@dataclass(frozen=True)
class Value:
    """The losses of one lesson: the weighted total and each weighted term (with gradient), and each
    term unweighted (without).
    """

    total: Tensor
    terms: Mapping[str, Tensor]
    weighted: Mapping[str, Tensor]
    samples: int  # in the batch


def _several_teachers(network: nn.Module, survey: Survey) -> dict[str, Tensor]:
    """Refuse a survey, which is of one teacher, where a loss compares with several."""
    raise TapError(
        f"{survey.name} describes one teacher, and several teach; say which of them this loss looks"
        " at: `teacher: NAME`"
    )


def without_graph(value: Value) -> Value:
    """Return the values alone; their graphs keep the activations of a step alive."""
    weighted = {name: term.detach() for name, term in value.weighted.items()}
    return replace(value, total=value.total.detach(), weighted=weighted)


class Split(dict[tuple[bool, int, str | None], tuple[Lesson, Tensor | float]]):
    """The rows of a lesson's answers, and their weight among those of all processes, by the
    answers that they are of: only those with labels or all, the student's output, and the view.
    """


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
        split = Split()
        for name, loss in self.active(probe).items():
            read, _ = self._read(name, probe, batch, split)
            network = (teachers or {}).get(self.entries[name].teacher or "", context.teacher)
            networks = {
                id(p)
                for part in (context.student, network)
                if part is not None
                for p in part.parameters()
            }
            try:
                known = self._known(name, read, batch, replace(context, teacher=network), teachers)
                loss.setup(read.student, self._teachers(name, read)[0], known)
                self._compare_teachers(name, loss, probe)
            except (ShapeError, TapError) as error:
                # plugins name themselves, as their losses are used without a recipe too
                says = str(error).removeprefix(f"{loss.name}: ")
                raise type(error)(f"{name}: {says}") from None
            if any(id(p) in networks for p in loss.parameters()):
                raise PluginError(
                    f"{name}: holds a network of its context as its own part; keep a copy of what"
                    " it needs instead"
                )

    def _known(
        self,
        name: str,
        read: Lesson,
        batch: Batch,
        context: Context,
        teachers: Mapping[str, nn.Module] | None,
    ) -> Context:
        """Return the context without what a loss must not use."""
        networks = [*(teachers or {}).values()]
        # also where the answers of several are combined into one
        among = len(networks) > 1 and any(context.teacher is one for one in networks)
        several = among or len(self._teachers(name, read)) > 1
        if several and self.entries[name].teacher is None:
            context = replace(context, survey=_several_teachers)
        if batch.labelled is not None and self.parts()[name].knowledge != "labels":
            context = replace(context, labels=HIDDEN_LABELS)
        return context

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

    def keep_apart(self) -> None:
        """Let each process train a student of its own, on its own share of the batches."""
        for loss in self.parts().values():
            loss.shares_batches = False

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

    def _read(
        self, name: str, lesson: Lesson, batch: Batch, split: Split
    ) -> tuple[Lesson, Tensor | float]:
        """Return a loss's view of the lesson and its batch, and the weight of this process's rows.

        The student output that the loss reads takes the place of the logits, and logits or labels
        are split into rows. `split` keeps those: losses on the same answers see the same rows,
        which may be drawn. Of samples without labels, losses on labels see nothing, and others no
        label.
        """
        loss = self.parts()[name]
        is_of_labels = loss.knowledge == "labels"
        is_on_rows = (is_of_labels or loss.knowledge == "response") and not loss.whole_answers
        if self.task is None or type(self.task).rows is Task.rows or not is_on_rows:
            read = self._own(name, lesson, batch)
            return _without_labels(read, read.batch or batch), 1.0  # a row is a sample
        has_own = lesson.supervised is not None or batch.labelled is not None
        entry = self.entries[name]
        key = (is_of_labels and has_own, entry.output, entry.view)
        if key not in split:
            read = self._own(name, lesson, batch)
            shown = read.batch or batch
            read = by_rows(self.task, read, shown)
            index = (read.batch or batch).index
            share = loss.share(len(index), index.device)
            split[key] = _without_labels(read, shown), share
        return split[key]

    def _own(self, name: str, lesson: Lesson, batch: Batch) -> Lesson:
        is_of_labels = self.losses[name].knowledge == "labels"
        read = lesson.supervised or lesson if is_of_labels else lesson
        if (view := self.entries[name].view) is not None:
            read = of_view(name, read, view, len((read.batch or batch).index))
        if number := self.entries[name].output:
            if (other := read.student.features.get(f"output{number}")) is None:
                raise ShapeError(
                    f"{name}: this answer has no output {number} of the student's network"
                )
            read = replace(read, student=with_logits(read.student, other))
        return labelled_part(read, read.batch or batch) if is_of_labels else read

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
        split = Split()
        with torch.autocast(lesson.student.logits.device.type, enabled=False):
            lesson = self._in_full_precision(lesson)
            for name, loss in self.active(lesson).items():
                now = {option: value for (whose, option), value in ramps.items() if whose == name}
                entry = self.entries[name]
                if now:
                    entry = entry.model_copy(update=now)
                loss.options = entry
                read, share = self._read(name, lesson, batch, split)
                shown = read.batch or batch
                values = [
                    # a batch without a row that counts teaches nothing
                    loss(read.student, teacher, shown) if len(shown.index) else _nothing(read)
                    for teacher in self._teachers(name, read)
                ]
                value = values[0] if len(values) == 1 else mean_of(values, lesson.weights)
                terms[name] = value * share if isinstance(share, Tensor) else value
                weighted[name] = terms[name] * entry.weight
        total = sum_of(weighted.values(), like=lesson.student.logits)
        return Value(
            total,
            {n: v.detach() for n, v in terms.items()},
            weighted,
            len(batch.labels),
        )


def _nothing(lesson: Lesson) -> Tensor:
    """Return a loss of zero that depends on the student, as a backward pass requires."""
    return lesson.student.logits.sum() * 0.0


def of_view(name: str, lesson: Lesson, view: str, count: int) -> Lesson:
    """Return the lesson of a view: the student's answer to it, and the teachers', or their answers
    to the images themselves where they have not seen it.

    Raises:
        ShapeError: the student has not seen it, or it is not of `count` images.
    """
    views = lesson.student.views
    if view not in views:
        known = suggest(view, views) if views else "the schedule shows none"
        raise ShapeError(f"{name}: there is no view '{view}'; {known}")
    if (copies := len(views[view].logits)) != count:
        raise ShapeError(f"{name}: view '{view}' has {copies} images, of a batch of {count}")
    return replace(
        lesson,
        student=views[view],
        teachers=[teacher.views.get(view, teacher) for teacher in lesson.teachers],
        named={key: teacher.views.get(view, teacher) for key, teacher in lesson.named.items()},
    )


def labelled_part(lesson: Lesson, batch: Batch) -> Lesson:
    """Return the lesson of those samples of its batch that have labels, without teachers."""
    if batch.labelled is None:
        return lesson
    student = lesson.student.first(batch.labelled, len(batch.index))
    return Lesson(student, batch=batch.labelled_part())


def _without_labels(lesson: Lesson, shown: Batch) -> Lesson:
    """Return the lesson, perhaps split into rows, with labels that raise an error when they are
    read, if not all samples of its batch have some.
    """
    if shown.labelled is None:
        return lesson
    return replace(lesson, batch=replace(lesson.batch or shown, labels=HIDDEN_LABELS))


def by_rows(task: Task, lesson: Lesson, batch: Batch) -> Lesson:
    """Return the lesson with its answers and its batch split into the task's rows."""
    named = [*lesson.named]
    answers = [lesson.student, *lesson.teachers, *lesson.named.values()]
    # teachers that only give layers have nothing to split
    rows, batch = task.rows([answer for answer in answers if answer.has_logits], batch)
    coming = iter(rows)
    student, *others = [next(coming) if answer.has_logits else answer for answer in answers]
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
