"""Loads a recipe file; every problem is told with file and line."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from kdkit import registry
from kdkit.errors import ModelError, RecipeError, suggest
from kdkit.explain import Location, explain
from kdkit.options import Text
from kdkit.providers import ModelOptions, RecipeTeacher, StudentOptions, TeacherOptions
from kdkit.recipe_types import recipe_type, source_of
from kdkit.registry import Registry
from kdkit.schema import RecipeBase
from kdkit.source import COMMAND_LINE, Source


@dataclass(frozen=True)
class Recipe:
    """A valid recipe, with the plugins it may use and the places of its keys."""

    spec: RecipeBase
    source: Source
    plugins: Registry

    def problem(self, location: Location, says: str) -> str:
        """`file:line: key: what`."""
        return f"{self.source.where(location)}: {'.'.join(map(str, location))}: {says}"

    def error(self, location: Location, says: str) -> RecipeError:
        return RecipeError(self.problem(location, says))

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
        """The resolved recipe as plain values: no parents, no overrides, paths absolute, defaults spelt out."""
        return self.spec.model_dump(mode="json", by_alias=True, exclude_none=True)

    def dump(self) -> str:
        """The resolved recipe as a flat YAML file."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True, width=120)

    def content(self) -> dict[str, Any]:
        """All that the trained weights depend on: `plain` without bookkeeping, files by what is in them."""
        plain = cast("dict[str, Any]", content_of(self.spec))
        del plain["name"]
        plain["plugins"] = [
            _digest(file) for path in self.spec.plugins for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))
        ]
        return plain

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()


def load(path: Path | str, overrides: Mapping[str, Any] | None = None, plugins: Sequence[Path] = (), *, files: bool = True) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: the file.
        overrides: values by `key.path`, stronger than the file's.
        plugins: further plugin files or folders.
        files: whether the files that it names must be there; a run that is finished needs them no more.

    Raises:
        RecipeError: all problems found, one line each.
        PluginError: a plugin that the recipe names is wrong.
    """
    return read(Source(Path(path), overrides), plugins, files=files)


def read(source: Source, plugins: Sequence[Path] = (), *, files: bool = True) -> Recipe:
    """Check what a source says; `plugins` and `files` as for `load`.

    Raises:
        RecipeError: all problems found, one line each.
        PluginError: a plugin that the recipe names is wrong.
    """
    if "variants" in source.data:
        raise RecipeError(f"{source.where(['variants'])}: variants: this is a study, which `kdkit compare` carries out, not a recipe")
    found = registry.load((*plugins, *_plugin_paths(source)))
    model = recipe_type(found)
    try:
        spec = model.model_validate(source.data)
    except ValidationError as error:
        raise RecipeError("\n".join(dict.fromkeys(explain(error, source, model)))) from None
    recipe = Recipe(spec.model_copy(update={"plugins": (*spec.plugins, *plugins)}), source, found)
    if problems := [*_cross_check(recipe), *(_missing_files(recipe) if files else ())]:
        raise RecipeError("\n".join(problems))
    return recipe


def teacher_recipes(spec: RecipeBase) -> dict[str, Recipe]:
    """The recipes that train teachers, by the teachers' names.

    Where files lie is taken from `spec`, so that one override moves the data of all; it changes no result.
    """
    return {name: _taught_by(one, spec) for name, one in spec.all_teachers().items() if isinstance(one, RecipeTeacher)}


def _taught_by(teacher: RecipeTeacher, spec: RecipeBase) -> Recipe:
    seed: dict[str, Any] = {} if teacher.seed is None else {"seed": teacher.seed}
    path, dataset = teacher.recipe, spec.data.dataset
    if load(path).spec.data.dataset.use != dataset.use:
        return load(path, seed)
    kept = [name for name, field in type(dataset).model_fields.items() if _bookkeeping(field) and name in dataset.model_fields_set]
    return load(path, {**seed, **{f"data.dataset.{name}": getattr(dataset, name) for name in kept}})


def _plugin_paths(source: Source) -> list[Path]:
    named = source.data.get("plugins") or []
    texts = [p for p in named if isinstance(p, Text)] if isinstance(named, list) else []
    paths = [(p.folder / Path(p).expanduser()).resolve() for p in texts]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    if missing:
        raise RecipeError("\n".join(f"{source.where(['plugins', i])}: plugins.{i}: no such file or folder: {paths[i]}" for i in missing))
    return paths


def _cross_check(recipe: Recipe) -> Iterable[str]:
    """What each key allows, but all of them together do not."""
    spec = recipe.spec
    yield from _check_models(recipe)
    given = [entry.name for entry in spec.losses if entry.name]
    for i, entry in enumerate(spec.losses):
        if entry.name and given.count(entry.name) > 1:
            yield recipe.problem(["losses", i, "name"], f"'{entry.name}' names two losses")
    shape = spec.train.lr_schedule
    if shape.warmup_epochs + shape.cooldown_epochs > spec.train.epochs:
        key = "epochs" if recipe.source.where(["train", "epochs"]) == COMMAND_LINE else "lr_schedule"
        says = f"warm-up and cool-down ({shape.warmup_epochs} + {shape.cooldown_epochs}) are longer than the {spec.train.epochs} epochs"
        yield recipe.problem(["train", key], f"{says}; shorten train.lr_schedule.warmup_epochs")


def _check_models(recipe: Recipe) -> Iterable[str]:
    spec = recipe.spec
    if spec.teacher is not None and spec.teachers:
        yield recipe.problem(["teachers"], "give `teacher` or `teachers`, not both")
        return
    yield from _check_teachers(recipe)
    sections = {"teacher": spec.teacher, "teachers": spec.teachers, "student": spec.student, "schedule": spec.schedule}
    for location, options in models_in(sections):
        try:
            source_of(options.model, recipe.plugins.models)
        except ModelError as error:
            yield recipe.problem([*location, "model"], str(error))
        init = options.init if isinstance(options, StudentOptions) else None
        if init is not None and init.from_ not in spec.all_teachers():
            known = suggest(init.from_, spec.all_teachers()) if spec.all_teachers() else "the recipe has none"
            yield recipe.problem([*location, "init", "from"], f"there is no such teacher; {known}")


def _check_teachers(recipe: Recipe) -> Iterable[str]:
    spec, teachers, called = recipe.spec, recipe.spec.all_teachers(), recipe.spec.schedule.use
    needs = recipe.plugins.schedules[called].needs_teacher
    if len(teachers) < len(spec.teachers):
        yield recipe.problem(["teachers"], "two teachers have one name")
    if needs and not teachers:
        yield recipe.problem(["schedule"], f"schedule '{called}' needs a `teacher:`")
    if not needs and teachers:
        key = "teacher" if spec.teacher is not None else "teachers"
        yield recipe.problem([key], f"schedule '{called}' has no teacher; leave it out or write `{key}: null`")
    for i, entry in enumerate(spec.losses):
        if entry.teacher is not None and entry.teacher not in teachers:
            yield recipe.problem(["losses", i, "teacher"], f"there is no such teacher; {suggest(entry.teacher, teachers)}")
    for name, one in teachers.items():
        if isinstance(one, RecipeTeacher) and _teaches_itself(recipe.source.path, one.recipe):
            yield recipe.problem([*spec.place_of(name), "recipe"], f"{one.recipe.name} has this recipe among its own teachers")
        if isinstance(one, TeacherOptions) and one.fold_batchnorm and one.mode == "train":
            says = "folded layers have no batch statistics, which `mode: train` asks for"
            yield recipe.problem([*spec.place_of(name), "fold_batchnorm"], says)


def models_in(value: Any, location: Sequence[str | int] = ()) -> Iterable[tuple[list[str | int], ModelOptions]]:
    """Every model that a part of the recipe names, with its place."""
    if isinstance(value, ModelOptions):
        yield [*location], value
    elif isinstance(value, Mapping | BaseModel):
        for key, part in value.items() if isinstance(value, Mapping) else value:
            yield from models_in(part, [*location, key])
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from models_in(part, [*location, i])


def _teaches_itself(start: Path, path: Path) -> bool:
    """Whether following the recipes of teachers from `path` on comes back to `start`, or to a recipe that was met before."""
    return path.is_file() and _comes_back(path.resolve(), frozenset([start.resolve()]))


def _comes_back(path: Path, met: frozenset[Path]) -> bool:
    if path in met:
        return True
    data = Source(path).data
    several = data.get("teachers")
    sections = [data.get("teacher"), *(several if isinstance(several, list) else [several])]
    named = [section.get("recipe") for section in sections if isinstance(section, dict)]
    next_ones = [(text.folder / text).resolve() for text in named if isinstance(text, Text)]
    return any(following.is_file() and _comes_back(following, met | {path}) for following in next_ones)


def _missing_files(recipe: Recipe) -> Iterable[str]:
    """Files that the recipe names and that are not there; datasets look after their own."""
    for location, path in _paths(recipe.spec, []):
        if not path.exists() and location[:2] != ["data", "dataset"]:
            yield recipe.problem(location, f"no such file: {path}")


def _paths(value: Any, location: list[str | int]) -> Iterable[tuple[list[str | int], Path]]:
    """Every path in the recipe but those of bookkeeping."""
    if isinstance(value, Path):
        yield location, value
    elif isinstance(value, tuple | Mapping):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _paths(item, [*location, key])
    elif isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            if not _bookkeeping(field):
                yield from _paths(getattr(value, name), [*location, name])


def _bookkeeping(field: Any) -> bool:
    return _is(field, "bookkeeping")


def _counts(field: Any, value: Any) -> bool:
    """Whether an option's value is a part of what is trained."""
    return not _bookkeeping(field) and not (_is(field, "later") and value == field.default)


def _is(field: Any, what: str) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(what))


def content_of(value: Any) -> Any:
    """What of a recipe or a part of it changes what is trained, in plain values."""
    if isinstance(value, RecipeTeacher):
        taught = load(value.recipe, {} if value.seed is None else {"seed": value.seed})
        return {**{k: content_of(v) for k, v in value if k not in ("recipe", "seed", "name")}, "recipe": taught.fingerprint}
    if isinstance(value, BaseModel):
        return {
            name: content_of(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if _counts(field, getattr(value, name))
        }
    if isinstance(value, tuple | list):
        return [content_of(item) for item in value]
    if isinstance(value, Mapping):
        return {key: content_of(item) for key, item in value.items()}
    if isinstance(value, Path):
        return _digest(value) if value.is_file() else str(value)
    return value


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
