"""Rebuilds the deployed network of a run without training, if a loss replaces the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.inputs import Shape, random_inputs
from kdkit.contracts.loss import Loss
from kdkit.contracts.model_source import ModelOptions
from kdkit.contracts.records import Batch
from kdkit.engine.setup import rehearse
from kdkit.errors import KdkitError
from kdkit.models.build import build_model, load_checkpoint
from kdkit.models.tapped import TappedModel
from kdkit.randomness import seeded
from kdkit.recipe import Recipe
from kdkit.runs.networks import ModelFactory
from kdkit.runs.random_batches import PROBE
from kdkit.runs.trained_teachers import TrainedTeacher, options_of

SAME = 0.01  # relative to the largest logit: more than rounding, so another network


def deploying(recipe: Recipe) -> list[str]:
    """List the losses that may replace the student by another network."""
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
    """Build the network that the last stage deploys in the student's place, with random weights, in
    eval mode; None if that is the student itself.

    Args:
        recipe: of the run.
        info: of its data.
        trained: teachers by name, if other recipes trained them; their weights are not read.
        network: options of the student, if there are several (None: the recipe's `student`).
    """
    # Most recipes deploy nothing: their networks are not built here.
    if not (names := deploying(recipe)):
        return None
    factory = ModelFactory(recipe, info, trained, device=torch.device("cpu"), rehearsal=True)
    # The run's result is the student of its last stage; earlier ones are gone through for their
    # networks.
    *_, stage = recipe.plugins.schedules[recipe.spec.schedule.use](recipe.spec.schedule).stages(
        factory
    )
    # A loss that the last stage does not use deploys nothing.
    used = [
        name for name in names if stage.training.losses is None or name in stage.training.losses
    ]
    built = [options_of(recipe, factory.network(one)) for one in stage.students]
    # Peers of one architecture are the same network without weights: the first of them does.
    number = built.index(network) if network in built else 0
    student = stage.students[number]
    assert isinstance(student, TappedModel)
    index = torch.arange(PROBE)
    labels = recipe.task.random_targets(info, index)
    # seeded: loading a student must not change the caller's random state
    with torch.no_grad(), seeded("deployed"):
        # Other numbers for each view: equal ones would make losses on pairs of views degenerate.
        views = tuple(
            random_inputs(info.train_shape, PROBE, seed=i) for i in range(stage.data.views)
        )
        batch = Batch(views[0], labels, index, views[1:])
        tried = rehearse(recipe, factory, stage, batch, info, labels)
        lesson, parts = tried.lessons[number], tried.objective(number, used)
        if not parts.active(lesson):
            return None
        parts.setup(lesson, batch, tried.context(number), factory.teacher_modules())
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
    """Rebuild a run's student from its file, in eval mode.

    Args:
        recipe: of the run.
        info: of its data.
        trained: teachers by name, if other recipes trained them; read only if a loss deploys a part
            of a teacher.
        network: its options.
        file: its weights.
        device: its device.
        channels_last: its memory format.

    Raises:
        ModelError: it cannot be built so; the weights do not fit.
    """
    if (model := deployed(recipe, info, trained, network)) is not None:
        load_checkpoint(file, model.module, outputs=recipe.task.outputs(info), own=True)
        model.module.to(device).to(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        model.adapt.to(device)
        model.channels_last = channels_last
        return model
    model = build_model(
        network,
        recipe.model_source(network),
        recipe.task.outputs(info),
        info.image_shape,
        role="student",
        file=file,
        device=device,
        channels_last=channels_last,
        fields=info.fields,
        compressions=recipe.compressions(network),
    )
    model.module.eval()
    return model


def unreadable(again: Callable[[], TappedModel], student: TappedModel, shape: Shape) -> str:
    """Explain why a written student cannot be read back as it was measured; empty if it can, and
    gives the same logits.

    Args:
        again: rebuilds it from its file, on its device.
        student: the student in the form that was measured.
        shape: shape of a sample in a batch.
    """
    try:
        with seeded("read again"):
            other = again()
    except KdkitError as error:
        return str(error).removeprefix("student: ")
    student.module.eval()
    # A network without parameters is on no device.
    device = next((value.device for value in student.module.parameters()), None)
    with torch.no_grad():
        ours, theirs = (
            model(random_inputs(shape, PROBE, device)).logits.float() for model in (student, other)
        )
    # the clamp avoids 0 / 0 if all logits are 0
    gap = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))
    return f"its logits would differ by {100 * gap:.2g} %" if gap > SAME else ""
