"""A study: variants of a recipe, the seeds of each, the grid of its values, and the points of its
search.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from kdkit.contracts.options import LONGEST_NAME
from kdkit.contracts.task import ScoreInfo
from kdkit.errors import RecipeError, dotted
from kdkit.recipe import Recipe
from kdkit.recipe.yaml_source import Source
from kdkit.study.spec import Range, Values

TEACHER = "teacher"  # name of the teacher's row in tables and pictures, which no variant may have
STEPS = "steps"  # pseudo-key in `allow`: variants may train longer than the baseline


@dataclass(frozen=True)
class Point:
    """One combination of values in a search: its name, its values by key, and a variant's recipe
    with these values.
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
        allow: keys in which they may differ, in addition to those that define what is learnt from
            whom.
        folder: parent of the study's folder.
        show: scores that its table shows in addition to the usual ones, each with its place in the
            file.
        command: the command that runs it.
        tune: values by key, from which a search chooses for each variant.
        tune_seeds: seeds of the search: their number, or a list.
        points: all points that the search tries, by variant; empty without a search.
    """

    name: str
    question: str
    baseline: str
    variants: Mapping[str, Recipe]
    seeds: tuple[int, ...]
    allow: tuple[str, ...]
    folder: Path
    show: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tune_seeds: int | Sequence[int] = ()
    points: Mapping[str, Sequence[Point]] = field(default_factory=dict)

    @property
    def search(self) -> Study:
        """Return the study that performs the search: every point of every variant, with seeds that
        this study does not use.
        """
        variants = {
            point_name(name, point): point.recipe
            for name, points in self.points.items()
            for point in points
        }
        seeds = self.tune_seeds
        if isinstance(seeds, int):
            # Runs that choose are not those that are told: a lucky seed would count twice.
            seeds = first_seeds(seeds, but=self.seeds)
        baseline = point_name(self.baseline, self.points[self.baseline][0])
        search = replace(
            self,
            name=f"{self.name}-search",
            baseline=baseline,
            variants=renamed(variants),
            seeds=tuple(seeds),
        )
        return search.without_search()

    def chosen(self, points: Mapping[str, Point]) -> Study:
        """Replace each variant by its point of the search."""
        return replace(
            self, variants=renamed({name: point.recipe for name, point in points.items()})
        ).without_search()

    def without_search(self) -> Study:
        """Return the study that remains after the search: the chosen values may differ between
        variants.
        """
        # The search made the variants differ in these keys on purpose.
        return replace(self, allow=(*self.allow, *self.tune), tune={}, points={})

    @property
    def path(self) -> Path:
        """The folder of its runs and findings."""
        return self.folder / self.name

    def columns(self, scores: Iterable[ScoreInfo]) -> list[str]:
        """Name the additional columns of its table: the scores in `show`, and those of them that a
        recipe names under `metrics`.
        """
        named = tuple(
            entry.use for recipe in self.variants.values() for entry in recipe.spec.metrics
        )
        # a score's name begins with that of its metric
        return [*self.show, *(score.name for score in scores if score.name.startswith(named))]

    def recipe(self, variant: str, seed: int) -> Recipe:
        """Return the recipe that is trained for a variant and a seed."""
        recipe = self.variants[variant]
        return replace(recipe, spec=recipe.spec.model_copy(update={"seed": seed}))

    def dump(self) -> str:
        """Write a study file that repeats it and needs no other recipe files than the teachers'."""
        variants = {
            name: recipe.spec.model_dump(
                mode="json",
                by_alias=True,
                exclude_unset=True,
                exclude={"seed"},
            )
            for name, recipe in self.variants.items()
        }
        tune = {"tune": dict(self.tune), "tune_seeds": self.tune_seeds} if self.tune else {}
        content = {
            "name": self.name,
            "question": self.question,
            "baseline": self.baseline,
            "folder": str(self.folder),
            **tune,
            "seeds": list(self.seeds),
            "allow": list(self.allow),
            "show": list(self.show),
            "variants": variants,
        }
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def point_name(variant: str, point: Point) -> str:
    """Name a variant at a point of its search."""
    return f"{variant}, {point.label}"


def renamed(variants: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Rename each recipe to the name of its folder."""
    names = safe(variants)
    return {
        name: replace(recipe, spec=recipe.spec.model_copy(update={"name": names[name]}))
        for name, recipe in variants.items()
    }


def safe(names: Iterable[str]) -> dict[str, str]:
    """Convert each name to a folder name: letters, digits, `.`, `_`, `-`, and no two equal."""
    spelt: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        # leave room for a number and a seed
        plain = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-._")[: LONGEST_NAME - 20] or "variant"
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        spelt[name] = next(word for word in itertools.chain([plain], numbered) if word not in taken)
        taken.add(spelt[name])
    return spelt


def first_seeds(count: int, *, but: Sequence[int]) -> tuple[int, ...]:
    """Return the first `count` of the seeds 0, 1, 2..., skipping some."""
    return tuple(itertools.islice((seed for seed in itertools.count() if seed not in but), count))


class Grid:
    """Values by key path, from a study's `vary:` or `tune:`.

    Args:
        source: the study file, for the places of the values.
        vary: its `vary:`, or its `tune:`.
        word: `vary` or `tune`, for messages.

    Raises:
        RecipeError: a value is given twice, or ranges have different numbers of draws.
    """

    def __init__(self, source: Source, vary: Mapping[str, Values], word: str = "vary") -> None:
        self._source = source
        self._word = word
        self._ranges = [key for key, values in vary.items() if isinstance(values, Range)]
        self._vary = self._drawn(vary)
        self._axes = {
            # Nodes of the file, not plain values, so that an error in a value has its line.
            key: list(zip(self._labels(key), self._nodes(key), strict=True))
            for key in vary
        }

    def refuse_idle_keys(self, recipes: Iterable[Recipe]) -> None:
        """Check that every key exists in some recipe.

        Raises:
            RecipeError: one does not; it may be misspelt.
        """
        known = list(recipes)
        for key in self._vary:
            if not any(has(recipe.spec, key.split(".")) for recipe in known):
                raise self._error(key, "no variant has this key")

    def count(self, recipe: Recipe) -> int:
        """Count the points of the grid for a recipe."""
        return math.prod(map(len, self._parts(self._keys_of(recipe))))

    def points(self, recipe: Recipe) -> Iterator[tuple[list[str], dict[str, yaml.Node]]]:
        """List the points of the grid for a recipe, restricted to keys that the recipe has: the
        point's name, key by key, and its values with their places.
        """
        # Keys that a recipe lacks are no axis for it: an idle axis would train equal runs.
        keys = self._keys_of(recipe)
        for parts in itertools.product(*self._parts(keys)):
            point = {key: value for part in parts for key, value in part.items()}
            yield [point[key][0] for key in keys], {key: point[key][1] for key in keys}

    def _parts(self, keys: Sequence[str]) -> list[list[dict[str, tuple[str, yaml.Node]]]]:
        """List what the points of the grid combine: the values of each key, and those of all ranges
        together.
        """
        parts = [[{key: value} for value in self._axes[key]] for key in keys]
        if ranges := [key for key in keys if key in self._ranges]:
            parts = [part for key, part in zip(keys, parts, strict=True) if key not in ranges]
            # Drawn together: a grid of several ranges would try each value many times.
            drawn = zip(*(self._axes[key] for key in ranges), strict=True)
            parts.append([dict(zip(ranges, values, strict=True)) for values in drawn])
        return parts

    def _drawn(self, vary: Mapping[str, Values]) -> dict[str, Sequence[Any]]:
        """Replace each range by its draws; all but the first are in random order."""
        values: dict[str, Sequence[Any]] = {}
        for key, one in vary.items():
            if isinstance(one, Range):
                values[key] = one.draw(key, shuffle=key != self._ranges[0])
                if len(values[key]) != (known := len(values[self._ranges[0]])):
                    says = f"{one.draws} draws, but {known} of {self._ranges[0]}; ranges are drawn"
                    raise self._error(key, f"{says} together")
            else:
                values[key] = one
        return values

    def _nodes(self, key: str) -> list[yaml.Node]:
        if key in self._ranges:
            return self._source.placed([self._word, key], self._vary[key])
        return self._source.items([self._word, key])

    def _keys_of(self, recipe: Recipe) -> list[str]:
        return [key for key in self._axes if has(recipe.spec, key.split("."))]

    def _labels(self, key: str) -> list[str]:
        """Label each value of a key, as in `weight 0.5`, with as many of the key's last steps as
        distinguish it from the other keys.
        """
        steps = key.split(".")
        endings = (".".join(steps[-count:]) for count in range(1, len(steps) + 1))
        called = next(
            end
            for end in endings
            # The whole key always tells it apart.
            if end == key or sum(f".{other}".endswith(f".{end}") for other in self._vary) == 1
        )
        labels = [f"{called} {_label(value)}" for value in self._vary[key]]
        # Folders and rows go by the labels.
        if len(set(labels)) < len(labels):
            raise self._error(key, "a value is given twice")
        return labels

    def _error(self, key: str, says: str) -> RecipeError:
        return RecipeError(
            f"{self._source.where([self._word, key])}: {dotted([self._word, key])}: {says}"
        )


def has(value: Any, steps: Sequence[str]) -> bool:
    """Check whether a part of a valid recipe has that key, or an item of that name."""
    if not steps:
        return True
    first, *rest = steps
    # By the keys that a recipe is written with: a field may have another name, as `from` is
    # `from_`.
    if isinstance(value, BaseModel):
        named = {
            field.alias or name: getattr(value, name)
            for name, field in type(value).model_fields.items()
        }
        return first in named and has(named[first], rest)
    if isinstance(value, Mapping):
        # The last step may be new: options of a plugin, such as `config`, are open mappings.
        return not rest or (first in value and has(value[first], rest))
    if isinstance(value, tuple | list):
        # As for overrides, an item of a list goes by its position, its name or its plugin.
        items = [
            item
            for i, item in enumerate(value)
            if first in (str(i), getattr(item, "name", None), getattr(item, "use", None))
        ]
        # The first of several of one name is the one that an override would change.
        return bool(items) and has(items[0], rest)
    return False


def _label(value: Any) -> str:
    """Format a value of the grid in a few words: for a mapping, the plugin that it uses."""
    if isinstance(value, Mapping):
        return next(
            (str(value[key]) for key in ("name", "use", "model", "recipe") if key in value), None
        ) or ", ".join(f"{key} {_label(part)}" for key, part in value.items())
    if isinstance(value, list):
        return "-".join(map(_label, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
