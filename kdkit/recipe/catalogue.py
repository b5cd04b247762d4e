"""The descriptions of plugins that `kdkit plugins` shows, each from the plugin's own file."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from kdkit.contracts.options import Options, Ramp
from kdkit.recipe.reading import seen_from_here
from kdkit.recipe.registry import FROM_A_FILE, Plugin, Registry

KINDS = {
    "losses": "loss",
    "schedules": "schedule",
    "models": "model source",
    "datasets": "dataset",
    "tasks": "task",
    "metrics": "metric",
    "balances": "balance",
    "compressions": "compression",
    "distillers": "distiller",
}


@dataclass(frozen=True)
class Entry:
    """One plugin.

    Attributes:
        name, kind: as in a recipe; loss, schedule, model source, dataset, task, metric,
            balance, compression or distiller.
        group: knowledge of a loss, scheme of a schedule, what the rows of a task are, else empty.
        summary: first paragraph of the class's docstring.
        details: the rest of it, with the formula.
        paper: the module's docstring behind its first paragraph.
        origin: file or distribution.
        source: the module of an installed plugin; of another one, its file.
    """

    name: str
    kind: str
    group: str
    summary: str
    details: str
    paper: str
    origin: str
    source: str
    options: tuple[Option, ...]

    @property
    def formula(self) -> str:
        """Text after `Formula:` in the docstring, on one line; empty if there is none."""
        match = re.search(
            r"^Formula:\s*(.+?)(?:\n\n|\Z)", self.details, flags=re.MULTILINE | re.DOTALL
        )
        return " ".join(match[1].split()) if match else ""


@dataclass(frozen=True)
class Option:
    """One option of a plugin: its key in a recipe, type with bounds, default (or "required"), and
    meaning.
    """

    name: str
    type: str
    default: str
    description: str


def entries(plugins: Registry) -> Iterator[Entry]:
    """List every plugin found, by kind and name."""
    for kind, plugin in plugins:
        first, _, rest = inspect.cleandoc(plugin.__doc__ or "").partition("\n\n")
        # a module's first paragraph says what the class's does
        _, _, paper = inspect.cleandoc(sys.modules[plugin.__module__].__doc__ or "").partition(
            "\n\n"
        )
        groups = ("knowledge", "scheme", "rows_are")
        group = next((str(getattr(plugin, name)) for name in groups if hasattr(plugin, name)), "")
        origin = seen_from_here(plugins.origins[plugin])
        # the path of an installed plugin differs from machine to machine, its module does not
        source = origin if plugin.__module__.startswith(FROM_A_FILE) else plugin.__module__
        yield Entry(
            plugin.name,
            KINDS[kind],
            group,
            " ".join(first.split()),
            rest.strip(),
            paper.strip(),
            origin,
            source,
            tuple(options(plugin)),
        )


def options(plugin: Plugin) -> Iterator[Option]:
    """List the options of a plugin: its own, and those of every plugin of its kind."""
    for name, info in plugin.Options.model_fields.items():
        default = (
            "required"
            if info.is_required()
            else _value(info.get_default(call_default_factory=True))
        )
        yield Option(info.alias or name, _type(info), default, info.description or "")


def _value(value: Any) -> str:
    return "none" if value is None else str(list(value)) if isinstance(value, tuple) else str(value)


def _type(info: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(bound, key):g}"
        for bound in info.metadata
        for key, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if hasattr(bound, key)
    ]
    ramp = ["or a ramp"] if any(type(m).__name__ == "_NumberOrRamp" for m in info.metadata) else []
    return " ".join([_name(info.annotation), *([", ".join(bounds)] if bounds else []), *ramp])


def _name(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, Options) and annotation is not Ramp:
        keys = (info.alias or name for name, info in annotation.model_fields.items())
        return f"{{{', '.join(keys)}}}"
    origin = get_origin(annotation)
    # `tuple[X, ...]` has an ellipsis among its arguments
    members = [member for member in get_args(annotation) if member is not Ellipsis]
    if origin is Annotated:
        return _name(members[0])
    if origin in (tuple, list):
        return f"list of {_name(members[0])}"
    if origin is Literal:
        # YAML writes booleans in small letters
        return " | ".join(str(m).lower() if isinstance(m, bool) else str(m) for m in members)
    if members and origin is not dict:
        return " | ".join("none" if m is type(None) else _name(m) for m in members)
    plain = {str: "text", float: "number", int: "integer", bool: "true | false", Path: "path"}
    return "mapping" if origin is dict else plain.get(annotation, str(annotation))
