"""The grid of a study: which recipes have its keys, and the names of its points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from kdkit.errors import RecipeError, dotted
from kdkit.recipe import Recipe
from kdkit.recipe.yaml_source import Source


class Grid:
    """Values by key path, from a study's `vary:` or `tune:`.

    Args:
        source: the study file, for the places of the values.
        vary: its `vary:`, or its `tune:`.
        word: `vary` or `tune`, for messages.

    Raises:
        RecipeError: a value is given twice.
    """

    def __init__(
        self, source: Source, vary: Mapping[str, Sequence[Any]], word: str = "vary"
    ) -> None:
        self._source = source
        self._vary = vary
        self._word = word
        self._axes = {
            key: list(zip(self._labels(key), source.items([word, key]), strict=True))
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
        return math.prod(len(self._axes[key]) for key in self._keys_of(recipe))

    def points(self, recipe: Recipe) -> Iterator[tuple[list[str], dict[str, yaml.Node]]]:
        """List the points of the grid for a recipe, restricted to keys that the recipe has: the
        point's name, key by key, and its values with their places.
        """
        keys = self._keys_of(recipe)
        for point in itertools.product(*(self._axes[key] for key in keys)):
            yield (
                [label for label, _ in point],
                {key: node for key, (_, node) in zip(keys, point, strict=True)},
            )

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
            if end == key or sum(f".{other}".endswith(f".{end}") for other in self._vary) == 1
        )
        labels = [f"{called} {_label(value)}" for value in self._vary[key]]
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
    if isinstance(value, BaseModel):
        named = {
            field.alias or name: getattr(value, name)
            for name, field in type(value).model_fields.items()
        }
        return first in named and has(named[first], rest)
    if isinstance(value, Mapping):
        return not rest or (first in value and has(value[first], rest))
    if isinstance(value, tuple | list):
        items = [
            item
            for i, item in enumerate(value)
            if first in (str(i), getattr(item, "name", None), getattr(item, "use", None))
        ]
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
