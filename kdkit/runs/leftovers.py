"""Files that may lie in a run's folder, and Python files that its recipe names."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdkit.errors import RunError

LOCK = ".lock"


def remove(paths: Sequence[Path]) -> None:
    """Remove the files of a run.

    Raises:
        RunError: one is a link to a folder; then all stay.
    """
    for path in paths:
        if path.is_symlink() and path.is_dir():
            raise RunError(
                f"{path}: is a link to a folder, and a new run would remove what is behind it;"
                " remove the link first"
            )
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_leftover(path: Path) -> bool:
    """Check whether a process killed before the folder became a run's may have left this file."""
    return path.name == LOCK or (path.name.startswith(".") and path.suffix == ".part")


def python_in(value: Any, key: str = "") -> Iterator[tuple[str, Path]]:
    """List every path of a plugin or a Python file in a resolved recipe, by its key path."""
    if isinstance(value, str):
        if key.startswith("plugins.") or value.endswith(".py"):
            yield key, Path(value)
        return
    items = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, item in items:
        yield from python_in(item, f"{key}.{name}" if key else str(name))
