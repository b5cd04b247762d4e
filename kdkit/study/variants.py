"""Loads a study: variants of a recipe, over a grid and several seeds; every problem is told with
file and line.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from kdkit import recipe as recipes
from kdkit.contracts.options import (
    LONGEST_NAME,
    RUN_NAME,
    FolderPath,
    Options,
    RecipePath,
    Text,
    path_of,
)
from kdkit.errors import RecipeError, dotted, one_line, shorten, shown, suggest
from kdkit.recipe import Recipe
from kdkit.recipe.explain import explain_source
from kdkit.recipe.yaml_source import Source, override_words
from kdkit.study.grid import Grid, has

SEEDS = 3  # where nothing says how many
MARKS = ("variants", "vary", "tune", "base")  # keys that a study has and a recipe has not
Shown = Literal[
    "loss",
    "late_loss",
    "top5",
    "balanced_accuracy",
    "macro_f1",
    "nll",
    "ece",
    "kl_to_teacher",
    "logit_difference",
]
MOST_SEEDS = 1000
MOST_VARIANTS = 1000  # those of the grid among them, and all points of a search
Seed = Annotated[int, Field(ge=0, strict=True)]
Seeds = (
    Annotated[int, Field(gt=0, le=MOST_SEEDS, strict=True)]
    | Annotated[list[Seed], Field(min_length=1, max_length=MOST_SEEDS)]
)


class StudySpec(Options):
    """A study: what is compared, and over which seeds."""

    name: str = Field(
        pattern=RUN_NAME,
        max_length=LONGEST_NAME,
        description="Name of the study and of its folder.",
    )
    question: str = Field(default="", description="What it asks, for its report.")
    base: RecipePath | dict[str, Any] | None = Field(
        default=None,
        description="Recipe that the variants build on: a file, or a recipe written out.",
    )
    baseline: str | None = Field(
        default=None, description="Variant that the others are compared with (default: the first)."
    )
    variants: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict,
        description=(
            "By name, what is merged over the base; `recipe: FILE` takes another recipe in its"
            " place."
        ),
    )
    vary: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict,
        description=(
            "Values by key path: every variant that has the key is trained with each; several keys"
            " are a grid."
        ),
    )
    tune: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict,
        description=(
            "Values by key path, which all variants have: each is trained with all combinations,"
            " and goes on with the one that is best on validation data."
        ),
    )
    tune_seeds: Seeds = Field(
        default=2,
        description="Of the search: how many (the first that are not in `seeds`), or which.",
    )
    seeds: Seeds = Field(default=SEEDS, description="How many (0, 1, 2...), or which.")
    allow: tuple[str, ...] = Field(
        default=(),
        description="Keys in which variants may differ although they are not what is compared.",
    )
    show: tuple[Shown, ...] = Field(default=(), description="Further columns of the table.")
    folder: FolderPath | None = Field(
        default=None, description="In place of the recipes' `run.folder`."
    )

    @field_validator("seeds", "tune_seeds")
    @classmethod
    def _once_each(cls, value: int | list[int]) -> int | list[int]:
        if isinstance(value, list) and len(set(value)) < len(value):
            raise ValueError("a seed is given twice")
        return value


@dataclass(frozen=True)
class Point:
    """One combination of values in a search: what it is called, its values by key, and a
    variant's recipe with these.
    """

    label: str
    values: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Study:
    """Variants, each a valid recipe, and the seeds that each is trained with.

    Attributes:
        variants: recipes by the variants' names, the baseline among them; their own `seed` does not
            count.
        allow: keys in which they may differ beside those that say what is learnt from whom.
        folder: in which the study has its folder.
        show: metrics that its table has beside the usual ones.
        command: what asks for it.
        tune: values by key, of which a search chooses for each variant.
        tune_seeds: of the search, how many or which.
        points: of each variant, all that the search tries; empty without a search.
    """

    name: str
    question: str
    baseline: str
    variants: Mapping[str, Recipe]
    seeds: tuple[int, ...]
    allow: tuple[str, ...]
    folder: Path
    show: tuple[str, ...] = ()
    command: str = ""
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tune_seeds: int | Sequence[int] = ()
    points: Mapping[str, Sequence[Point]] = field(default_factory=dict)

    @property
    def search(self) -> Study:
        """The study that a search is: every point of every variant, with seeds that this one
        does not have.
        """
        places = {
            point_name(name, point): point.recipe
            for name, points in self.points.items()
            for point in points
        }
        wanted = self.tune_seeds
        seeds = tuple(wanted) if isinstance(wanted, Sequence) else _first(wanted, but=self.seeds)
        baseline = point_name(self.baseline, self.points[self.baseline][0])
        search = replace(
            self,
            name=f"{self.name}-search",
            baseline=baseline,
            variants=_renamed(places),
            seeds=seeds,
        )
        return search.without_search()

    def chosen(self, points: Mapping[str, Point]) -> Study:
        """This study with each variant at its point of the search."""
        return replace(
            self, variants=_renamed({name: point.recipe for name, point in points.items()})
        ).without_search()

    def without_search(self) -> Study:
        """What is left to do when the search is over: what it has chosen may differ."""
        return replace(self, allow=(*self.allow, *self.tune), tune={}, points={})

    @property
    def path(self) -> Path:
        """Where its runs and findings are kept."""
        return self.folder / self.name

    def recipe(self, variant: str, seed: int) -> Recipe:
        """What is trained for a variant and a seed."""
        known = self.variants[variant]
        return replace(known, spec=known.spec.model_copy(update={"seed": seed}))

    def dump(self) -> str:
        """A study file that repeats it without any other file of recipes than the teachers'."""
        specs = {name: recipe.spec for name, recipe in self.variants.items()}
        written = {
            name: spec.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"seed"})
            for name, spec in specs.items()
        }
        content = {
            "name": self.name,
            "question": self.question,
            "baseline": self.baseline,
            "folder": str(self.folder),
        }
        tune = {"tune": dict(self.tune), "tune_seeds": self.tune_seeds} if self.tune else {}
        rest = {
            **tune,
            "seeds": list(self.seeds),
            "allow": list(self.allow),
            "show": list(self.show),
            "variants": written,
        }
        return yaml.safe_dump({**content, **rest}, sort_keys=False, allow_unicode=True, width=120)


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
        seeds: how many, in place of the study's own.
        allow: keys in which variants may differ, beside the study's own.

    Raises:
        RecipeError: all problems found in any variant, one line each.
    """
    if not paths:
        raise RecipeError("name a study file, or recipes")
    if seeds is not None and not 1 <= seeds <= MOST_SEEDS:
        raise RecipeError(f"between 1 and {MOST_SEEDS} seeds are possible, not {shown(seeds)}")
    opened = {path: Source(path) for path in paths}
    studies = [path for path, source in opened.items() if any(key in source.data for key in MARKS)]
    if studies and len(paths) > 1:
        raise RecipeError(
            f"{studies[0]}: is a study, which is compared by itself: give one study, or recipes"
            " only"
        )
    found = (
        _Loader(opened[studies[0]], overrides, plugins).study()
        if studies
        else _of_recipes(list(opened), overrides, plugins)
    )
    found = replace(found, seeds=tuple(range(seeds)) if seeds else found.seeds)
    if shared := {*found.seeds} & (
        {*found.tune_seeds} if isinstance(found.tune_seeds, Sequence) else set()
    ):
        where = opened[studies[0]].where(["tune_seeds"])
        raise RecipeError(
            f"{where}: tune_seeds: {min(shared)} is one of the study's own seeds; runs that choose"
            " are not those that are told"
        )
    words = [*map(_seen_from_here, paths), *override_words(overrides or {})]
    words += [
        *(["--seeds", str(seeds)] if seeds else []),
        *(word for key in allow for word in ("--allow", key)),
    ]
    command = shlex.join(
        [
            "kdkit",
            "compare",
            *words,
            *(word for path in plugins for word in ("--plugins", _seen_from_here(path))),
        ]
    )
    return replace(found, allow=(*found.allow, *allow), command=command)


def point_name(variant: str, point: Point) -> str:
    """What a variant at a point of its search is called."""
    return f"{variant}, {point.label}"


def _first(count: int, *, but: Sequence[int]) -> tuple[int, ...]:
    """So many of the seeds 0, 1, 2..., without some."""
    return tuple(itertools.islice((seed for seed in itertools.count() if seed not in but), count))


def _seen_from_here(path: Path) -> str:
    return str(path).removeprefix(f"{Path.cwd()}/")


def safe(names: Iterable[str]) -> dict[str, str]:
    """What each name is called in a folder: letters, digits, `.`, `_`, `-`, and no two alike."""
    called: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        # with room for a number and a seed
        plain = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-._")[: LONGEST_NAME - 20] or "variant"
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        called[name] = next(
            word for word in itertools.chain([plain], numbered) if word not in taken
        )
        taken.add(called[name])
    return called


def _of_recipes(
    paths: Sequence[Path], overrides: Mapping[str, Any] | None, plugins: Sequence[Path]
) -> Study:
    problems, variants = _Problems(), dict[str, Recipe]()
    for path in paths:
        with problems.of(str(path)):
            one = recipes.load(path, overrides, plugins)
            more = (
                f"{one.spec.name}, {path.stem}{f' {number}' if number else ''}"
                for number in itertools.count()
            )
            variants[
                next(
                    name for name in itertools.chain([one.spec.name], more) if name not in variants
                )
            ] = one
    problems.raise_if_any(len(paths))
    renamed = _renamed(variants)
    first, *others = renamed.values()
    # a run of its own has its name
    joined = (
        "-".join(one.spec.name for one in renamed.values())
        if others
        else f"{first.spec.name}-study"
    )
    name = joined if len(joined) <= 60 else f"{first.spec.name}-and-{len(others)}-others"
    return Study(
        name, "", next(iter(variants)), renamed, tuple(range(SEEDS)), (), first.spec.run.folder
    )


class _Loader:
    """One study file on its way to a study."""

    def __init__(
        self, source: Source, overrides: Mapping[str, Any] | None, plugins: Sequence[Path]
    ) -> None:
        self.source, self.plugins = source, plugins
        try:
            self.spec = StudySpec.model_validate(source.data)
        except ValidationError as error:
            raise RecipeError(explain_source(error, StudySpec, source)) from None
        folder = {"run.folder": str(self.spec.folder)} if self.spec.folder is not None else {}
        self.overrides = {**folder, **(overrides or {}), "name": self.spec.name}
        self._refuse_keys()

    def study(self) -> Study:
        spec, names = self.spec, list(self.spec.variants) or [self.spec.name]
        problems = _Problems()
        sources = dict[str, Source]()
        plain = dict[str, Recipe]()
        for name in names:
            with problems.of(name):
                sources[name] = self._source(name)
                plain[name] = self._read(sources[name], {})
        problems.raise_if_any(len(names))
        grid = Grid(self.source, self.spec.vary)
        grid.refuse_idle_keys(plain.values())
        if (count := sum(map(grid.count, plain.values()))) > MOST_VARIANTS:
            raise self._error(["vary"], f"makes {count:,} variants, more than {MOST_VARIANTS:,}")
        variants: dict[str, Recipe] = {}
        firsts: dict[str, str] = {}  # of each variant, its first point of the grid
        for name, one in plain.items():
            for labels, values in grid.points(one):
                called = ", ".join([*([name] if spec.variants or not labels else []), *labels])
                firsts.setdefault(name, called)
                with problems.of(called):
                    variants[called] = self._read(sources[name], values) if values else one
        problems.raise_if_any(len(names))
        baseline = self._baseline(list(variants), firsts)
        seeds = tuple(range(spec.seeds)) if isinstance(spec.seeds, int) else tuple(spec.seeds)
        folder = variants[baseline].spec.run.folder
        return Study(
            spec.name,
            spec.question,
            baseline,
            _renamed(variants),
            seeds,
            (*spec.allow, *spec.vary),
            folder,
            spec.show,
            tune=spec.tune,
            tune_seeds=spec.tune_seeds,
            points=self._points(variants) if spec.tune else {},
        )

    def _points(self, variants: Mapping[str, Recipe]) -> dict[str, tuple[Point, ...]]:
        """All combinations of the values to be tuned, for every variant the same."""
        tune = self.spec.tune
        grid = Grid(self.source, self.spec.tune, "tune")
        problems = _Problems()
        if (count := len(variants) * math.prod(map(len, tune.values()))) > MOST_VARIANTS:
            raise self._error(
                ["tune"],
                f"makes {count:,} points, those of all variants together, more than"
                f" {MOST_VARIANTS:,}",
            )
        for name, one in variants.items():
            with problems.of(name):
                for key in tune:
                    if not has(one.spec, key.split(".")):
                        raise self._error(
                            ["tune", key],
                            "every variant needs this key, or some would be searched more than"
                            " others",
                        )
                if not one.spec.data.validation:
                    raise self._error(
                        ["tune"], "the search chooses on validation data; set `data.validation`"
                    )
        problems.raise_if_any(len(variants))
        found: dict[str, tuple[Point, ...]] = {}
        for name, one in variants.items():
            with problems.of(name):
                combinations = zip(grid.points(one), itertools.product(*tune.values()), strict=True)
                found[name] = tuple(
                    Point(
                        ", ".join(labels),
                        dict(zip(tune, values, strict=True)),
                        self._read(one.source, nodes),
                    )
                    for (labels, nodes), values in combinations
                )
        problems.raise_if_any(len(variants))
        return found

    def _refuse_keys(self) -> None:
        for word, done in (("vary", "varies"), ("tune", "tunes")):
            for key in getattr(self.spec, word):
                if key == "seed":
                    raise self._error([word, key], "the seeds of a study are its `seeds:`")
                if key in self.overrides:
                    raise RecipeError(f"override: {key}: is what the study {done}")
        for key in self.spec.tune:
            if key in self.spec.vary:
                raise self._error(["tune", key], "is what the study varies")

    @functools.cached_property
    def _base(self) -> Source | None:
        path = self.spec.base
        if isinstance(path, Path) and not os.path.isfile(path):
            raise self._error(["base"], f"no such file: {path}")
        return (
            Source(path)
            if isinstance(path, Path)
            else self.source.section(["base"])
            if path is not None
            else None
        )

    def _source(self, name: str) -> Source:
        """A variant's keys over its base, each with the place where it is written."""
        where = ["variants", name]
        own, base = self.source.section(where, but=["recipe"]), self._base
        if (written := (self.spec.variants.get(name) or {}).get("recipe")) is not None:
            try:
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
        wanted = self.spec.baseline
        if wanted is not None and wanted not in names and wanted not in firsts:
            raise self._error(
                ["baseline"], f"there is no variant '{wanted}'; {suggest(wanted, names)}"
            )
        return names[0] if wanted is None else wanted if wanted in names else firsts[wanted]

    def _error(self, location: Sequence[str], says: str) -> RecipeError:
        return RecipeError(f"{self.source.where(location)}: {dotted(location)}: {one_line(says)}")


class _Problems:
    """What is wrong with some variants: each line once, and with the variants' names where
    others do not have it.
    """

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def of(self, variant: str) -> Iterator[None]:
        """Collect what is wrong with a variant."""
        try:
            yield
        except RecipeError as error:
            for line in str(error).splitlines():
                self.found.setdefault(line, []).append(variant)

    def raise_if_any(self, variants: int) -> None:
        """Raise them all, if any; there are so many variants."""
        if self.found:
            told = (
                (
                    line
                    if len(names) >= variants
                    else f"{line} (variant {shorten(one_line('; '.join(names)))})"
                )
                for line, names in self.found.items()
            )
            raise RecipeError("\n".join(told))


def _renamed(variants: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The recipes, each called as its folder is."""
    words = safe(variants)
    return {
        name: replace(one, spec=one.spec.model_copy(update={"name": words[name]}))
        for name, one in variants.items()
    }
