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
from kdkit.recipe.registry import FROM_A_FILE, Plugin, Registry

KINDS = {
    "losses": "loss",
    "schedules": "schedule",
    "models": "model source",
    "datasets": "dataset",
    "tasks": "task",
    "metrics": "metric",
}


@dataclass(frozen=True)
class Entry:
    """One plugin.

    Attributes:
        name, kind: as in a recipe; loss, schedule, model source, dataset, task or metric.
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
    """One option of a plugin: its type with bounds, default ("required" if it has none), and
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
        module = (
            inspect.cleandoc(sys.modules[plugin.__module__].__doc__ or "")
            .partition("\n\n")[2]
            .strip()
        )
        said = ("knowledge", "scheme", "rows_are")
        group = next((str(getattr(plugin, name)) for name in said if hasattr(plugin, name)), "")
        origin = _shown(plugins.origins[plugin])
        source = origin if plugin.__module__.startswith(FROM_A_FILE) else plugin.__module__
        yield Entry(
            plugin.name,
            KINDS[kind],
            group,
            " ".join(first.split()),
            rest.strip(),
            module,
            origin,
            source,
            tuple(options(plugin)),
        )


def _shown(origin: str) -> str:
    path = Path(origin)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else origin


def options(plugin: Plugin) -> Iterator[Option]:
    """List the options of a plugin: its own, and those of every plugin of its kind."""
    for name, info in plugin.Options.model_fields.items():
        default = (
            "required"
            if info.is_required()
            else _value(info.get_default(call_default_factory=True))
        )
        yield Option(name, _type(info), default, info.description or "")


def _value(value: Any) -> str:
    return "none" if value is None else str(list(value)) if isinstance(value, tuple) else str(value)


def _type(info: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(m, key):g}"
        for m in info.metadata
        for key, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if hasattr(m, key)
    ]
    ramp = ["or a ramp"] if any(type(m).__name__ == "_NumberOrRamp" for m in info.metadata) else []
    return " ".join([_name(info.annotation), *([", ".join(bounds)] if bounds else []), *ramp])


def _name(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, Options) and annotation is not Ramp:
        return "{" + ", ".join(annotation.model_fields) + "}"
    origin, parts = get_origin(annotation), [a for a in get_args(annotation) if a is not Ellipsis]
    if origin is Annotated:
        return _name(parts[0])
    if origin in (tuple, list):
        return f"list of {_name(parts[0])}"
    if origin is Literal:
        return " | ".join(
            str(part).lower() if isinstance(part, bool) else str(part) for part in parts
        )
    if parts and origin is not dict:
        return " | ".join("none" if part is type(None) else _name(part) for part in parts)
    plain = {str: "text", float: "number", int: "integer", bool: "true | false", Path: "path"}
    return "mapping" if origin is dict else plain.get(annotation, str(annotation))
