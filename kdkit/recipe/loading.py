"""Loads a recipe file, and those that train its teachers; every error has file and line."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from kdkit.contracts.model_source import RecipeTeacher
from kdkit.contracts.options import Text, path_of
from kdkit.contracts.task import Task
from kdkit.errors import RecipeError, dotted, one_line
from kdkit.recipe import consent, crosscheck, dependencies, registry
from kdkit.recipe.content import digest, fingerprint_of, trained_values
from kdkit.recipe.explain import Location, explain_source
from kdkit.recipe.registry import Registry
from kdkit.recipe.sections import RecipeBase
from kdkit.recipe.types import recipe_type
from kdkit.recipe.walk import code_in, is_bookkeeping
from kdkit.recipe.yaml_source import Source


@dataclass(frozen=True)
class Recipe:
    """A valid recipe, with the plugins it may use and the places of its keys."""

    spec: RecipeBase
    source: Source
    plugins: Registry
    allowed: tuple[Path, ...] | None = None
    """For a run's recipe, the Python files and folders that may run (None: any other recipe,
    which may run the files it names).
    """

    def problem(self, location: Location, says: str) -> str:
        """Format an error as `file:line: key: what`."""
        return f"{self.source.where(location)}: {dotted(location)}: {one_line(says)}"

    def error(self, location: Location, says: str) -> RecipeError:
        return RecipeError(self.problem(location, says))

    def code(self) -> tuple[Path, ...]:
        """List the Python files and folders that it runs."""
        return (*self.spec.plugins, *(path for _, path in code_in(self.spec)))

    @functools.cached_property
    def task(self) -> Task:
        """Return the task of the recipe: that of `task:`, or the one that the dataset is made for.

        Raises:
            RecipeError: there is no such task.
        """
        if problem := crosscheck.unknown_task(self.spec, self.plugins):
            raise self.error(*problem)
        return crosscheck.task_of(self.spec, self.plugins)

    def loss_names(self) -> list[str]:
        """The names of the losses in order: `name`, or `use` (numbered if it is repeated)."""
        names: list[str] = []
        for entry in self.spec.losses:
            name, count = entry.name or entry.use, 2
            while name in names:
                name, count = f"{entry.name or entry.use}_{count}", count + 1
            names.append(name)
        return names

    def plain(self) -> dict[str, Any]:
        """Return the resolved recipe as plain values: no parents, no overrides, paths absolute,
        defaults spelt out.
        """
        return self.spec.model_dump(mode="json", by_alias=True, exclude_none=True)

    def dump(self) -> str:
        """Return the resolved recipe as a flat YAML file."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True, width=120)

    def content(self, *, older: bool = False) -> dict[str, Any]:
        """Return everything that the trained weights depend on: `plain` without bookkeeping, files
        by their content.

        `older`: without the files of the data and the modules that Python files import, as in an
        older kdkit.
        """
        plain = cast("dict[str, Any]", content_of(self.spec, older=older))
        del plain["name"]
        plain["plugins"] = [
            digest(file, older=older)
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
        """Return the SHA-256 of the content."""
        return fingerprint_of(self.content())

    @functools.cached_property
    def older_fingerprint(self) -> str:
        """Return the fingerprint that an older kdkit gave to this recipe."""
        return fingerprint_of(self.content(older=True))

    def is_of(self, fingerprint: str, content: Mapping[str, Any]) -> bool:
        """Check whether a run with that fingerprint and content belongs to this recipe.

        The run may be an older kdkit's, or its data may have been deleted.
        """
        if fingerprint in (self.fingerprint, self.older_fingerprint):
            return True
        own, files = self.content(), content.get("data", {}).get("files")
        if files is None or "files" in own["data"]:
            return False
        own["data"]["files"] = files
        return fingerprint == fingerprint_of(own)


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
    """Validate the content of a source; `plugins` and `files` as for `load`, `allowed` as in
    `Recipe`.

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
    available = registry.load((*plugins, *named))
    model = recipe_type(available)
    try:
        spec = model.model_validate(source.data)
    except ValidationError as error:
        raise RecipeError(explain_source(error, model, source)) from None
    consent.meet({path: source.where(place) for place, path in code_in(spec)}, allowed)
    recipe = Recipe(
        spec.model_copy(update={"plugins": (*spec.plugins, *plugins)}), source, available, allowed
    )
    problems = [
        *crosscheck.conflicts(recipe.spec, available, source.path),
        *(crosscheck.missing_files(recipe.spec) if files else ()),
    ]
    if problems:
        raise RecipeError("\n".join(recipe.problem(*problem) for problem in problems))
    return recipe


def teacher_recipes(spec: RecipeBase) -> dict[str, Recipe]:
    """Load the recipes that train teachers, by the teachers' names.

    The locations of files are taken from `spec`, so that one override moves the data of all
    recipes; they affect no result.
    """
    return {
        name: _recipe_of(teacher, spec)
        for name, teacher in spec.all_teachers().items()
        if isinstance(teacher, RecipeTeacher)
    }


def code_of_all(recipe: Recipe) -> tuple[Path, ...]:
    """List the Python files and folders that a recipe, and those that train its teachers, run."""
    return (
        *recipe.code(),
        *(path for taught in teacher_recipes(recipe.spec).values() for path in code_of_all(taught)),
    )


def content_of(value: Any, *, older: bool = False) -> Any:
    """Reduce a recipe, or a part of it, to what changes the result, in plain values; `older`: see
    `Recipe.content`.
    """

    def fingerprint(teacher: RecipeTeacher) -> str:
        taught = load(teacher.recipe, {} if teacher.seed is None else {"seed": teacher.seed})
        return taught.older_fingerprint if older else taught.fingerprint

    return trained_values(value, fingerprint, older=older)


def _recipe_of(teacher: RecipeTeacher, spec: RecipeBase) -> Recipe:
    """Load the recipe that trains a teacher, with the file locations of `spec` if both use the same
    dataset plugin.
    """
    seed: dict[str, Any] = {} if teacher.seed is None else {"seed": teacher.seed}
    path, dataset = teacher.recipe, spec.data.dataset
    if load(path).spec.data.dataset.use != dataset.use:
        return load(path, seed)
    shared = [
        name
        for name, field in type(dataset).model_fields.items()
        if is_bookkeeping(field) and name in dataset.model_fields_set
    ]
    return load(
        path, {**seed, **{f"data.dataset.{name}": getattr(dataset, name) for name in shared}}
    )


def _plugin_paths(source: Source) -> list[Path]:
    """Resolve the paths of a recipe's plugins.

    Raises:
        RecipeError: some do not exist, one a line.
    """
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
