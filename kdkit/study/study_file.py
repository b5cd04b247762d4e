"""Reads a study file: every variant, over its grid and its search."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kdkit import recipe as recipes
from kdkit.contracts.options import Text, path_of
from kdkit.errors import RecipeError, dotted, one_line, shorten, suggest
from kdkit.recipe import Recipe
from kdkit.recipe.explain import explain_source
from kdkit.recipe.yaml_source import Source
from kdkit.study.spec import StudySpec
from kdkit.study.variants import TEACHER, Grid, Point, Study, has, renamed

AS_WRITTEN = "as written"  # name of a search's base without the values of a grid
MOST_VARIANTS = 1000  # including those of the grid, and all points of a search


class StudyFile:
    """A study file, from which a study is made.

    Args:
        source: the file.
        overrides: values by `key.path` for all variants.
        plugins: further plugin files or folders.

    Raises:
        RecipeError: a key of the study's own is wrong.
    """

    def __init__(
        self, source: Source, overrides: Mapping[str, Any] | None, plugins: Sequence[Path]
    ) -> None:
        self.source, self.plugins = source, plugins
        try:
            self.spec = StudySpec.model_validate(source.data)
        except ValidationError as error:
            raise RecipeError(explain_source(error, StudySpec, source)) from None
        folder = {"run.folder": str(self.spec.folder)} if self.spec.folder is not None else {}
        # Each variant needs some name to be valid; `renamed` gives it its own.
        self.overrides = {**folder, **(overrides or {}), "name": self.spec.name}
        self._refuse_keys()

    def study(self) -> Study:
        """Read every variant, at every point of its grid and of its search.

        Raises:
            RecipeError: all problems found in any variant, one line each.
        """
        spec = self.spec
        variants, firsts = self._variants()
        if TEACHER in variants:
            says = "is the name of the teacher's row; give the variant another one"
            raise self._error(["variants", TEACHER], says)
        baseline = self._baseline(list(variants), firsts)
        return Study(
            spec.name,
            spec.question,
            baseline,
            renamed(variants),
            tuple(range(spec.seeds)) if isinstance(spec.seeds, int) else tuple(spec.seeds),
            (*spec.allow, *spec.vary),
            variants[baseline].spec.run.folder,
            {
                name: f"{self.source.where(['show', i])}: show.{i}"
                for i, name in enumerate(spec.show)
            },
            tune=spec.tune,
            tune_seeds=spec.tune_seeds,
            points=self._points(variants) if spec.tune else {},
        )

    def baseline(self, study: Study) -> tuple[str, Recipe]:
        """Return the name and the recipe of the baseline, as written if a grid varies it.

        Args:
            study: what this file says.
        """
        _, plain = self._plain_variants()
        name = self.spec.baseline or next(iter(plain))
        if name not in plain:
            return study.baseline, study.variants[study.baseline]
        return (name if self.spec.variants else AS_WRITTEN), plain[name]

    def _variants(self) -> tuple[dict[str, Recipe], dict[str, str]]:
        """Read the variants at every point of the grid, and name the first point of each."""
        sources, plain = self._plain_variants()
        grid = Grid(self.source, self.spec.vary)
        # Before points are made, which leave out keys that a recipe does not have.
        grid.refuse_idle_keys(plain.values())
        # Counted before any recipe is read: the product of a few lists may not fit into memory.
        if (count := sum(map(grid.count, plain.values()))) > MOST_VARIANTS:
            raise self._error(["vary"], f"makes {count:,} variants, more than {MOST_VARIANTS:,}")
        problems = Problems()
        variants: dict[str, Recipe] = {}
        firsts: dict[str, str] = {}
        for name, recipe in plain.items():
            for labels, values in grid.points(recipe):
                named = self.spec.variants or not labels
                point = ", ".join([name, *labels] if named else labels)
                # A baseline that is varied itself stands for its first point.
                firsts.setdefault(name, point)
                with problems.of(point):
                    # A grid may leave a variant alone that has none of its keys.
                    variants[point] = self._read(sources[name], values) if values else recipe
        problems.raise_if_any(len(plain))
        return variants, firsts

    def _plain_variants(self) -> tuple[dict[str, Source], dict[str, Recipe]]:
        """Read the variants as they are written, without the values of a grid or a search."""
        names = list(self.spec.variants) or [self.spec.name]
        problems = Problems()
        sources: dict[str, Source] = {}
        plain: dict[str, Recipe] = {}
        for name in names:
            with problems.of(name):
                sources[name] = self._source(name)
                plain[name] = self._read(sources[name], {})
        # Before points are read: they would tell the same problems once more each.
        problems.raise_if_any(len(names))
        return sources, plain

    def _points(self, variants: Mapping[str, Recipe]) -> dict[str, tuple[Point, ...]]:
        """Read every variant at all combinations of the values to be tuned."""
        tune = self.spec.tune
        grid = Grid(self.source, tune, "tune")
        self._refuse_search(variants)
        problems = Problems()
        points: dict[str, tuple[Point, ...]] = {}
        for name, recipe in variants.items():
            with problems.of(name):
                # The grid has nodes with their places in the file; a point also needs the plain
                # values.
                combinations = zip(
                    grid.points(recipe), itertools.product(*tune.values()), strict=True
                )
                points[name] = tuple(
                    Point(
                        ", ".join(labels),
                        dict(zip(tune, values, strict=True)),
                        self._read(recipe.source, nodes),
                    )
                    for (labels, nodes), values in combinations
                )
        problems.raise_if_any(len(variants))
        return points

    def _refuse_search(self, variants: Mapping[str, Recipe]) -> None:
        """Check that every variant can be searched.

        Raises:
            RecipeError: one lacks a key that is tuned, or validation data; there are too many
                points.
        """
        tune = self.spec.tune
        problems = Problems()
        if (count := len(variants) * math.prod(map(len, tune.values()))) > MOST_VARIANTS:
            raise self._error(
                ["tune"],
                f"makes {count:,} points, those of all variants together, more than"
                f" {MOST_VARIANTS:,}",
            )
        for name, recipe in variants.items():
            with problems.of(name):
                for key in tune:
                    if not has(recipe.spec, key.split(".")):
                        raise self._error(
                            ["tune", key],
                            "every variant needs this key, or some would be searched more than"
                            " others",
                        )
                if not recipe.spec.data.validation:
                    raise self._error(
                        ["tune"], "the search chooses on validation data; set `data.validation`"
                    )
        problems.raise_if_any(len(variants))

    def _refuse_keys(self) -> None:
        """Check that no varied or tuned key is also given elsewhere.

        Raises:
            RecipeError: one is given elsewhere.
        """
        for word, done in (("vary", "varies"), ("tune", "tunes")):
            for key in getattr(self.spec, word):
                # Seeds are paired between variants, which a variant for each seed would break.
                if key == "seed":
                    raise self._error([word, key], "the seeds of a study are its `seeds:`")
                if key in self.overrides:
                    raise RecipeError(f"override: {key}: is what the study {done}")
        for key in self.spec.tune:
            if key in self.spec.vary:
                raise self._error(["tune", key], "is what the study varies")

    @functools.cached_property
    def _base(self) -> Source | None:
        base = self.spec.base
        if base is None:
            return None
        if not isinstance(base, Path):
            return self.source.section(["base"])
        if not os.path.isfile(base):
            raise self._error(["base"], f"no such file: {base}")
        return Source(base)

    def _source(self, name: str) -> Source:
        """Merge a variant's keys over its base; each key retains the place where it is written."""
        where = ["variants", name]
        own = self.source.section(where, but=["recipe"])
        base = self._base
        if (written := (self.spec.variants.get(name) or {}).get("recipe")) is not None:
            try:
                # Not yet validated: the value may be a number or a list, which `isfile` below
                # refuses.
                path = path_of(written) if isinstance(written, Text) else Path()
            except ValueError as error:
                raise self._error([*where, "recipe"], str(error)) from None
            if not os.path.isfile(path):
                raise self._error([*where, "recipe"], f"no such file: {shorten(str(written))}")
            base = Source(path)
        return own.over(base) if base else own

    def _read(self, source: Source, values: Mapping[str, yaml.Node]) -> Recipe:
        return recipes.read(source.changed({**self.overrides, **values}), self.plugins)

    def _baseline(self, names: Sequence[str], firsts: Mapping[str, str]) -> str:
        """Find the variant that the others are compared with: the first, or the one that the file
        names; if that one is varied, its first point.
        """
        baseline = self.spec.baseline
        if baseline is None:
            return names[0]
        if baseline in names:
            return baseline
        if baseline not in firsts:
            raise self._error(
                ["baseline"], f"there is no variant '{baseline}'; {suggest(baseline, names)}"
            )
        return firsts[baseline]

    def _error(self, location: Sequence[str], says: str) -> RecipeError:
        return RecipeError(f"{self.source.where(location)}: {dotted(location)}: {one_line(says)}")


class Problems:
    """Collects errors in variants: each line once, with the names of the variants unless all have
    it.
    """

    def __init__(self) -> None:
        self._variants: dict[str, list[str]] = {}  # by line

    @contextlib.contextmanager
    def of(self, variant: str) -> Iterator[None]:
        """Collect the errors of a variant raised inside the block."""
        try:
            yield
        except RecipeError as error:
            for line in str(error).splitlines():
                self._variants.setdefault(line, []).append(variant)

    def raise_if_any(self, variants: int) -> None:
        """Raise all errors, if any; `variants` is the number of variants."""
        lines = [
            (
                line
                if len(names) >= variants
                else f"{line} (variant {shorten(one_line('; '.join(names)))})"
            )
            for line, names in self._variants.items()
        ]
        if lines:
            raise RecipeError("\n".join(lines))
