"""Finds what the losses of a recipe read of its networks: layers, logits, the networks
themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kdkit.contracts.loss import Loss
from kdkit.contracts.loss_options import LayerPair
from kdkit.contracts.model_source import ModelOptions
from kdkit.errors import CheckpointError, InputError, RecipeError
from kdkit.recipe import Recipe, models_in
from kdkit.recipe.sections import LossEntry

Expand = Callable[[Sequence[LayerPair], str | None, bool], list[LayerPair]]
"""Expands globs: pairs, the teacher's name, whether both sides are the student's own."""


def looking_at(recipe: Recipe, teacher: str) -> list[LossEntry]:
    """List the losses that read a teacher."""
    return [entry for entry in recipe.spec.losses if entry.teacher in (None, teacher)]


def student_layers(recipe: Recipe, expand: Expand) -> list[str]:
    """List the layers that the losses read of a student: also those of teachers, if students
    teach.
    """
    schedule = recipe.plugins.schedules[recipe.spec.schedule.use]
    # Then an answer of a student stands on the teacher's side, with its layers.
    teaches = schedule.students_teach or not recipe.spec.all_teachers()
    names: list[str] = []
    for entry in recipe.spec.losses:
        own = _kind(recipe, entry).knowledge == "labels"
        for pair in expand(entry.taps(), entry.teacher, own):
            names += [pair.student, pair.teacher] if teaches or own else [pair.student]
        # Output 0 is the logits, which need no tap.
        names += [f"output{entry.output}"] if entry.output else []
    return list(dict.fromkeys(names))


def teacher_layers(recipe: Recipe, teacher: str, expand: Expand) -> list[str]:
    """List the layers that the losses read of a teacher."""
    entries = [
        # Both layers of a loss on labels are the student's.
        entry
        for entry in looking_at(recipe, teacher)
        if _kind(recipe, entry).knowledge != "labels"
    ]
    pairs = (pair for entry in entries for pair in expand(entry.taps(), teacher, False))
    return list(dict.fromkeys(pair.teacher for pair in pairs))


def needs_logits(recipe: Recipe, teacher: str) -> bool:
    """Check whether a loss reads a teacher's logits, or a schedule may weight several teachers by
    them.
    """
    losses = (_kind(recipe, entry) for entry in looking_at(recipe, teacher))
    return len(recipe.spec.all_teachers()) > 1 or any(
        loss.knowledge == "response" or loss.needs_teacher_logits for loss in losses
    )


def needs_network(recipe: Recipe, teacher: str) -> bool:
    """Check whether a loss inspects a teacher's network."""
    return any(_kind(recipe, entry).needs_networks for entry in looking_at(recipe, teacher))


def _kind(recipe: Recipe, entry: LossEntry) -> type[Loss]:
    return recipe.plugins.losses[entry.use]


def place_of(recipe: Recipe, section: str, options: ModelOptions | None) -> Sequence[str | int]:
    """Find where a network's options stand in the recipe: in the schedule, or their section."""
    own = ["student"] if section == "student" else recipe.spec.place_of(section)
    schedules = models_in({"schedule": recipe.spec.schedule})
    return next((place for place, model in schedules if model is options), own)


def error_in(
    recipe: Recipe,
    section: str,
    error: Exception,
    options: ModelOptions | None = None,
    *,
    trained: bool,
) -> RecipeError:
    """Name the key of a network's section that an error comes from; `trained` by another recipe."""
    own = recipe.spec.all_teachers().get(section)
    key = (
        "input"
        if isinstance(error, InputError) and getattr(own, "input", True)
        else "recipe"
        if trained
        else "checkpoint"
        if isinstance(error, CheckpointError)
        else "model"
    )
    place = [*place_of(recipe, section, options), key]
    return recipe.error(place, str(error).removeprefix(f"{section}: "))
