"""The network of a run some of whose losses put another in the student's place, built again without training."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kdkit import objective
from kdkit.contracts import Context, Loss
from kdkit.dataset_source import DataInfo
from kdkit.factory import ModelFactory, TrainedTeacher, options_of
from kdkit.providers import ModelOptions
from kdkit.randomness import seeded
from kdkit.recipe import Recipe
from kdkit.records import Batch
from kdkit.shapes import random_inputs
from kdkit.tapping import TappedModel

PROBE = 4  # images, of which a schedule may compare only half


def deploying(recipe: Recipe) -> list[str]:
    """Names of the losses that may put another network in the student's place."""
    pairs = zip(recipe.loss_names(), recipe.spec.losses, strict=True)
    return [name for name, entry in pairs if recipe.plugins.losses[entry.use].deploy is not Loss.deploy]


def deployed(
    recipe: Recipe, info: DataInfo, trained: Mapping[str, TrainedTeacher], network: ModelOptions | None = None
) -> TappedModel | None:
    """What the last stage leaves in the student's place, with random weights, in eval mode; None where that is the student itself.

    Args:
        recipe: of the run.
        info: of its data.
        trained: teachers by name, where other recipes trained them; their weights are not read.
        network: of several students, the one that is built from these options (None: the recipe's `student`).
    """
    if not (names := deploying(recipe)):
        return None
    factory = ModelFactory(recipe, info, trained, device=torch.device("cpu"), rehearsal=True)
    *_, stage = recipe.plugins.schedules[recipe.spec.schedule.use](recipe.spec.schedule).stages(factory)
    used = [name for name in names if stage.losses is None or name in stage.losses]
    built = [options_of(recipe, factory.network(one)) for one in stage.students]
    number = built.index(network) if network in built else 0
    student = stage.students[number]
    assert isinstance(student, TappedModel)
    student.module.eval()
    index = torch.arange(PROBE)
    labels = index % info.num_classes
    with torch.no_grad(), seeded("deployed"):
        views = tuple(random_inputs(info.image_shape, PROBE, seed=i) for i in range(stage.views))
        lesson = stage.step(Batch(views[0], labels, index, views[1:]))[number]
        parts = objective.build(recipe, used, factory.expand)
        if not parts.active(lesson):
            return None
        teachers = factory.teacher_modules()
        parts.setup(lesson, Context(student.module, factory.teaching(stage, number), info.num_classes, PROBE, labels), teachers)
        left = parts.deploy(student.module)
    return None if left is student.module else student.twin(left.eval())
