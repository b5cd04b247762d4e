"""Sets up a stage's trainer: its losses, by a probe batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdkit.contracts.loss import Context, Loss
from kdkit.contracts.loss_options import LayerPair
from kdkit.contracts.schedule import Model, Stage
from kdkit.data import loaders
from kdkit.engine import objective
from kdkit.engine.trainer import Trainer, batches
from kdkit.errors import RunError
from kdkit.models.weight_files import adopt_shapes
from kdkit.randomness import reseed
from kdkit.recipe import Recipe


class Networks(Protocol):
    """What the set-up of a stage asks of the recipe's networks."""

    def verify_finite(self) -> None:
        """Refuse a teacher whose answers so far are not finite."""

    def teacher_modules(self) -> Mapping[str, nn.Module]:
        """The teachers' networks by name, where they have one."""

    def teaching(self, stage: Stage, number: int = 0) -> nn.Module | None:
        """The network that teaches the stage's student of that number."""

    def expand(
        self, pairs: Sequence[LayerPair], teacher: str | None = None, own: bool = False
    ) -> list[LayerPair]:
        """The pairs of layers with globs written out."""


# of each student (and lesson beyond the students'), its losses so far by name
Carried = dict[tuple[Model, int], dict[str, Loss]]


def build_trainer(
    recipe: Recipe,
    prepared: loaders.Data,
    networks: Networks,
    accelerator: Accelerator,
    number: int,
    stage: Stage,
    carried: Carried | None = None,
) -> Trainer:
    """The trainer of the schedule's stage `number`, its losses set up by a probe batch.

    A loss that a student already had in an earlier stage goes on with what it has learnt: `carried`
    keeps them.
    """
    reseed(recipe.spec.seed, "setup", number)
    for student in stage.students:
        student.module.eval()  # a probe moves no statistics
    parts = stage.parts.to(accelerator.device) if stage.parts is not None else torch.nn.Module()
    remembered = copy.deepcopy(parts.state_dict())  # nor what the schedule remembers
    with torch.no_grad():
        lessons = stage.step(next(batches(prepared.train, stage, 0)))
    parts.load_state_dict(remembered)
    networks.verify_finite()
    labels = _labels_by_index(prepared.train)
    if len(lessons) < len(stage.students):
        raise RunError(
            f"stage '{stage.name}' gives {len(lessons)} lessons for {len(stage.students)} students"
        )
    if stage.apart and accelerator.num_processes > 1:
        _refuse_together(recipe, stage)
    objectives = []
    teachers = networks.teacher_modules()
    last = len(stage.students) - 1
    for i, lesson in enumerate(lessons):
        student = stage.students[i if i <= last else 0]
        built = objective.build(recipe, stage.losses, networks.expand, layers=i <= last)
        context = Context(
            student.module,
            networks.teaching(stage, min(i, last)),
            prepared.info.num_classes,
            len(labels),
            labels,
        )
        built.setup(lesson, context, teachers)
        before = (carried if carried is not None else {}).setdefault(
            (student, max(0, i - last)), {}
        )
        for name, loss in built.parts().items():
            if name in before:
                copied = {
                    key: p.detach() for key, p in loss.named_parameters() if not p.requires_grad
                }  # they come from this stage's teacher
                learnt = {**before[name].state_dict(), **copied}
                adopt_shapes(loss, learnt)
                loss.load_state_dict(learnt)
        before |= built.parts()
        objectives.append(built)
    return Trainer(
        stage,
        objectives,
        recipe.spec.train,
        prepared.train,
        accelerator,
        seed=recipe.spec.seed,
        maximize=prepared.validation is not None,
    )


def _refuse_together(recipe: Recipe, stage: Stage) -> None:
    """Say what processes that train students of their own cannot do.

    Raises:
        RecipeError: a loss would compare the answers of different networks.
        RunError: the stage leaves a student that only another process has.
    """
    for i, entry in enumerate(recipe.spec.losses):
        if getattr(entry, "gather", False):
            says = (
                f"in stage '{stage.name}' each process trains a student of its own, whose answers"
                " are not to be gathered into one batch"
            )
            raise recipe.error(["losses", i, "gather"], says)
    if stage.result != "first":
        raise RunError(
            f"stage '{stage.name}' trains apart, so it can only leave the first process's student"
        )


def _labels_by_index(loader: loaders.TrainLoader) -> Tensor:
    """Class by `Batch.index`, which counts images that are not trained on too: those have -1.
    Empty for a stream.
    """
    if not len(loader.indices):
        return loader.labels.cpu()
    labels = torch.full((int(loader.indices.max()) + 1,), -1)
    labels[loader.indices.cpu()] = loader.labels.cpu()
    return labels
