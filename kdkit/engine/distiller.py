"""A recipe's losses for a training loop that is not kdkit's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, create_model
from torch import Tensor, nn

from kdkit.contracts.layers import expand_pairs
from kdkit.contracts.loss import Context
from kdkit.contracts.options import Options
from kdkit.contracts.records import Batch, Inputs
from kdkit.contracts.schedule import Lesson
from kdkit.engine.objective import Objective, Value, by_rows
from kdkit.errors import PluginError, suggest
from kdkit.models.freezing import in_eval_mode
from kdkit.models.tapped import TappedModel
from kdkit.recipe import load, registry
from kdkit.recipe.explain import validated
from kdkit.recipe.sections import LossEntry, names_of
from kdkit.recipe.types import recipe_type


class Distiller(nn.Module):
    """A student and what it learns from, as one module for any training loop.

    `distiller(images, labels, epoch=3.5)` shows a batch to student and teachers and gives the
    weighted sum of the losses. `parameters()` are the student's and the losses' own (adapters);
    both are in `state_dict()`. Teachers are in neither, but follow `.to(...)`.

    The teachers answer in eval mode without gradients. Losses are computed in fp32. Images reach
    the networks as they are given: normalise them before, or inside of the networks.

    Args:
        student: the network that learns.
        teacher: the network that teaches, or several by name, or None. It is frozen; you may
            still change its weights, such as those of a moving average.
        losses: as in a recipe: mappings with `use`, `weight` and options; or the path of a recipe,
            whose losses are taken.
        images: a batch (B, C, H, W), or a mapping of tensors, from which sizes are determined.
        labels: its targets, in the task's form.
        task: name of the task, which gives labels their form (default: the recipe's, or
            `classification`).
        targets: target of each training sample by its index (N, ...), for losses that ask for it.
        plugins: further plugin files or folders.

    Attributes:
        student: the network that learns.
        objective: the losses.

    Raises:
        PluginError: a loss or an option is wrong.
        RecipeError: the recipe that `losses` names is wrong.
        ShapeError, TapError: a layer does not exist, or does not fit.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Mapping[str, nn.Module] | None,
        losses: Sequence[Mapping[str, Any]] | Path | str,
        images: Inputs,
        labels: Tensor,
        *,
        task: str | None = None,
        targets: Tensor | None = None,
        plugins: Sequence[Path | str] = (),
    ) -> None:
        super().__init__()
        entries, known, own_task = _read(losses, plugins)
        task = task or own_task
        if task not in known.tasks:
            raise PluginError(f"no task is called '{task}'; {suggest(task, known.tasks)}")
        networks = (
            teacher if isinstance(teacher, Mapping) else {"teacher": teacher} if teacher else {}
        )
        kinds = [known.losses[entry.use] for entry in entries]
        # both layers of a loss on labels are the student's
        read = [
            {} if kind.knowledge == "labels" else _read_by(entry, networks)
            for entry, kind in zip(entries, kinds, strict=True)
        ]
        entries = [
            _expanded(entry, student, theirs) for entry, theirs in zip(entries, read, strict=True)
        ]
        self.student = student
        self.objective = Objective(
            {
                name: (entry, kind(entry))
                for name, entry, kind in zip(names_of(entries), entries, kinds, strict=True)
            },
            known.tasks[task](),
        )
        layers: dict[str, list[str]] = {name: [] for name in networks}
        ours: list[str] = []
        for entry, theirs in zip(entries, read, strict=True):
            ours += [pair.student for pair in entry.taps()]
            ours += [f"output{entry.output}"] if entry.output else []
            for taps in [layers[name] for name in theirs] or [ours]:
                taps += [pair.teacher for pair in entry.taps()]
        # in tuples, where torch finds no modules
        self._observed = (TappedModel(student, dict.fromkeys(ours), role="student"),)
        self._teachers = tuple(
            (name, TappedModel(network, dict.fromkeys(layers[name]), role=name).freeze())
            for name, network in networks.items()
        )
        self._set_up(_batch(images, labels, None), targets)

    def _set_up(self, batch: Batch, targets: Tensor | None) -> None:
        with torch.no_grad(), in_eval_mode(self.student):
            lesson = self._lesson(batch)
        assert self.objective.task is not None
        outputs = by_rows(self.objective.task, lesson, batch).student.logits.shape[1]
        networks = {name: teacher.module for name, teacher in self._teachers}
        first = next(iter(networks.values()), None)
        known = batch.labels.new_empty(0) if targets is None else targets
        context = Context(self.student, first, outputs, len(known), known)
        self.objective.setup(lesson, batch, context, networks)

    def _lesson(self, batch: Batch) -> Lesson:
        with torch.no_grad():
            answers = {name: ask(batch.inputs).detach() for name, ask in self._teachers}
        return Lesson(self._observed[0](batch.inputs), [*answers.values()], named=answers)

    def forward(
        self, images: Inputs, labels: Tensor, *, epoch: float = 0.0, index: Tensor | None = None
    ) -> Value:
        """Compute the losses of a batch.

        Args:
            images: (B, C, H, W), or a mapping of tensors.
            labels: targets (B, ...) in the task's form.
            epoch: finished epochs, with their fraction: ramped options follow it.
            index: the samples' places in the training set (B,), for losses that remember something
                of each sample.

        Returns:
            `total`, the weighted sum, with gradients; `terms`, each loss unweighted, without.
        """
        batch = _batch(images, labels, index)
        value: Value = self.objective(self._lesson(batch), batch, self.objective.ramps(epoch))
        return value

    def deployed(self) -> nn.Module:
        """Return the network to export: the student, with what losses have given it for good."""
        return self.objective.deploy(self.student)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # teachers follow the student to its device
        for _, teacher in self._teachers:
            teacher.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved


def _batch(images: Inputs, labels: Tensor, index: Tensor | None) -> Batch:
    places = torch.arange(len(labels), device=labels.device) if index is None else index
    return Batch(images, labels, places)


def _read(
    losses: Sequence[Mapping[str, Any]] | Path | str, plugins: Sequence[Path | str]
) -> tuple[Sequence[LossEntry], registry.Registry, str]:
    """Return the entries of the losses, the plugins, and the name of the task."""
    files = tuple(Path(path).expanduser().resolve() for path in plugins)
    if isinstance(losses, str | Path):
        recipe = load(losses, plugins=files)
        return recipe.spec.losses, recipe.plugins, recipe.task.name
    known = registry.load(files)
    entries: Any = recipe_type(known).model_fields["losses"].annotation
    kind = create_model("Losses", __base__=Options, losses=(entries, Field(min_length=1)))
    given = {"losses": [dict(loss) for loss in losses]}
    found: Any = validated(kind, given, "Distiller", PluginError)
    return found.losses, known, "classification"


def _read_by(entry: LossEntry, networks: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """Return the teachers that a loss compares with.

    Raises:
        PluginError: there is none.
    """
    if not networks:
        raise PluginError(f"{entry.use}: needs a teacher")
    if entry.teacher is None:
        return networks
    if entry.teacher not in networks:
        says = suggest(entry.teacher, networks)
        raise PluginError(f"{entry.use}: no teacher is called '{entry.teacher}'; {says}")
    return {entry.teacher: networks[entry.teacher]}


def _expanded(entry: LossEntry, student: nn.Module, teachers: Mapping[str, nn.Module]) -> LossEntry:
    """Return the entry with the globs in its pairs of layers expanded: the teachers' layers are
    named as in the first one, or as in the student if there is none.
    """
    if not entry.taps():
        return entry
    pairs = expand_pairs(entry.taps(), student, next(iter(teachers.values()), student))
    return entry.model_copy(update={"layers": tuple(pairs)})
