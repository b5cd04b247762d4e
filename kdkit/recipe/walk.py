"""Walks the values of a recipe: all of them, the models, the Python files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kdkit.contracts.model_source import ModelOptions


def leaves(
    value: Any, location: Sequence[str | int] = (), but: Callable[[Any], bool] = lambda field: False
) -> Iterable[tuple[list[str | int], Any]]:
    """Yield every leaf value in a part of the recipe, with its place; `but` selects options to
    leave out.
    """
    if isinstance(value, tuple | list | Mapping):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from leaves(item, [*location, key], but)
    elif isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            if not but(field):
                yield from leaves(getattr(value, name), [*location, field.alias or name], but)
    else:
        yield [*location], value


def models_in(
    value: Any, location: Sequence[str | int] = ()
) -> Iterable[tuple[list[str | int], ModelOptions]]:
    """Yield every model in a part of the recipe, with its place."""
    if isinstance(value, ModelOptions):
        yield [*location], value
    elif isinstance(value, Mapping | BaseModel):
        for key, item in value.items() if isinstance(value, Mapping) else value:
            yield from models_in(item, [*location, key])
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from models_in(item, [*location, i])


def code_in(
    value: Any, location: Sequence[str | int] = ()
) -> Iterable[tuple[list[str | int], Path]]:
    """Yield the Python files that a part of the recipe runs, plugins aside, with their places."""
    if isinstance(value, tuple | list | Mapping):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from code_in(item, [*location, key])
    elif isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            place, item = [*location, field.alias or name], getattr(value, name)
            if is_marked(field, "code") and isinstance(item, Path):
                yield place, item
            else:
                yield from code_in(item, place)


def is_bookkeeping(field: Any) -> bool:
    """Check whether an option changes no result, such as the location of files."""
    return is_marked(field, "bookkeeping")


def is_marked(field: Any, mark: str) -> bool:
    """Check whether an option's definition carries the mark."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(mark))
