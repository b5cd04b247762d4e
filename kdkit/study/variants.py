"""A study: variants of a recipe, the seeds of each, and the points of its search."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from kdkit.contracts.options import LONGEST_NAME
from kdkit.contracts.task import ScoreInfo
from kdkit.recipe import Recipe


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
            seeds = _first(seeds, but=self.seeds)
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
                mode="json", by_alias=True, exclude_unset=True, exclude={"seed"}
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


def _first(count: int, *, but: Sequence[int]) -> tuple[int, ...]:
    """Return the first `count` of the seeds 0, 1, 2..., skipping some."""
    return tuple(itertools.islice((seed for seed in itertools.count() if seed not in but), count))
