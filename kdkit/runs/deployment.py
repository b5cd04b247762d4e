"""The network of a run some of whose losses put another in the student's place, built again
without training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.inputs import Shape, random_inputs
from kdkit.contracts.loss import Context, Loss
from kdkit.contracts.model_source import ModelOptions
from kdkit.contracts.records import Batch
from kdkit.engine import objective
from kdkit.errors import KdkitError
from kdkit.models.build import build_model, load_checkpoint
from kdkit.models.tapped import TappedModel
from kdkit.randomness import seeded
from kdkit.recipe import Recipe
from kdkit.recipe.types import source_of
from kdkit.runs.networks import ModelFactory, TrainedTeacher, options_of

PROBE = 4  # images, of which a schedule may compare only half
SAME = 0.01  # of the largest logit: more is another network, not another order of sums


def deploying(recipe: Recipe) -> list[str]:
    """Names of the losses that may put another network in the student's place."""
    pairs = zip(recipe.loss_names(), recipe.spec.losses, strict=True)
    return [
        name for name, entry in pairs if recipe.plugins.losses[entry.use].deploy is not Loss.deploy
    ]


def deployed(
    recipe: Recipe,
    info: DataInfo,
    trained: Mapping[str, TrainedTeacher],
    network: ModelOptions | None = None,
) -> TappedModel | None:
    """What the last stage leaves in the student's place, with random weights, in eval mode; None
    where that is the student itself.

    Args:
        recipe: of the run.
        info: of its data.
        trained: teachers by name, where other recipes trained them; their weights are not read.
        network: of several students, the one that is built from these options (None: the recipe's
            `student`).
    """
    if not (names := deploying(recipe)):
        return None
    factory = ModelFactory(recipe, info, trained, device=torch.device("cpu"), rehearsal=True)
    *_, stage = recipe.plugins.schedules[recipe.spec.schedule.use](recipe.spec.schedule).stages(
        factory
    )
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
        parts.setup(
            lesson,
            Context(
                student.module, factory.teaching(stage, number), info.num_classes, PROBE, labels
            ),
            teachers,
        )
        left = parts.deploy(student.module)
    return None if left is student.module else student.twin(left.eval())


def rebuilt(
    recipe: Recipe,
    info: DataInfo,
    trained: Mapping[str, TrainedTeacher],
    network: ModelOptions,
    file: Path,
    *,
    device: torch.device | None = None,
    channels_last: bool = False,
) -> TappedModel:
    """A run's student, built again from its file, in eval mode.

    Args:
        recipe: of the run.
        info: of its data.
        trained: teachers by name, where other recipes trained them; read only if a loss deploys a
            part of one.
        network: what it is built from.
        file: its weights.
        device: where it goes.
        channels_last: its memory format.

    Raises:
        ModelError: it cannot be built so; the weights do not fit.
    """
    if (model := deployed(recipe, info, trained, network)) is not None:
        load_checkpoint(file, model.module, num_classes=info.num_classes, own=True)
        model.module.to(device).to(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        model.adapt.to(device)
        model.channels_last = channels_last
        return model
    sources = recipe.plugins.models
    source, name = source_of(network.model, sources)
    model = build_model(
        network,
        sources[source](network, name),
        info.num_classes,
        info.image_shape,
        role="student",
        file=file,
        device=device,
        channels_last=channels_last,
    )
    model.module.eval()
    return model


def unreadable(again: Callable[[], TappedModel], student: TappedModel, shape: Shape) -> str:
    """Why a student that was written cannot be read again as it was measured; empty if it can,
    and gives the same logits.

    Args:
        again: builds it from its file, on its device.
        student: as it was measured.
        shape: of what batches hold.
    """
    try:
        with seeded("read again"):
            other = again()
    except KdkitError as error:
        return str(error).removeprefix("student: ")
    student.module.eval()
    device = next((value.device for value in student.module.parameters()), None)
    with torch.no_grad():
        ours, theirs = (
            model(random_inputs(shape, PROBE, device)).logits.float() for model in (student, other)
        )
    gap = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))
    return f"its logits would differ by {100 * gap:.2g} %" if gap > SAME else ""
