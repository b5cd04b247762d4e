"""The weighted sum of losses for one student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kdkit.contracts.ensembles import with_logits
from kdkit.contracts.loss import Context, Loss
from kdkit.contracts.loss_options import LayerPair
from kdkit.contracts.options import at_epoch
from kdkit.contracts.records import Batch, Outputs
from kdkit.contracts.schedule import Lesson
from kdkit.errors import PluginError, ShapeError, TapError
from kdkit.recipe import Recipe
from kdkit.recipe.sections import LossEntry


def no_teacher() -> Outputs:
    """Stands where a loss on labels has no teacher."""
    return Outputs.lacking(PluginError("a loss with knowledge 'labels' has no teacher to read"))


@dataclass(frozen=True)
class Value:
    """What the losses of one lesson came to: the weighted total (with gradient), and each term
    unweighted and weighted (without).
    """

    total: Tensor
    terms: Mapping[str, Tensor]
    weighted: Mapping[str, Tensor]
    samples: int  # in the batch


class _ByName(nn.ModuleDict):
    """Modules by any name, also by that of something every module has, such as `half`."""

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module


class Objective(nn.Module):
    """total = sum of weight * loss; each loss is averaged over the lesson's teachers."""

    def __init__(self, losses: Mapping[str, tuple[LossEntry, Loss]]) -> None:
        super().__init__()
        self.losses = _ByName({name: loss for name, (_, loss) in losses.items()})
        self.entries = {name: entry for name, (entry, _) in losses.items()}

    def setup(
        self, probe: Lesson, context: Context, teachers: Mapping[str, nn.Module] | None = None
    ) -> None:
        """Let each loss build its learnable parts.

        Args:
            probe: a lesson, whose first teacher sizes what a loss learns.
            context: with the teacher's network, if all losses look at one.
            teachers: networks of teachers that losses may ask for by name.

        Raises:
            ShapeError, TapError: a loss cannot compare the two; begins with its name.
            PluginError: a loss took a network for one of its parts, which would train it (and save
                it) twice, or train the teacher.
        """
        probe = self._in_full_precision(probe)
        for name, loss in self.active(probe).items():
            student = self._read(name, probe).student
            network = (teachers or {}).get(self.entries[name].teacher or "", context.teacher)
            networks = {
                id(p)
                for part in (context.student, network)
                if part is not None
                for p in part.parameters()
            }
            try:
                loss.setup(
                    student, self._teachers(name, probe)[0], replace(context, teacher=network)
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
        """See that a loss can be averaged over the teachers: what it learns or remembers has the
        size of the first one's layers.

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
        """What is measured and exported in the student's place, as the losses have it."""
        for loss in self.parts().values():
            student = loss.deploy(student)
        return student

    def active(self, lesson: Lesson) -> dict[str, Loss]:
        """The losses that count for a lesson: those on labels, and those that have a teacher
        there.
        """
        return {name: loss for name, loss in self.parts().items() if self._teachers(name, lesson)}

    def _read(self, name: str, lesson: Lesson) -> Lesson:
        """The lesson that a loss gets, with the output of the student that it reads in the place
        of the logits.
        """
        read = lesson.supervised or lesson if self.losses[name].knowledge == "labels" else lesson
        if not (number := self.entries[name].output):
            return read
        if (other := read.student.features.get(f"output{number}")) is None:
            raise ShapeError(f"{name}: this answer has no output {number} of the student's network")
        return replace(read, student=with_logits(read.student, other))

    def _teachers(self, name: str, lesson: Lesson) -> Sequence[Outputs]:
        """The answers that a loss looks at."""
        wanted = self.entries[name].teacher
        if self.losses[name].knowledge == "labels":
            return [no_teacher()]
        if wanted is None:
            return lesson.teachers
        return [lesson.named[wanted]] if wanted in lesson.named else []

    def _in_full_precision(self, lesson: Lesson) -> Lesson:
        """The lesson as losses get it, every answer converted once for all of them; of those by
        name, the ones that are asked for.
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

    def forward(self, lesson: Lesson, batch: Batch, epoch: float = 0.0) -> Value:
        """Value the lesson at a (fractional) epoch of the stage, which sets every ramp."""
        terms: dict[str, Tensor] = {}
        weighted: dict[str, Tensor] = {}
        with torch.autocast(lesson.student.logits.device.type, enabled=False):
            lesson = self._in_full_precision(lesson)
            for name, loss in self.active(lesson).items():
                entry = at_epoch(self.entries[name], epoch)
                loss.options = entry
                read = self._read(name, lesson)
                values = [
                    loss(read.student, teacher, read.batch or batch)
                    for teacher in self._teachers(name, lesson)
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


def in_full_precision(outputs: Outputs) -> Outputs:
    """Half-precision tensors in fp32; fp32 and fp64 as they are."""
    return outputs.map(
        lambda value: value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    )


def mean_of(values: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    """Their mean, by shares where there are some."""
    stacked = torch.stack(list(values))
    return (
        stacked.mean()
        if weights is None
        else (stacked * stacked.new_tensor(list(weights))).sum() / sum(weights)
    )


def sum_of(values: Iterable[Tensor], like: Tensor) -> Tensor:
    """Their sum; zero, on the device of `like`, where there are none."""
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
    """The recipe's objective, or that of the losses called `only`, with its weights where it has
    any.

    Args:
        recipe: whose losses.
        only: names of those that count (None: all); a mapping gives them other weights.
        expand: writes globs out.
        layers: False leaves those out that read layers.
    """
    weights = only if isinstance(only, Mapping) else {}
    losses = {}
    for name, entry in zip(recipe.loss_names(), recipe.spec.losses, strict=True):
        if (only is None or name in only) and (layers or not entry.taps()):
            loss = recipe.plugins.losses[entry.use]
            entry = _expanded(entry, expand, loss.knowledge == "labels")
            entry = entry.model_copy(update={"weight": weights[name]} if name in weights else {})
            losses[name] = (entry, loss(entry))
    return Objective(losses)


def _expanded(entry: LossEntry, expand: Expand, own: bool) -> LossEntry:
    return (
        entry.model_copy(update={"layers": tuple(expand(entry.taps(), entry.teacher, own))})
        if entry.taps()
        else entry
    )
