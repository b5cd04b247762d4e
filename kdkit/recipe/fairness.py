"""Checks that compared recipes differ only in what is compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdkit.errors import RecipeError
from kdkit.recipe.loading import Recipe

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
        for key, theirs, ours in differences(known, recipe.content()):
            if not _is_below(key, (*COMPARED, *allowed)):
                yield Unequal(name, key, ours, theirs)


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


def _line(difference: Unequal, recipes: Mapping[str, Recipe], baseline: str) -> str:
    variant, key = difference.variant, difference.key
    location = [int(step) if step.isdecimal() else step for step in key.split(".")]
    return (
        f"{recipes[variant].source.where(location)}: {variant}: {key}:"
        f" {_short(difference.value)} ({baseline}: {_short(difference.baseline)})"
    )


def advice(keys: Iterable[str]) -> str:
    """Explain how to let variants differ in further keys."""
    words = " ".join(f"--allow {key}" for key in dict.fromkeys(keys))
    return f"to let them differ in this too: {words} (in a study file: `allow:`)"


def _short(value: Any) -> str:
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
