"""The last stage of each network of a recipe, by the name that losses know."""

from __future__ import annotations

import re

import torch

from kdkit.contracts.inputs import as_image, is_text
from kdkit.contracts.layer_rows import tappable_layers
from kdkit.contracts.model_source import ModelOptions, ModelSource, RecipeTeacher
from kdkit.data import sizes
from kdkit.recipe import Recipe, teacher_recipes

STAGE = re.compile(r"stage(\d+)")


def last_stages(recipe: Recipe) -> dict[str, str]:
    """Return `student_stage` and `teacher_stage`, the last stages of the student and of the first
    teacher.
    """
    spec = recipe.spec
    name, teacher = next(iter(spec.all_teachers().items()))
    by = teacher_recipes(spec)[name] if isinstance(teacher, RecipeTeacher) else recipe
    taught = by.spec.student if isinstance(teacher, RecipeTeacher) else teacher
    return {
        "student_stage": _last_stage(recipe, spec.student),
        "teacher_stage": _last_stage(by, taught),
    }


def _last_stage(recipe: Recipe, options: ModelOptions) -> str:
    """Name the last stage of a network, or the classifier's input of one without stages."""
    builder: ModelSource = recipe.model_source(options)
    info = sizes.as_batched(recipe.spec.data, recipe.task, recipe.dataset().info())
    shape = info.image_shape
    if not is_text(shape):
        channels, *sides = as_image(shape)
        shape = (builder.in_channels(channels), *sides)
    # only names are asked for
    with torch.device("meta"):
        module = builder.build(recipe.task.outputs(info), shape)
    names = {alias for row in tappable_layers(module, shape) for alias in row.aliases}
    numbers = [int(found[1]) for alias in names if (found := STAGE.fullmatch(alias))]
    if numbers:
        return f"stage{max(numbers)}"
    return "penultimate" if "penultimate" in names else "logits"
