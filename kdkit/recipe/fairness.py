"""Checks that compared recipes differ only in what is compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from kdkit.errors import RecipeError, shorten
from kdkit.recipe.loading import Recipe
from kdkit.recipe.walk import followed
from kdkit.recipe.yaml_source import flow

COMPARED = ("losses", "schedule", "teacher", "teachers", "plugins", "seed")
"""Keys that define what is learnt from whom, in which variants may differ, and the seed."""

VIEWS = "teacher.cache.views"
"""A compared key that also determines the student's augmentations, and so must not differ."""


@dataclass(frozen=True)
class Unequal:
    """A key in which a variant differs from the baseline, although it is not compared."""

    variant: str
    key: str
    value: Any
    baseline: Any


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, old value, new value) of the deepest keys in which plain values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{prefix}.{i}")
    # also lists of unequal lengths, whose items do not correspond
    elif old != new:
        yield prefix, old, new


def unequal(
    recipes: Mapping[str, Recipe], baseline: str, allowed: Sequence[str] = ()
) -> Iterator[Unequal]:
    """Find the keys outside of `COMPARED` and `allowed` in which variants differ."""
    known = recipes[baseline].content()
    for name, recipe in recipes.items():
        ours, theirs = _views(recipe), _views(recipes[baseline])
        if ours != theirs and not _is_below(VIEWS, allowed):
            yield Unequal(name, VIEWS, ours, theirs)
    for name, recipe in recipes.items():
        for place, theirs, ours in differences(known, recipe.content()):
            key = written(place, recipe, recipes[baseline])
            if not _is_below(key, (*COMPARED, *allowed)):
                value, known_value = (
                    _told(recipe, place, ours),
                    _told(recipes[baseline], place, theirs),
                )
                yield Unequal(name, key, value, known_value)


def written(key: str, *recipes: Recipe) -> str:
    """Return a key of a recipe's content as the recipes write it: `data.dataset.class`, where
    Python's name is `class_`.
    """
    for recipe in recipes:
        location, _ = followed(recipe.spec, key.split("."))
        # a recipe that does not have the key leaves it as it is
        if (found := ".".join(map(str, location))) != key:
            return found
    return key


def _told(recipe: Recipe, key: str, plain: Any) -> Any:
    """Return the plain value of a key of the content, or the words of options that have some of
    their own.
    """
    _, value = followed(recipe.spec, key.split("."))
    is_worded = isinstance(value, BaseModel) and type(value).__str__ is not BaseModel.__str__
    return str(value) if is_worded else plain


def _is_below(key: str, sections: Iterable[str]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def _views(recipe: Recipe) -> int | None:
    """Return the number of views of an image to which the teachers' caches limit training."""
    data = recipe.spec.data
    caches = [getattr(teacher, "cache", None) for teacher in recipe.spec.all_teachers().values()]
    # without augmentation, all views of an image are the same
    counts = [cache.views for cache in caches if cache is not None and cache.views != "all"]
    return min(counts) if counts and (data.augment or data.timm_augment) else None


def refuse_unequal(
    recipes: Mapping[str, Recipe], baseline: str, allowed: Sequence[str] = ()
) -> None:
    """Check that a comparison is fair.

    Raises:
        RecipeError: it is not; one line a key, with its place and the way to allow it.
    """
    unfair = list(unequal(recipes, baseline, allowed))
    if unfair:
        lines = [_line(difference, recipes, baseline) for difference in unfair]
        free = "variants may differ in losses, schedule and teachers"
        lines.append(f"{free}; {advice(difference.key for difference in unfair)}")
        raise RecipeError("\n".join(lines))


def refuse_mixed(kind: str, values: Mapping[str, str]) -> None:
    """Check that all that come into one table have the same task, or the same deciding score.

    Args:
        kind: `task` or `deciding score`.
        values: its name by that of the variant or the run.

    Raises:
        RecipeError: they have not; says which have which.
    """
    having: dict[str, list[str]] = {}
    for name, value in values.items():
        having.setdefault(value, []).append(name)
    if len(having) > 1:
        told = "; ".join(f"{value}: {shorten(', '.join(names))}" for value, names in having.items())
        raise RecipeError(f"different {kind}s have no common table ({told})")


def _line(difference: Unequal, recipes: Mapping[str, Recipe], baseline: str) -> str:
    variant, key = difference.variant, difference.key
    location = [int(step) if step.isdecimal() else step for step in key.split(".")]
    return (
        f"{recipes[variant].source.where(location)}: {variant}: {key}:"
        f" {short(difference.value)} ({baseline}: {short(difference.baseline)})"
    )


def advice(keys: Iterable[str]) -> str:
    """Explain how to let variants differ in further keys."""
    words = " ".join(f"--allow {key}" for key in dict.fromkeys(keys))
    return f"to let them differ in this too: {words} (in a study file: `allow:`)"


def in_words(value: Any) -> str:
    """Format a plain value as a recipe writes it."""
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else value if isinstance(value, str) else flow(value)


def short(value: Any) -> str:
    """Format a plain value as a recipe writes it, cut off after 60 characters."""
    text = in_words(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
