"""Checks a recipe as a whole: keys that conflict, missing files, teachers of teachers."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdkit.contracts.known_answers import AnswersOptions
from kdkit.contracts.loss import Loss
from kdkit.contracts.model_source import (
    RecipeTeacher,
    StudentOptions,
    TeacherOptions,
)
from kdkit.contracts.options import LARGEST_INT, Text, path_of
from kdkit.contracts.task import Task, serves
from kdkit.errors import ModelError, shown, suggest
from kdkit.recipe.explain import Location
from kdkit.recipe.registry import Registry
from kdkit.recipe.sections import RecipeBase
from kdkit.recipe.types import compressions_of, source_of
from kdkit.recipe.walk import is_bookkeeping, leaves
from kdkit.recipe.yaml_source import Source

MOST_RECIPES = 64
"""Maximum number of recipes that train a teacher, its teachers, and so on."""

Problem = tuple[Location, str]
"""A key of the recipe, and what is wrong with its value."""


def conflicts(spec: RecipeBase, plugins: Registry, path: Path) -> Iterator[Problem]:
    """Find conflicts between keys that are valid individually.

    Args:
        spec: the recipe.
        plugins: those that it may use.
        path: its file.
    """
    for location, value in leaves(spec):
        # pydantic takes integers of any size, and NaN where a field has no bound
        if isinstance(value, int) and abs(value) > LARGEST_INT:
            yield location, f"{shown(value)} is too large"
        if isinstance(value, float) and math.isnan(value):
            yield location, "is no number"
    yield from _task_conflicts(spec, plugins)
    yield from _model_conflicts(spec, plugins, path)
    yield from _balance_conflicts(spec, plugins)
    yield from _image_conflicts(spec, plugins)
    yield from _compression_conflicts(spec, plugins)
    distilled = spec.data.distilled
    if distilled is not None and distilled.labels != "hard" and spec.train.mixup is not None:
        yield ["train", "mixup"], "mixes classes, and `data.distilled.labels: hard` gives them"
    names = [entry.name for entry in spec.losses if entry.name]
    for i, entry in enumerate(spec.losses):
        if entry.name and names.count(entry.name) > 1:
            yield ["losses", i, "name"], f"'{entry.name}' names two losses"


def missing_files(spec: RecipeBase) -> Iterator[Problem]:
    """Find files that the recipe names and that do not exist; datasets check their own."""
    for location, path in leaves(spec, but=is_bookkeeping):
        if (
            isinstance(path, Path)
            and not os.path.exists(path)
            and location[:2] not in (["data", "dataset"], ["data", "unlabelled"])
        ):
            yield location, f"no such file: {path}"


def task_of(spec: RecipeBase, plugins: Registry) -> Task:
    """Return the task of the recipe: that of `task:`, or the one that the dataset is made for."""
    if (entry := spec.task) is not None:
        return plugins.tasks[entry.use](entry)
    return plugins.tasks[_made_for(spec, plugins)]()


def unknown_task(spec: RecipeBase, plugins: Registry) -> Problem | None:
    """Explain that the dataset's task does not exist; None if it does, or another is named."""
    name = _made_for(spec, plugins)
    if spec.task is not None or name in plugins.tasks:
        return None
    says = f"is made for a task that is not there: {suggest(name, plugins.tasks)}"
    return ["data", "dataset"], says


def _made_for(spec: RecipeBase, plugins: Registry) -> str:
    """Return the name of the task that the dataset's targets are made for."""
    return plugins.datasets[spec.data.dataset.use].for_task(spec.data.dataset)


def _task_conflicts(spec: RecipeBase, plugins: Registry) -> Iterator[Problem]:
    """Find a schedule and losses that do not support this task."""
    if problem := unknown_task(spec, plugins):
        yield problem
        return
    task = task_of(spec, plugins)
    schedule = plugins.schedules[spec.schedule.use]
    if not serves(schedule.tasks, task):
        yield ["schedule"], f"schedule '{schedule.name}' {_serves_others(schedule.tasks, task)}"
    for i, entry in enumerate(spec.losses):
        loss = plugins.losses[entry.use]
        tasks = loss.for_tasks(entry)
        on = "" if task.rows_are == "embeddings" else " on labels"
        usual = f"its usual loss{on} is '{task.default_loss}'"
        if not serves(tasks, task):
            yield ["losses", i, "use"], f"'{entry.use}' {_serves_others(tasks, task)}; {usual}"
        elif loss.knowledge == "labels" and not (task.labels_rows or loss.whole_answers):
            says = f"reads a label of each row, and rows of task '{task.name}' have none"
            yield ["losses", i, "use"], f"'{entry.use}' {says}; {usual}"


def _serves_others(tasks: Iterable[str], task: Task) -> str:
    of = "" if type(task).rows is Task.rows else ", several in a sample"
    return (
        f"is for {' and '.join(sorted(tasks))}, and task '{task.name}' has rows of"
        f" {task.rows_are}{of}"
    )


def _image_conflicts(spec: RecipeBase, plugins: Registry) -> Iterator[Problem]:
    """Find a schedule that makes its images beside images, one that needs some without them, and
    what a teacher keeps of images that do not come again.
    """
    schedule = plugins.schedules[spec.schedule.use]
    if spec.data.synthetic_batches is None:
        if not schedule.needs_images:
            yield (
                ["schedule"],
                f"schedule '{schedule.name}' makes its images; say how many batches an epoch has:"
                " `data.synthetic_batches`",
            )
        return
    if schedule.needs_images:
        making = sorted(name for name, one in plugins.schedules.items() if not one.needs_images)
        yield (
            ["data", "synthetic_batches"],
            f"schedule '{schedule.name}' trains on images of the data; those that make their own:"
            f" {', '.join(making)}",
        )
    for name, teacher in spec.all_teachers().items():
        if getattr(teacher, "cache", None) is not None:
            says = "images that the schedule makes do not come again (data.synthetic_batches)"
            yield [*spec.place_of(name), "cache"], f"{says}, so no answer is kept; leave it out"
        if isinstance(teacher, AnswersOptions):
            says = "has answers to the images of the data, and the schedule makes its own"
            yield [*spec.place_of(name), "model"], says


def _balance_conflicts(spec: RecipeBase, plugins: Registry) -> Iterator[Problem]:
    """Find a balance that does not suit the losses, the optimizer, or the precision."""
    if spec.balance is None:
        return
    if spec.train.precision == "fp16":
        yield (
            ["balance"],
            "gradients of fp16 are scaled, which a balance is not made for; use precision bf16",
        )
    kind, optimizer = plugins.balances[spec.balance.use], spec.train.optimizer.model_dump()
    for key, says in kind.refused(spec.balance, spec.loss_names(), optimizer).items():
        yield ["balance", *([key] if key else [])], says


def _compression_conflicts(spec: RecipeBase, plugins: Registry) -> Iterator[Problem]:
    """Find compressions that do not suit the training, or a loss that deploys another network."""
    train = spec.train.model_dump()
    deploying = [e.use for e in spec.losses if plugins.losses[e.use].deploy is not Loss.deploy]
    for location, options in spec.named_models():
        for one in compressions_of(options, plugins):
            place = [*location, one.name]
            for key, says in one.refused(one.options, train).items():
                yield [*place, *([key] if key else [])], says
            if deploying and one.finishes():
                says = f"loss '{deploying[0]}' deploys another network in the student's place"
                yield place, f"{says}, which is not made for {one.name}"


def _model_conflicts(spec: RecipeBase, plugins: Registry, path: Path) -> Iterator[Problem]:
    """Find unknown models, teachers that do not fit, and `init` from an unknown teacher."""
    if spec.teacher is not None and spec.teachers:
        yield ["teachers"], "give `teacher` or `teachers`, not both"
        return
    yield from _teacher_conflicts(spec, plugins, path)
    for location, options in spec.named_models():
        try:
            source_of(options.model, plugins.models)
        except ModelError as error:
            yield [*location, "model"], str(error)
        init = options.init if isinstance(options, StudentOptions) else None
        if init is not None and init.from_ not in spec.all_teachers():
            known = (
                suggest(init.from_, spec.all_teachers())
                if spec.all_teachers()
                else "the recipe has none"
            )
            yield [*location, "init", "from"], f"there is no such teacher; {known}"


def _teacher_conflicts(spec: RecipeBase, plugins: Registry, path: Path) -> Iterator[Problem]:
    """Find teachers that are missing, unused, or impossible to make."""
    teachers = spec.all_teachers()
    schedule = spec.schedule.use
    needs = plugins.schedules[schedule].needs_teacher
    if len(teachers) < len(spec.teachers):
        yield ["teachers"], "two teachers have one name"
    if needs and not teachers:
        yield ["schedule"], f"schedule '{schedule}' needs a `teacher:`"
    if not needs and teachers:
        key = "teacher" if spec.teacher is not None else "teachers"
        yield [key], f"schedule '{schedule}' has no teacher; leave it out or write `{key}: null`"
    for i, entry in enumerate(spec.losses):
        if entry.teacher is not None and entry.teacher not in teachers:
            yield (
                ["losses", i, "teacher"],
                f"there is no such teacher; {suggest(entry.teacher, teachers)}",
            )
    for name, teacher in teachers.items():
        if isinstance(teacher, RecipeTeacher) and (says := _refused_line(path, teacher.recipe)):
            yield [*spec.place_of(name), "recipe"], says
        if (
            isinstance(teacher, TeacherOptions)
            and teacher.fold_batchnorm
            and teacher.mode == "train"
        ):
            says = "folded layers have no batch statistics, which `mode: train` asks for"
            yield [*spec.place_of(name), "fold_batchnorm"], says


def _refused_line(start: Path, path: Path) -> str | None:
    """Explain what is wrong with the line of recipes that train a teacher; None if nothing."""
    known: dict[Path, int] = {}  # each file is read once
    try:
        count = _count_recipes(path, (Path(os.path.realpath(start)),), known)
    except _ComesBackError:
        return f"{path.name} has this recipe among its own teachers"
    if count <= MOST_RECIPES:
        return None
    return f"{path.name}, its teachers and theirs are {count} recipes, more than {MOST_RECIPES}"


class _ComesBackError(Exception):
    """A recipe is among its own teachers."""


def _count_recipes(path: Path, above: tuple[Path, ...], known: dict[Path, int]) -> int:
    """Count the recipes that train a teacher and its teachers, as often as they teach.

    Args:
        path: the teacher's recipe.
        above: the recipes that it is a teacher of, the nearest first.
        known: counts so far, by file; added to.
    """
    if path in above:
        raise _ComesBackError
    # too many in any case
    if len(above) > MOST_RECIPES:
        return 1
    if path not in known:
        teachers = _recipes_of_teachers(Source(path).data) if path.is_file() else ()
        known[path] = 1 + sum(
            seeds * _count_recipes(recipe, (*above, path), known) for recipe, seeds in teachers
        )
    return known[path]


def _recipes_of_teachers(data: Mapping[str, Any]) -> Iterable[tuple[Path, int]]:
    """List the recipes that train a recipe's teachers, and the number of seeds of each."""
    # unchecked data: loading these recipes would load their teachers', and so on
    several = data.get("teachers")
    for section in [data.get("teacher"), *(several if isinstance(several, list) else [several])]:
        text = section.get("recipe") if isinstance(section, dict) else None
        # a text that is no path is reported by the check of the section itself
        with contextlib.suppress(ValueError):
            if isinstance(text, Text):
                seeds = section.get("seeds")
                yield path_of(text), len(seeds) if isinstance(seeds, list) else 1
