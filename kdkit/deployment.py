"""The network of a run some of whose losses put another in the student's place, built again without training."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kdkit import objective
from kdkit.contracts import Context, Loss
from kdkit.factory import ModelFactory, TrainedTeacher
from kdkit.providers import DataInfo
from kdkit.randomness import seeded
from kdkit.recipe import Recipe
from kdkit.records import Batch
from kdkit.tapping import TappedModel

PROBE = 2  # images


def deploying(recipe: Recipe) -> list[str]:
    """Names of the losses that may put another network in the student's place."""
    pairs = zip(recipe.loss_names(), recipe.spec.losses, strict=True)
    return [name for name, entry in pairs if recipe.plugins.losses[entry.use].deploy is not Loss.deploy]


def deployed(recipe: Recipe, info: DataInfo, trained: Mapping[str, TrainedTeacher]) -> TappedModel | None:
    """What the last stage leaves in the student's place, with random weights, in eval mode; None where that is the student itself.

    Args:
        recipe: of the run.
        info: of its data.
        trained: teachers by name, where other recipes trained them; their weights are not read.
    """
    if not (names := deploying(recipe)):
        return None
    factory = ModelFactory(recipe, info, trained, device=torch.device("cpu"), rehearsal=True)
    *_, stage = recipe.plugins.schedules[recipe.spec.schedule.use](recipe.spec.schedule).stages(factory)
    used = [name for name in names if stage.losses is None or name in stage.losses]
    student = stage.students[0]
    assert isinstance(student, TappedModel)
    student.module.eval()
    index = torch.arange(PROBE)
    labels = index % info.num_classes
    with torch.no_grad(), seeded("deployed"):
        views = tuple(torch.rand(PROBE, *info.image_shape) for _ in range(stage.views))
        lesson = stage.step(Batch(views[0], labels, index, views[1:]))[0]
        parts = objective.build(recipe, used, factory.expand)
        if not parts.active(lesson):
            return None
        teachers = factory.teacher_modules()
        parts.setup(lesson, Context(student.module, next(iter(teachers.values()), None), info.num_classes, PROBE, labels), teachers)
        network = parts.deploy(student.module)
    return None if network is student.module else student.twin(network.eval())
