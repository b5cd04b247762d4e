"""Loads a study: one study file, or several recipes; every error has file and line."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdkit import recipe as recipes
from kdkit.errors import RecipeError, shown
from kdkit.recipe import Recipe
from kdkit.recipe.yaml_source import Source, override_words
from kdkit.study.spec import MOST_SEEDS, SEEDS
from kdkit.study.study_file import Problems, StudyFile
from kdkit.study.variants import TEACHER, Study, renamed

MARKS = ("variants", "vary", "tune", "base")  # keys that exist in a study, but not in a recipe
LONGEST_JOINED = 60  # maximum length of a study's name joined from recipe names


def load(
    paths: Sequence[Path],
    overrides: Mapping[str, Any] | None = None,
    plugins: Sequence[Path] = (),
    *,
    seeds: int | None = None,
    allow: Sequence[str] = (),
) -> Study:
    """Read one study file, or several recipes to be compared (the first is the baseline).

    Args:
        paths: the files.
        overrides: values by `key.path` for all variants.
        plugins: further plugin files or folders.
        seeds: number of seeds, in place of the study's own.
        allow: keys in which variants may differ, in addition to the study's own.

    Raises:
        RecipeError: all problems found in any variant, one line each.
    """
    if not paths:
        raise RecipeError("name a study file, or recipes")
    if seeds is not None and not 1 <= seeds <= MOST_SEEDS:
        raise RecipeError(f"between 1 and {MOST_SEEDS} seeds are possible, not {shown(seeds)}")
    # Read once: a study is told from a recipe by its keys.
    opened = {path: Source(path) for path in paths}
    studies = [path for path, source in opened.items() if any(key in source.data for key in MARKS)]
    if studies and len(paths) > 1:
        raise RecipeError(
            f"{studies[0]}: is a study, which is compared by itself: give one study, or recipes"
            " only"
        )
    study = (
        StudyFile(opened[studies[0]], overrides, plugins).study()
        if studies
        else _of_recipes(list(opened), overrides, plugins)
    )
    if seeds:
        study = replace(study, seeds=tuple(range(seeds)))
    chosen_with = study.tune_seeds if isinstance(study.tune_seeds, Sequence) else ()
    # After `--seeds`, which replaces the study's own.
    if shared := {*study.seeds} & {*chosen_with}:
        where = opened[studies[0]].where(["tune_seeds"])
        raise RecipeError(
            f"{where}: tune_seeds: {min(shared)} is one of the study's own seeds; runs that choose"
            " are not those that are told"
        )
    options = ["--seeds", str(seeds)] if seeds else []
    options += [word for key in allow for word in ("--allow", key)]
    command = command_line("compare", paths, overrides or {}, plugins, options)
    return replace(study, allow=(*study.allow, *allow), command=command)


def command_line(
    command: str,
    paths: Sequence[Path],
    overrides: Mapping[str, Any],
    plugins: Sequence[Path],
    options: Sequence[str],
) -> str:
    """Return the command line that runs a study."""
    words = ["kdkit", command, *map(_seen_from_here, paths), *override_words(overrides), *options]
    for path in plugins:
        words += ["--plugins", _seen_from_here(path)]
    return shlex.join(words)


def _seen_from_here(path: Path) -> str:
    # The command is told in reports, which are read on other machines.
    return str(path).removeprefix(f"{Path.cwd()}/")


def _of_recipes(
    paths: Sequence[Path], overrides: Mapping[str, Any] | None, plugins: Sequence[Path]
) -> Study:
    """Make a study of recipes, distinguished by their names, or by their files."""
    problems = Problems()
    variants: dict[str, Recipe] = {}
    for path in paths:
        with problems.of(str(path)):
            recipe = recipes.load(path, overrides, plugins)
            further_names = (
                f"{recipe.spec.name}, {path.stem}{f' {number}' if number else ''}"
                for number in itertools.count()
            )
            candidates = itertools.chain([recipe.spec.name], further_names)
            # Two recipes may have one name, and two files one stem.
            name = next(one for one in candidates if one not in (*variants, TEACHER))
            variants[name] = recipe
    problems.raise_if_any(len(paths))
    baseline = next(iter(variants))
    variants = renamed(variants)
    first, *others = (recipe.spec for recipe in variants.values())
    # not the recipe's own name, which is that of its run
    names = [other.name for other in others] or ["study"]
    name = "-".join([first.name, *names])
    # The name is a folder's, and has to fit with the names of the runs in it.
    if len(name) > LONGEST_JOINED:
        name = f"{first.name}-and-{len(others)}-others"
    return Study(name, "", baseline, variants, tuple(range(SEEDS)), (), first.run.folder)
