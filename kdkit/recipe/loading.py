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

from kdkit.contracts.compression import Compression
from kdkit.contracts.dataset_source import DatasetSource
from kdkit.contracts.model_source import ModelOptions, ModelSource, RecipeTeacher
from kdkit.contracts.options import Text, path_of
from kdkit.contracts.task import Task
from kdkit.errors import RecipeError, dotted, one_line
from kdkit.recipe import consent, crosscheck, dependencies, registry
from kdkit.recipe.content import digest, fingerprint_of, trained_values
from kdkit.recipe.explain import Location, explain_source
from kdkit.recipe.registry import Registry
from kdkit.recipe.sections import RecipeBase
from kdkit.recipe.types import compressions_of, recipe_type, source_of
from kdkit.recipe.walk import code_in, is_bookkeeping
from kdkit.recipe.yaml_source import Source


@dataclass(frozen=True)
class Recipe:
    """A valid recipe, with the plugins it may use and the places of its keys."""

    spec: RecipeBase
    source: Source
    plugins: Registry
    allowed: tuple[Path, ...] | None = None
    """For a run's recipe, the Python files and folders that may run (None: all that it names)."""

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
        """List the names of the losses: `name`, or `use` (numbered if it is repeated)."""
        return self.spec.loss_names()

    def plain(self) -> dict[str, Any]:
        """Return the recipe as plain values: merged, paths absolute, defaults spelt out."""
        return self.spec.model_dump(mode="json", by_alias=True, exclude_none=True)

    def dump(self) -> str:
        """Return the resolved recipe as a flat YAML file."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True, width=120)

    def content(self, *, older: bool = False) -> dict[str, Any]:
        """Return all that the weights depend on: `plain` without bookkeeping, files by content.

        `older`: without the files of the data and the modules that Python files import, as in an
        older kdkit.
        """
        plain = cast("dict[str, Any]", content_of(self.spec, older=older))
        # a run that is called otherwise is still the same run
        del plain["name"]
        plain["plugins"] = [
            digest(file, older=older)
            for path in self.spec.plugins
            for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))
        ]
        own = [file for source in self.datasets() for file in source.own_files()]
        if not older and (files := dependencies.files_digest(own)):
            plain["data"]["files"] = files
        return plain

    def dataset(self) -> DatasetSource:
        """Return the dataset plugin with the recipe's options."""
        options, distilled = self.spec.data.dataset, self.spec.data.distilled
        source = self.plugins.datasets[options.use](options)
        if distilled is None:
            return source
        # here: safetensors loads torch
        from kdkit.recipe.distilled_data import Distilled

        resized = self.spec.data.image_size is not None
        return Distilled(source, distilled.file, distilled.labels, resized=resized)

    def unlabelled(self) -> DatasetSource | None:
        """Return the dataset plugin of the unlabelled samples; None if the recipe names none."""
        beside = self.spec.data.unlabelled
        if beside is None or beside.dataset is None:
            return None
        return self.plugins.datasets[beside.dataset.use](beside.dataset)

    def datasets(self) -> list[DatasetSource]:
        """Return all dataset plugins that the recipe names, that of `data.dataset` first."""
        beside = self.unlabelled()
        return [self.dataset(), *([beside] if beside else [])]

    def model_source(self, options: ModelOptions) -> ModelSource:
        """Return the source that builds a network of the recipe.

        Raises:
            ModelError: there is no such source.
        """
        source, name = source_of(options.model, self.plugins.models)
        return self.plugins.models[source](options, name)

    def compressions(self, options: ModelOptions) -> list[Compression]:
        """Return the compressions of a network, in the order of their work."""
        return compressions_of(options, self.plugins)

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
        # data that are gone leave the digest out; the run's own stands in for it
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
    """Validate a source; `plugins` and `files` as for `load`, `allowed` as in `Recipe`.

    Raises:
        RecipeError: all problems found, one line each.
        PluginError: a plugin that the recipe names is wrong.
    """
    if "variants" in source.data:
        raise RecipeError(
            f"{source.where(['variants'])}: variants: this is a study, which `kdkit compare`"
            " carries out, not a recipe"
        )
    # asked before anything is imported, and again for files that only valid options name
    named = _plugin_paths(source)
    consent.meet({path: source.where(["plugins", i]) for i, path in enumerate(named)}, allowed)
    available = registry.load((*plugins, *named))
    model = recipe_type(available)
    try:
        spec = model.model_validate(source.data)
    except ValidationError as error:
        raise RecipeError(explain_source(error, model, source)) from None
    consent.meet({path: source.where(place) for place, path in code_in(spec)}, allowed)
    # plugins of the command line join the recipe's own, so that its run can be loaded again
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
    """Reduce a recipe or a section to what changes the result; `older` as in `Recipe.content`."""

    def fingerprint(teacher: RecipeTeacher) -> str:
        taught = load(teacher.recipe, _seed_of(teacher))
        return taught.older_fingerprint if older else taught.fingerprint

    return trained_values(value, fingerprint, older=older)


def _recipe_of(teacher: RecipeTeacher, spec: RecipeBase) -> Recipe:
    """Load a teacher's recipe, with the file locations of `spec` for the same dataset plugin."""
    overrides = _seed_of(teacher)
    dataset = spec.data.dataset
    # only bookkeeping that is written: it changes no result, so the teacher's run stays the same
    if load(teacher.recipe).spec.data.dataset.use == dataset.use:
        for name, field in type(dataset).model_fields.items():
            if is_bookkeeping(field) and name in dataset.model_fields_set:
                overrides[f"data.dataset.{name}"] = getattr(dataset, name)
    return load(teacher.recipe, overrides)


def _seed_of(teacher: RecipeTeacher) -> dict[str, Any]:
    return {} if teacher.seed is None else {"seed": teacher.seed}


def _plugin_paths(source: Source) -> list[Path]:
    """Resolve the paths of a recipe's plugins.

    Raises:
        RecipeError: some do not exist, one a line.
    """
    named = source.data.get("plugins") or []
    # anything else is reported by the check of the recipe's type
    texts = [text for text in named if isinstance(text, Text)] if isinstance(named, list) else []
    paths: list[Path] = []
    problems: list[str] = []
    for i, text in enumerate(texts):
        key = f"{source.where(['plugins', i])}: plugins.{i}"
        try:
            path = path_of(text)
        except ValueError as error:
            problems.append(f"{key}: {error}")
            continue
        paths.append(path)
        # `Path.exists` raises an error for a name that is too long
        if not os.path.exists(path):
            problems.append(f"{key}: no such file or folder: {path}")
    if problems:
        raise RecipeError("\n".join(problems))
    return paths
