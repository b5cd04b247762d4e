"""Checks that compared recipes differ only in what is compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdkit.errors import RecipeError
from kdkit.recipe.loading import Recipe

COMPARED = ("losses", "schedule", "teacher", "teachers", "plugins", "seed")
"""Keys of a recipe that define what is learnt from whom; a study's variants may differ in them.
The seed differs by design.
"""

VIEWS = "teacher.cache.views"
"""A compared key that also determines the student's augmentations, and so must not differ."""


@dataclass(frozen=True)
class Unequal:
    """A key in which a variant differs from the baseline, although it is not part of the
    comparison.
    """

    variant: str
    key: str
    value: Any
    baseline: Any


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the (key, old value, new value) of the deepest keys in which two plain values
    differ.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{prefix}.{i}")
    elif old != new:
        yield prefix, old, new


def unequal(
    recipes: Mapping[str, Recipe], baseline: str, allowed: Sequence[str] = ()
) -> Iterator[Unequal]:
    """Find where the variants differ from the baseline in more than `COMPARED` and the `allowed`
    keys (and keys below them).
    """
    known = recipes[baseline].content()
    for name, recipe in recipes.items():
        ours, theirs = _views(recipe), _views(recipes[baseline])
        if ours != theirs and not any(
            free == VIEWS or VIEWS.startswith(f"{free}.") for free in allowed
        ):
            yield Unequal(name, VIEWS, ours, theirs)
    for name, recipe in recipes.items():
        for key, theirs, ours in differences(known, recipe.content()):
            if not any(key == free or key.startswith(f"{free}.") for free in (*COMPARED, *allowed)):
                yield Unequal(name, key, ours, theirs)


def _views(recipe: Recipe) -> int | None:
    """Return the maximum number of views of an image that the recipe trains on, as its teachers'
    caches specify it.
    """
    data, caches = (
        recipe.spec.data,
        [getattr(one, "cache", None) for one in recipe.spec.all_teachers().values()],
    )
    counts = [cache.views for cache in caches if cache is not None and cache.views != "all"]
    return min(counts) if counts and (data.augment or data.timm_augment) else None


def refuse_unequal(
    recipes: Mapping[str, Recipe], baseline: str, allowed: Sequence[str] = ()
) -> None:
    """Check that a comparison is fair.

    Raises:
        RecipeError: it is not; one line a key, with its place and the way to allow it.
    """
    found = list(unequal(recipes, baseline, allowed))
    if found:
        free = "variants may differ in losses, schedule and teachers"
        raise RecipeError(
            "\n".join(
                [
                    *(_told(one, recipes, baseline) for one in found),
                    f"{free}; {advice(one.key for one in found)}",
                ]
            )
        )


def _told(one: Unequal, recipes: Mapping[str, Recipe], baseline: str) -> str:
    location = [int(step) if step.isdecimal() else step for step in one.key.split(".")]
    return (
        f"{recipes[one.variant].source.where(location)}: {one.variant}: {one.key}:"
        f" {_short(one.value)} ({baseline}: {_short(one.baseline)})"
    )


def advice(keys: Iterable[str]) -> str:
    """Explain how to let variants differ in further keys."""
    words = " ".join(f"--allow {key}" for key in dict.fromkeys(keys))
    return f"to let them differ in this too: {words} (in a study file: `allow:`)"


def _short(value: Any) -> str:
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
