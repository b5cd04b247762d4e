"""Turns pydantic's errors in a recipe into lines: place, key, what, did you mean, allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kdkit.contracts.model_source import RecipeTeacher
from kdkit.contracts.options import IN_WORDS, Ramp, said
from kdkit.errors import KdkitError, dotted, one_line, shown, suggest
from kdkit.recipe.reading import COMMAND_LINE
from kdkit.recipe.types import TAUGHT
from kdkit.recipe.yaml_source import Source

Location = Sequence[str | int]
M = TypeVar("M", bound=BaseModel)

MOST_PROBLEMS = 50
"""Maximum number of error lines for one file."""
DEEPEST_KEY = 4
"""Maximum nesting of sections in which a key is searched."""


def explain(
    error: ValidationError, model: type[BaseModel], data: Any, place: Callable[[Location], str]
) -> str:
    """Format one line for each error: place, key, what, did you mean, allowed.

    Args:
        error: the error from pydantic.
        model: the type that was validated, for the names of its keys.
        data: the value that was validated.
        place: of a key, such as `file:line`.
    """
    errors = [e for e in error.errors(include_url=False) if not _is_echo(e)]
    places = [_in_file(e, data) for e in errors[:MOST_PROBLEMS]]
    lines = [
        _explain(e, where, model, data, place)
        for i, (e, where) in enumerate(zip(errors, places, strict=False))
        if not _is_surpassed(i, errors[:MOST_PROBLEMS], places)
    ]
    if len(errors) > MOST_PROBLEMS:
        lines.append(f"{place([])}: and {len(errors) - MOST_PROBLEMS} problems more")
    # members of a union may report the same problem
    return "\n".join(dict.fromkeys(lines))


def explain_source(error: ValidationError, model: type[BaseModel], source: Source) -> str:
    """Format the errors in a recipe or a study, with the places of its source."""
    return explain(error, model, source.data, source.where)


def validated(kind: type[M], values: Any, place: str, raised: type[KdkitError]) -> M:
    """Validate values that are in no recipe, such as a file's entry; `place` begins the lines.

    Raises:
        KdkitError: of type `raised`; the values are wrong.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise raised(explain(error, kind, values, lambda _: place)) from None


def _is_echo(error: ErrorDetails) -> bool:
    """Check whether an error calls a list too short only because its items are wrong."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def _is_surpassed(
    number: int, errors: Sequence[ErrorDetails], places: Sequence[list[str | int]]
) -> bool:
    """Hide errors of a union member if another is a closer match: in range, or in one key."""

    def distance(error: ErrorDetails) -> int:
        if error["type"].endswith(("_type", "_parsing")):
            return 2
        return int(error["type"] == "literal_error")

    own, key = distance(errors[number]), places[number]
    for i, (other, where) in enumerate(zip(errors, places, strict=True)):
        # an error inside of a mapping shows that its author meant the member that is a mapping
        deeper = own == 2 and len(where) > len(key) and where[: len(key)] == key
        if deeper or (where == key and (distance(other), i) < (own, number) and own > 0):
            return True
    return False


def _explain(
    error: ErrorDetails,
    location: list[str | int],
    model: type[BaseModel],
    data: Any,
    place: Callable[[Location], str],
) -> str:
    kind = error["type"]
    context = error.get("ctx", {})
    value = error["input"]
    if kind == "union_tag_invalid":
        location = [*location, "use"]
        # pydantic gives the allowed values only as a text, as below
        tags = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        says = f"unknown {shown(context['tag'])}; {suggest(context['tag'], tags)}"
    elif kind == "extra_forbidden":
        key = str(location[-1])
        meant = _nearest(_places_of(key, model, data), location)
        # not the section `run` of the recipe, which has that name
        if key == "run" and location[0] in ("teacher", "teachers"):
            meant = ["recipe"]
        says = f"no such key; {suggest(key, _keys_at(error['loc'][:-1], model), meant)}"
    elif kind == "literal_error":
        allowed = [
            word.strip(" '") for word in context["expected"].replace(" or ", ", ").split(",")
        ]
        # as YAML writes them
        allowed = [word.lower() if word in ("True", "False") else word for word in allowed]
        says = f"got {shown(value)}; {suggest(str(value), allowed)}"
    elif kind == "string_type" and value is None:
        says = "needs a text, got nothing; an empty text is written ''"
        says += f", as in \"{dotted(location)}=''\"" if place(location) == COMMAND_LINE else ""
    elif kind == "string_pattern_mismatch" and context["pattern"] in IN_WORDS:
        says = f"may hold {IN_WORDS[context['pattern']]}, got {shown(value)}"
    else:
        says = _SAYS[kind](context) if kind in _SAYS else said(error["msg"])
        says += "" if kind in _WITHOUT_VALUE else f", got {shown(value)}"
    key = f"{dotted(location)}: " if location else ""
    return f"{place(location)}: {key}{one_line(says)}"


_SAYS: dict[str, Callable[[dict[str, Any]], str]] = {
    "union_tag_not_found": lambda context: (
        "needs a `use:` that names the plugin, such as {use: NAME}"
    ),
    "too_short": lambda context: f"needs at least {context['min_length']}",
    "missing": lambda context: "this key is required",
    "value_error": lambda context: str(context["error"]),
    "model_type": lambda context: "needs keys of its own, such as {key: value}",
    "model_attributes_type": lambda context: "needs keys of its own, such as {key: value}",
    "dict_type": lambda context: "needs keys of its own, such as {key: value}",
    "tuple_type": lambda context: "needs a list, such as [a, b]",
    "list_type": lambda context: "needs a list, such as [a, b]",
    "bool_parsing": lambda context: "is true or false",
    "bool_type": lambda context: "is true or false",
}
_WITHOUT_VALUE = {"union_tag_not_found", "too_short", "missing", "value_error"}


def _in_file(error: ErrorDetails, data: Any) -> list[str | int]:
    """Return the error's location without the names of union members that pydantic adds to it."""
    location: list[str | int] = []
    for position, step in enumerate(error["loc"]):
        is_last = position == len(error["loc"]) - 1
        inside = dict(enumerate(data)) if isinstance(data, list | tuple) else data
        if isinstance(inside, dict) and step in inside:
            data = inside[step]
            location.append(step)
        # a missing key is not in the data, so it is the one step that cannot be found there
        elif is_last and error["type"] == "missing":
            location.append(step)
    return location


def _places_of(
    key: str, model: type[BaseModel], data: Any, above: tuple[str, ...] = ()
) -> list[tuple[str, ...]]:
    """List other places where a key of that name could stand in the recipe `data`."""
    keys: list[tuple[str, ...]] = []
    for name, field in model.model_fields.items():
        called = field.alias or name
        if called == key:
            keys.append((*above, called))
        inside = _models_in(field.annotation)
        if len(above) >= DEEPEST_KEY or not inside:
            continue
        value = data.get(called) if isinstance(data, dict) else None
        sections = [(value, called)]
        if isinstance(value, list):
            sections += [(item, f"{called}.{number}") for number, item in enumerate(value)]
        for section, path in sections:
            for member in inside:
                if len(inside) == 1 or _is_chosen(member, section):
                    keys += _places_of(key, member, section, (*above, path))
    return keys


def _is_chosen(member: type[BaseModel], value: Any) -> bool:
    """Check whether a section of a recipe is of this one of several types."""
    if not isinstance(value, dict):
        return False
    names = [value.get("use"), str(value.get("model")).partition("/")[0]]
    return any(_is_called(member, name) for name in names if isinstance(name, str))


def _nearest(places: list[tuple[str, ...]], location: Location) -> list[str]:
    """Return the two places that share most with the key's own, the less deeply nested first."""

    def distance(place: tuple[str, ...]) -> tuple[int, int]:
        common = sum(a == b for a, b in zip(place, map(str, location), strict=False))
        return -common, len(place)

    return [".".join(place) for place in sorted(places, key=distance)[:2]]


def _keys_at(location: Location, model: type[BaseModel]) -> list[str]:
    """List the keys allowed at pydantic's `location`, which includes names of union members."""
    here: list[type[BaseModel]] = [model]
    for step in location:
        fields = [m.model_fields[step] for m in here if step in m.model_fields]
        # a union member; another member may have a key of that name
        members = [m for m in here if _is_called(m, step)] if len(here) > 1 else []
        if members:
            here = members
        elif fields:
            here = [m for field in fields for m in _models_in(field.annotation)]
        elif step == "ramp":
            here = [Ramp]
    return sorted({field.alias or name for m in here for name, field in m.model_fields.items()})


def _is_called(member: type[BaseModel], step: str | int) -> bool:
    """Check whether pydantic's name of a union member is this model's."""
    # `hint_loss` is called `hint`
    names = {member.__name__, member.__name__.lower(), member.__name__.rpartition("_")[0]}
    return step in names or (step == TAUGHT and member is RecipeTeacher)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for member in get_args(annotation) for model in _models_in(member)]
