"""Loads a recipe file; every problem is told with file and line."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from kdkit.contracts.model_source import ModelOptions, RecipeTeacher, StudentOptions, TeacherOptions
from kdkit.contracts.options import LARGEST_INT, Text, path_of
from kdkit.errors import ModelError, RecipeError, dotted, one_line, shown, suggest
from kdkit.files import file_digest
from kdkit.recipe import consent, dependencies, registry
from kdkit.recipe.explain import Location, explain_source
from kdkit.recipe.registry import Registry
from kdkit.recipe.sections import RecipeBase
from kdkit.recipe.types import recipe_type, source_of
from kdkit.recipe.yaml_source import Source

MOST_RECIPES = 64
"""Recipes that train a teacher, its teachers, theirs, and so on."""


@dataclass(frozen=True)
class Recipe:
    """A valid recipe, with the plugins it may use and the places of its keys."""

    spec: RecipeBase
    source: Source
    plugins: Registry
    allowed: tuple[Path, ...] | None = None
    """Of a run's recipe, the Python files and folders that may run (None: another recipe, which
    may run what it names).
    """

    def problem(self, location: Location, says: str) -> str:
        """`file:line: key: what`."""
        return f"{self.source.where(location)}: {dotted(location)}: {one_line(says)}"

    def error(self, location: Location, says: str) -> RecipeError:
        return RecipeError(self.problem(location, says))

    def code(self) -> tuple[Path, ...]:
        """The Python files and folders that it makes run."""
        return (*self.spec.plugins, *(path for _, path in code_in(self.spec)))

    def loss_names(self) -> list[str]:
        """The terms' names in order: `name`, or `use` (numbered where it comes again)."""
        names: list[str] = []
        for entry in self.spec.losses:
            name, count = entry.name or entry.use, 2
            while name in names:
                name, count = f"{entry.name or entry.use}_{count}", count + 1
            names.append(name)
        return names

    def plain(self) -> dict[str, Any]:
        """The resolved recipe as plain values: no parents, no overrides, paths absolute,
        defaults spelt out.
        """
        return self.spec.model_dump(mode="json", by_alias=True, exclude_none=True)

    def dump(self) -> str:
        """The resolved recipe as a flat YAML file."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True, width=120)

    def content(self, *, older: bool = False) -> dict[str, Any]:
        """All that the trained weights depend on: `plain` without bookkeeping, files by what is
        in them.

        `older`: without the files of the data and the modules that Python files import, as an older
        kdkit had it.
        """
        plain = cast("dict[str, Any]", content_of(self.spec, older=older))
        del plain["name"]
        plain["plugins"] = [
            _digest(file, older)
            for path in self.spec.plugins
            for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))
        ]
        if not older and (files := self._data_files()):
            plain["data"]["files"] = files
        return plain

    def _data_files(self) -> str | None:
        dataset = self.spec.data.dataset
        return dependencies.files_digest(self.plugins.datasets[dataset.use](dataset).own_files())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        return _fingerprint(self.content())

    @functools.cached_property
    def older_fingerprint(self) -> str:
        """The fingerprint that an older kdkit gave to this recipe."""
        return _fingerprint(self.content(older=True))

    def is_of(self, fingerprint: str, content: Mapping[str, Any]) -> bool:
        """Whether a run of that fingerprint and content is one of this recipe.

        The run may be an older kdkit's, or its data may be gone by now.
        """
        if fingerprint in (self.fingerprint, self.older_fingerprint):
            return True
        own, files = self.content(), content.get("data", {}).get("files")
        if files is None or "files" in own["data"]:
            return False
        own["data"]["files"] = files
        return fingerprint == _fingerprint(own)


def load(
    path: Path | str,
    overrides: Mapping[str, Any] | None = None,
    plugins: Sequence[Path] = (),
    *,
    files: bool = True,
) -> Recipe:
    """Read and check a recipe file. The Python files that it names may run.

    Args:
        path: the file.
        overrides: values by `key.path`, stronger than the file's.
        plugins: further plugin files or folders.
        files: whether the files that it names must be there; a run that is finished needs them no
            more.

    Raises:
        RecipeError: all problems found, one line each.
        PluginError: a plugin that the recipe names is wrong.
    """
    return read(Source(Path(path), overrides), plugins, files=files)


def read(
    source: Source,
    plugins: Sequence[Path] = (),
    *,
    files: bool = True,
    allowed: tuple[Path, ...] | None = None,
) -> Recipe:
    """Check what a source says; `plugins` and `files` as for `load`, `allowed` as in `Recipe`.

    Raises:
        RecipeError: all problems found, one line each.
        PluginError: a plugin that the recipe names is wrong.
    """
    if "variants" in source.data:
        raise RecipeError(
            f"{source.where(['variants'])}: variants: this is a study, which `kdkit compare`"
            " carries out, not a recipe"
        )
    named = _plugin_paths(source)
    consent.meet({path: source.where(["plugins", i]) for i, path in enumerate(named)}, allowed)
    found = registry.load((*plugins, *named))
    model = recipe_type(found)
    try:
        spec = model.model_validate(source.data)
    except ValidationError as error:
        raise RecipeError(explain_source(error, model, source)) from None
    consent.meet({path: source.where(place) for place, path in code_in(spec)}, allowed)
    recipe = Recipe(
        spec.model_copy(update={"plugins": (*spec.plugins, *plugins)}), source, found, allowed
    )
    if problems := [*_cross_check(recipe), *(_missing_files(recipe) if files else ())]:
        raise RecipeError("\n".join(problems))
    return recipe


def teacher_recipes(spec: RecipeBase) -> dict[str, Recipe]:
    """The recipes that train teachers, by the teachers' names.

    Where files lie is taken from `spec`, so that one override moves the data of all; it changes no
    result.
    """
    return {
        name: _taught_by(one, spec)
        for name, one in spec.all_teachers().items()
        if isinstance(one, RecipeTeacher)
    }


def code_of_all(recipe: Recipe) -> tuple[Path, ...]:
    """The Python files and folders that it, and the recipes that train its teachers, make run."""
    return (
        *recipe.code(),
        *(path for taught in teacher_recipes(recipe.spec).values() for path in code_of_all(taught)),
    )


def _taught_by(teacher: RecipeTeacher, spec: RecipeBase) -> Recipe:
    seed: dict[str, Any] = {} if teacher.seed is None else {"seed": teacher.seed}
    path, dataset = teacher.recipe, spec.data.dataset
    if load(path).spec.data.dataset.use != dataset.use:
        return load(path, seed)
    kept = [
        name
        for name, field in type(dataset).model_fields.items()
        if _bookkeeping(field) and name in dataset.model_fields_set
    ]
    return load(path, {**seed, **{f"data.dataset.{name}": getattr(dataset, name) for name in kept}})


def _plugin_paths(source: Source) -> list[Path]:
    named = source.data.get("plugins") or []
    texts = [p for p in named if isinstance(p, Text)] if isinstance(named, list) else []
    paths, problems = list[Path](), list[str]()
    for i, text in enumerate(texts):
        place = f"{source.where(['plugins', i])}: plugins.{i}"
        try:
            paths.append(path_of(text))
        except ValueError as error:
            problems.append(f"{place}: {error}")
            continue
        problems += (
            [] if os.path.exists(paths[-1]) else [f"{place}: no such file or folder: {paths[-1]}"]
        )
    if problems:
        raise RecipeError("\n".join(problems))
    return paths


def _cross_check(recipe: Recipe) -> Iterable[str]:
    """What each key allows, but all of them together do not."""
    spec = recipe.spec
    for location, value in _leaves(spec):
        if isinstance(value, int) and abs(value) > LARGEST_INT:
            yield recipe.problem(location, f"{shown(value)} is too large")
        if isinstance(value, float) and math.isnan(value):
            yield recipe.problem(location, "is no number")
    yield from _check_models(recipe)
    given = [entry.name for entry in spec.losses if entry.name]
    for i, entry in enumerate(spec.losses):
        if entry.name and given.count(entry.name) > 1:
            yield recipe.problem(["losses", i, "name"], f"'{entry.name}' names two losses")


def _check_models(recipe: Recipe) -> Iterable[str]:
    spec = recipe.spec
    if spec.teacher is not None and spec.teachers:
        yield recipe.problem(["teachers"], "give `teacher` or `teachers`, not both")
        return
    yield from _check_teachers(recipe)
    sections = {
        "teacher": spec.teacher,
        "teachers": spec.teachers,
        "student": spec.student,
        "schedule": spec.schedule,
    }
    for location, options in models_in(sections):
        try:
            source_of(options.model, recipe.plugins.models)
        except ModelError as error:
            yield recipe.problem([*location, "model"], str(error))
        init = options.init if isinstance(options, StudentOptions) else None
        if init is not None and init.from_ not in spec.all_teachers():
            known = (
                suggest(init.from_, spec.all_teachers())
                if spec.all_teachers()
                else "the recipe has none"
            )
            yield recipe.problem([*location, "init", "from"], f"there is no such teacher; {known}")


def _check_teachers(recipe: Recipe) -> Iterable[str]:
    spec = recipe.spec
    teachers = recipe.spec.all_teachers()
    called = recipe.spec.schedule.use
    needs = recipe.plugins.schedules[called].needs_teacher
    if len(teachers) < len(spec.teachers):
        yield recipe.problem(["teachers"], "two teachers have one name")
    if needs and not teachers:
        yield recipe.problem(["schedule"], f"schedule '{called}' needs a `teacher:`")
    if not needs and teachers:
        key = "teacher" if spec.teacher is not None else "teachers"
        yield recipe.problem(
            [key], f"schedule '{called}' has no teacher; leave it out or write `{key}: null`"
        )
    for i, entry in enumerate(spec.losses):
        if entry.teacher is not None and entry.teacher not in teachers:
            yield recipe.problem(
                ["losses", i, "teacher"],
                f"there is no such teacher; {suggest(entry.teacher, teachers)}",
            )
    for name, one in teachers.items():
        if isinstance(one, RecipeTeacher) and (
            says := _refused_line(recipe.source.path, one.recipe)
        ):
            yield recipe.problem([*spec.place_of(name), "recipe"], says)
        if isinstance(one, TeacherOptions) and one.fold_batchnorm and one.mode == "train":
            says = "folded layers have no batch statistics, which `mode: train` asks for"
            yield recipe.problem([*spec.place_of(name), "fold_batchnorm"], says)


def models_in(
    value: Any, location: Sequence[str | int] = ()
) -> Iterable[tuple[list[str | int], ModelOptions]]:
    """Every model that a part of the recipe names, with its place."""
    if isinstance(value, ModelOptions):
        yield [*location], value
    elif isinstance(value, Mapping | BaseModel):
        for key, part in value.items() if isinstance(value, Mapping) else value:
            yield from models_in(part, [*location, key])
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from models_in(part, [*location, i])


def _refused_line(start: Path, path: Path) -> str | None:
    """What is wrong with the recipes that train a teacher, and its teachers, and so on; each
    file is read once.
    """
    known: dict[Path, int] = {}
    try:
        count = _recipes_from(path, (Path(os.path.realpath(start)),), known)
    except _ComesBackError:
        return f"{path.name} has this recipe among its own teachers"
    return (
        f"{path.name}, its teachers and theirs are {count} recipes, more than {MOST_RECIPES}"
        if count > MOST_RECIPES
        else None
    )


class _ComesBackError(Exception):
    """A recipe is among its own teachers."""


def _recipes_from(path: Path, above: tuple[Path, ...], known: dict[Path, int]) -> int:
    """How many recipes are planned for a teacher: its own, and those of its teachers, as often
    as they teach.
    """
    if path in above:
        raise _ComesBackError
    if len(above) > MOST_RECIPES:
        return 1
    if path not in known:
        followers = _taught(Source(path).data) if path.is_file() else ()
        known[path] = 1 + sum(
            seeds * _recipes_from(one, (*above, path), known) for one, seeds in followers
        )
    return known[path]


def _taught(data: Mapping[str, Any]) -> Iterable[tuple[Path, int]]:
    """The recipes that train a recipe's teachers, and with how many seeds each."""
    several = data.get("teachers")
    for section in [data.get("teacher"), *(several if isinstance(several, list) else [several])]:
        text = section.get("recipe") if isinstance(section, dict) else None
        with contextlib.suppress(ValueError):
            if isinstance(text, Text):
                seeds = section.get("seeds")
                yield path_of(text), len(seeds) if isinstance(seeds, list) else 1


def _missing_files(recipe: Recipe) -> Iterable[str]:
    """Files that the recipe names and that are not there; datasets look after their own."""
    for location, path in _leaves(recipe.spec, but=_bookkeeping):
        if (
            isinstance(path, Path)
            and not os.path.exists(path)
            and location[:2] != ["data", "dataset"]
        ):
            yield recipe.problem(location, f"no such file: {path}")


def _leaves(
    value: Any, location: Sequence[str | int] = (), but: Callable[[Any], bool] = lambda field: False
) -> Iterable[tuple[list[str | int], Any]]:
    """Every value in a part of the recipe that has none inside, with its place; `but` says which
    options are left out.
    """
    if isinstance(value, tuple | list | Mapping):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(item, [*location, key], but)
    elif isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            if not but(field):
                yield from _leaves(getattr(value, name), [*location, field.alias or name], but)
    else:
        yield [*location], value


def code_in(
    value: Any, location: Sequence[str | int] = ()
) -> Iterable[tuple[list[str | int], Path]]:
    """Python files that a part of the recipe makes run, plugins aside, with their places."""
    if isinstance(value, tuple | list | Mapping):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from code_in(item, [*location, key])
    elif isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            place, item = [*location, field.alias or name], getattr(value, name)
            if _is(field, "code") and isinstance(item, Path):
                yield place, item
            else:
                yield from code_in(item, place)


def _bookkeeping(field: Any) -> bool:
    return _is(field, "bookkeeping")


def _counts(field: Any, value: Any) -> bool:
    """Whether an option's value is a part of what is trained."""
    return not _bookkeeping(field) and not (_is(field, "later") and value == field.default)


def _is(field: Any, what: str) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(what))


def _fingerprint(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def content_of(value: Any, *, older: bool = False) -> Any:
    """What of a recipe or a part of it changes what is trained, in plain values; `older`: see
    `Recipe.content`.
    """
    if isinstance(value, RecipeTeacher):
        taught = load(value.recipe, {} if value.seed is None else {"seed": value.seed})
        others = {
            k: content_of(v, older=older) for k, v in value if k not in ("recipe", "seed", "name")
        }
        return {**others, "recipe": taught.older_fingerprint if older else taught.fingerprint}
    if isinstance(value, BaseModel):
        return {
            name: content_of(getattr(value, name), older=older)
            for name, field in type(value).model_fields.items()
            if _counts(field, getattr(value, name))
        }
    if isinstance(value, tuple | list):
        return [content_of(item, older=older) for item in value]
    if isinstance(value, Mapping):
        return {key: content_of(item, older=older) for key, item in value.items()}
    if isinstance(value, Path):
        return _digest(value, older) if value.is_file() else str(value)
    return value


def _digest(file: Path, older: bool) -> str:
    return (
        dependencies.code_digest(file) if file.suffix == ".py" and not older else file_digest(file)
    )
