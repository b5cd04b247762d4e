"""Turns what pydantic says of a recipe into lines for its author: file:line, key, what, did you mean, what is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kdkit.errors import suggest
from kdkit.options import Ramp
from kdkit.providers import RecipeTeacher
from kdkit.recipe_types import TAUGHT
from kdkit.source import Source

Location = Sequence[str | int]


def explain(error: ValidationError, source: Source, model: type[BaseModel]) -> Iterator[str]:
    """One line for each thing that is wrong."""
    errors = [e for e in error.errors() if not _is_echo(e)]
    places = [_in_file(e, source) for e in errors]
    return (_explain(e, source, model) for i, e in enumerate(errors) if not _is_surpassed(i, errors, places))


def _is_echo(error: ErrorDetails) -> bool:
    """A list that is called too short because its items are wrong."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def _is_surpassed(number: int, errors: Sequence[ErrorDetails], places: Sequence[list[str | int]]) -> bool:
    """Whether another type that may stand here comes nearer to what is written: it is only out of range, or wrong in one part."""

    def distance(error: ErrorDetails) -> int:
        return 2 if error["type"].endswith(("_type", "_parsing")) else int(error["type"] == "literal_error")

    own, place = distance(errors[number]), places[number]
    for i, (other, where) in enumerate(zip(errors, places, strict=True)):
        deeper = own == 2 and len(where) > len(place) and where[: len(place)] == place
        if deeper or (where == place and (distance(other), i) < (own, number) and own > 0):
            return True
    return False


def _explain(error: ErrorDetails, source: Source, model: type[BaseModel]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    location = _in_file(error, source)
    if kind == "union_tag_invalid":
        location.append("use")
        tags = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        says = f"unknown '{context['tag']}'; {suggest(context['tag'], tags)}"
    elif kind == "union_tag_not_found":
        says = "needs a `use:` that names the plugin"
    elif kind == "extra_forbidden":
        says = f"no such key; {suggest(str(location[-1]), _keys_at(error['loc'][:-1], model))}"
    elif kind == "literal_error":
        allowed = [word.strip(" '") for word in context["expected"].replace(" or ", ", ").split(",")]
        allowed = [word.lower() if word in ("True", "False") else word for word in allowed]  # as YAML writes them
        says = f"got {error['input']!r}; {suggest(str(error['input']), allowed)}"
    elif kind == "too_short":
        says = f"needs at least {context['min_length']}"
    elif kind == "missing":
        says = "this key is required"
    elif kind == "value_error":
        says = str(context["error"])
    else:
        says = f"{error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
    return f"{source.where(location)}: {'.'.join(map(str, location))}: {says}"


def _in_file(error: ErrorDetails, source: Source) -> list[str | int]:
    """The error's location without the names of union members that pydantic puts into it."""
    location: list[str | int] = []
    data: Any = source.data
    for position, step in enumerate(error["loc"]):
        is_last = position == len(error["loc"]) - 1
        inside = data if isinstance(data, dict) else dict(enumerate(data)) if isinstance(data, list) else {}
        if step in inside:
            data = inside[step]
            location.append(step)
        elif is_last and error["type"] == "missing":
            location.append(step)
    return location


def _keys_at(location: Location, model: type[BaseModel]) -> list[str]:
    """The keys allowed in the mapping at pydantic's `location`, which names the members of unions."""
    here: list[type[BaseModel]] = [model]
    for step in location:
        fields = [m.model_fields[step] for m in here if step in m.model_fields]
        members = [m for m in here if _is_called(m, step)] if len(here) > 1 else []  # of a union; another one may have a key of that name
        if members:
            here = members
        elif fields:
            here = [m for field in fields for m in _models_in(field.annotation)]
        elif step == "ramp":
            here = [Ramp]
    return sorted({field.alias or name for m in here for name, field in m.model_fields.items()})


def _is_called(member: type[BaseModel], step: str | int) -> bool:
    """Whether pydantic's name of a union's member is this model's."""
    return isinstance(step, str) and (member.__name__.lower().startswith(step.lower()) or (step == TAUGHT and member is RecipeTeacher))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in get_args(annotation) for m in _models_in(part)]
