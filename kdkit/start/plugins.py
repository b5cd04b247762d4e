"""New plugin files, each with a test that passes, and packages of them."""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kdkit import __version__
from kdkit.errors import PluginError, one_line, shorten
from kdkit.start.writing import filled, write_new

NAME = re.compile(r"[a-z][a-z0-9_]{0,99}")
KNOWLEDGE = "response"
"""What a new loss compares by default; each kind has a template."""


@dataclass(frozen=True)
class Kind:
    """What is written for a kind of plugin: templates by file name, and the next command.

    `{name}` and `{knowledge}` stand for what the user says.
    """

    files: Mapping[str, str]
    next_command: str = "python -m pytest test_{name}.py"


def _plugin(template: str) -> Kind:
    return Kind({"{name}.py": f"{template}.py", "test_{name}.py": f"test_{template}.py"})


KINDS: Mapping[str, Kind] = {
    "loss": _plugin("loss_{knowledge}"),
    "schedule": _plugin("schedule"),
    "task": _plugin("task"),
    "dataset": _plugin("dataset"),
    "package": Kind(
        {
            "kdkit-{dashed}/pyproject.toml": "pyproject.toml",
            "kdkit-{dashed}/README.md": "package_readme.md",
            "kdkit-{dashed}/kdkit_{name}/__init__.py": "package_init.py",
            "kdkit-{dashed}/kdkit_{name}/{name}.py": "loss_{knowledge}.py",
            "kdkit-{dashed}/tests/test_{name}.py": "test_loss_{knowledge}.py",
            "kdkit-{dashed}/.github/workflows/tests.yml": "workflow.yml",
        },
        "cd kdkit-{dashed} && python -m pytest",
    ),
}


def write(kind: str, name: str, folder: Path, knowledge: str = KNOWLEDGE) -> tuple[list[Path], str]:
    """Write a plugin, or a package with one loss.

    Args:
        kind: a key of `KINDS`.
        name: what recipes will say after `use:`; its file has the same name.
        folder: where the files go.
        knowledge: of a loss: response, feature or relation.

    Returns:
        The files, and the command to run next in `folder`.

    Raises:
        PluginError: it is no name of a plugin.
        OSError: a file exists already, or cannot be written.
    """
    _refuse_name(name)
    parts = {"name": name, "knowledge": knowledge, "dashed": name.replace("_", "-")}
    package = f"kdkit_{name}"
    minor = [int(part) for part in __version__.split(".")[:2]]
    values = {
        "name": name,
        "cls": "".join(word.capitalize() for word in name.split("_")),
        "title": name.replace("_", " ").capitalize(),
        "package": package,
        "distribution": f"kdkit-{parts['dashed']}",
        "module": f"{package}.{name}" if kind == "package" else name,
        "version": f"{minor[0]}.{minor[1]}",
        "next_version": f"{minor[0]}.{minor[1] + 1}",
    }
    files = {
        folder / file.format(**parts): filled(template.format(**parts), values)
        for file, template in KINDS[kind].files.items()
    }
    write_new(files)
    return list(files), KINDS[kind].next_command.format(**parts)


def _refuse_name(name: str) -> None:
    """Refuse a name that no plugin, or no module of Python, can have."""
    if not NAME.fullmatch(name):
        raise PluginError(
            f"'{shorten(one_line(name))}' is no name of a plugin: small letters, digits and '_', a"
            " letter first"
        )
    # `class` cannot be imported; `random.py` would hide a module that torch imports
    if keyword.iskeyword(name) or name in sys.stdlib_module_names or name in ("kdkit", "torch"):
        raise PluginError(f"'{name}' is a name of Python's or of a library; choose another")
