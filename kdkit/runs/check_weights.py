"""Checks of initial weights: checkpoints that fit, and weights that are random."""

from __future__ import annotations

from kdkit.contracts.model_source import (
    OWN_OUTPUTS,
    ModelSource,
)
from kdkit.errors import CheckpointError, ModelError, RecipeError
from kdkit.models.build import build_model, compare_checkpoint, random_weights
from kdkit.recipe import models_in
from kdkit.runs.networks import ModelFactory


def compare_checkpoints(factory: ModelFactory) -> list[str]:
    """Check whether the checkpoints that the recipe names fit their networks, by names and shapes;
    return notes on them.

    Raises:
        RecipeError: some do not, one a line.
    """
    spec = factory.recipe.spec
    problems = []
    notes = []
    sections = {
        "teacher": spec.teacher,
        "teachers": spec.teachers,
        "student": spec.student,
        "schedule": spec.schedule,
    }
    for place, options in models_in(sections):
        if options.checkpoint is None:
            continue
        source, shape = factory.source(options), factory.info.image_shape
        try:
            classes = (
                said
                if (said := getattr(options, OWN_OUTPUTS, None)) is not None
                else factory.info.outputs
            )
            built = build_model(options, source, classes, shape, weights=False)
            told = compare_checkpoint(options, source, built.module, classes)
        except ModelError as error:
            key = "checkpoint" if isinstance(error, CheckpointError) else "model"
            problems.append(
                factory.recipe.problem([*place, key], str(error).removeprefix("model: "))
            )
        else:
            notes += [f"{options.checkpoint.name}: {note}" for note in told]
    if problems:
        raise RecipeError("\n".join(problems))
    return notes


def random_parts(factory: ModelFactory, name: str) -> str:
    """Describe which weights of a teacher its network's options leave random; empty if it loads its
    own.
    """
    options = factory.teacher_options(name)
    assert options is not None
    source = factory.source(options)
    # the model has pretrained weights, but the recipe does not request them
    if type(source).load is not ModelSource.load:
        return "the weights"
    drawn, read = random_weights(source, factory.classes.own(name), factory.info.image_shape)
    return (
        f"some weights ({', '.join(drawn[:3])})"
        if drawn and read
        else "the weights"
        if drawn
        else ""
    )
