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


def followed(value: Any, names: Iterable[str]) -> tuple[Key, Any]:
    """Follow names of options, keys and positions into a recipe, such as those of a key of its
    content; return them as the recipe writes them (`class`, which Python calls `class_`), and the
    value there, None behind a name that does not exist.
    """
    location: Key = []
    for name in names:
        fields = type(value).model_fields if isinstance(value, BaseModel) else {}
        location.append(fields[name].alias or name if name in fields else name)
        if name in fields:
            value = getattr(value, name)
        elif isinstance(value, Mapping):
            value = value.get(name)
        else:
            is_position = isinstance(value, tuple | list) and name.isdecimal()
            value = value[int(name)] if is_position and int(name) < len(value) else None
    return location, value


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
