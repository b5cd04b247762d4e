"""Walks the values of a recipe: all of them, the models, the Python files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kdkit.contracts.model_source import ModelOptions

Key = list[str | int]
"""Location of a value in a recipe."""


def leaves(
    value: Any, location: Sequence[str | int] = (), but: Callable[[Any], bool] = lambda field: False
) -> Iterable[tuple[Key, Any]]:
    """Yield every leaf value of a section with its location; `but` selects options to leave out."""
    # an empty list has no leaves, and is none itself
    if not isinstance(value, BaseModel | Mapping | tuple | list):
        yield [*location], value
    for key, field, item in _items(value, location):
        if field is None or not but(field):
            yield from leaves(item, key, but)


def models_in(value: Any, location: Sequence[str | int] = ()) -> Iterable[tuple[Key, ModelOptions]]:
    """Yield every model in a section of the recipe, with its location."""
    if isinstance(value, ModelOptions):
        yield [*location], value
        return
    for key, _, item in _items(value, location):
        yield from models_in(item, key)


def code_in(value: Any, location: Sequence[str | int] = ()) -> Iterable[tuple[Key, Path]]:
    """Yield the Python files that a section of the recipe runs, with their locations.

    `plugins` are not among them.
    """
    for key, field, item in _items(value, location):
        if field is not None and is_marked(field, "code") and isinstance(item, Path):
            yield key, item
        else:
            yield from code_in(item, key)


def _items(value: Any, location: Sequence[str | int]) -> Iterator[tuple[Key, Any, Any]]:
    """Yield (location, field of a model or None, value) of what a value holds."""
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            yield [*location, field.alias or name], field, getattr(value, name)
    elif isinstance(value, Mapping):
        yield from (([*location, key], None, item) for key, item in value.items())
    elif isinstance(value, tuple | list):
        yield from (([*location, i], None, item) for i, item in enumerate(value))


def is_bookkeeping(field: Any) -> bool:
    """Check whether an option changes no result, such as the location of files."""
    return is_marked(field, "bookkeeping")


def is_marked(field: Any, mark: str) -> bool:
    """Check whether an option's definition carries the mark."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(mark))
