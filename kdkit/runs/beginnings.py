"""What networks begin with: a teacher's tensors, a compression, or another process that answers."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from kdkit.cache import served
from kdkit.contracts.model_source import ModelOptions
from kdkit.errors import ModelError
from kdkit.models.compressing import begun, refuse_device
from kdkit.models.inheritance import inherit
from kdkit.models.tapped import TappedModel
from kdkit.recipe import Recipe
from kdkit.runs import wanted
from kdkit.runs.progress import Reporter
from kdkit.runs.trained_teachers import TrainedTeacher


def inherited(
    recipe: Recipe,
    student: TappedModel,
    options: ModelOptions,
    donor: TappedModel,
    layers: Sequence[int] | None,
) -> list[str]:
    """Copy a teacher's tensors into a student; return their names.

    Raises:
        RecipeError: none fits.
    """
    source = recipe.model_source(options)
    rename = functools.partial(source.rename, module=student.module)
    try:
        return inherit(student.module, donor.module, layers, rename)
    except ModelError as error:
        place = [*wanted.place_of(recipe, "student", options), "init"]
        raise recipe.error(place, str(error)) from error


def compress(
    recipe: Recipe,
    student: TappedModel,
    options: ModelOptions,
    device: torch.device,
    *,
    channels_last: bool,
) -> None:
    """Put the network in a student's place that learns instead, where the recipe says so.

    Raises:
        RecipeError: it cannot be compressed, or not on this device.
    """
    if not (compressions := recipe.compressions(options)):
        return
    assert student.input_shape is not None
    try:
        refuse_device(compressions, device)
        module = begun(student.module.cpu(), student.input_shape, compressions)
    except ModelError as error:
        place = wanted.place_of(recipe, "student", options)
        raise recipe.error([*place], str(error)) from error
    student.module = module.to(device)
    if channels_last:
        student.module.to(memory_format=torch.channels_last)


def compresses(recipe: Recipe, trained: Mapping[str, TrainedTeacher]) -> bool:
    """Check whether a network of the recipe, or a teacher that another one trains, is
    compressed.
    """
    own = (options for _, options in recipe.spec.named_models())
    theirs = (teacher.options for teacher in trained.values())
    return any(recipe.compressions(options) for options in (*own, *theirs))


def served_teacher(
    recipe: Recipe,
    name: str,
    skeleton: nn.Module,
    layers: Sequence[str],
    outputs: int,
    *,
    needs_logits: bool,
) -> TappedModel:
    """Build a teacher that answers elsewhere: shapes and names of layers, without weights."""
    model = TappedModel(skeleton, layers, role=name, outputs=outputs)
    model.needs_logits = needs_logits
    model.elsewhere = served.ServedTeacher(recipe, name, model.role, Reporter().warn, outputs)
    return model.freeze()
