"""Fills templates in, and writes files that are not there yet."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./*-]*")
"""Texts that YAML takes for texts without quotes, but for `NO_WORDS`."""
NO_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")


def filled(template: str, values: Mapping[str, str]) -> str:
    """Return a template of this room, with its `$names` replaced."""
    file = resources.files(__package__) / "templates" / f"{template}.template"
    return Template(file.read_text(encoding="utf-8")).substitute(values)


def flow(value: Any) -> str:
    """Format plain values as YAML on one line, such as `{use: digits}`; words without quotes."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in NO_WORDS:
        return value
    # JSON's numbers and quoted texts are YAML's too
    return json.dumps(value, ensure_ascii=False)


def refuse_existing(files: Mapping[Path, str]) -> None:
    """Check that none of the files exists.

    Raises:
        FileExistsError: the first that does.
    """
    for path in files:
        if path.exists() or path.is_symlink():
            says = "exists already and is left as it is; nothing is written"
            raise FileExistsError(errno.EEXIST, says, str(path))


def write_new(files: Mapping[Path, str]) -> None:
    """Write files, all or none; none may exist.

    Raises:
        OSError: one exists, or cannot be written.
    """
    # it imports torch, which the commands' help does without
    from kdkit.files import write_atomically

    refuse_existing(files)
    written: list[Path] = []
    try:
        for path, text in files.items():
            write_atomically(path, text.encode())
            written.append(path)
    except BaseException:
        remove(written)
        raise


def remove(files: list[Path]) -> None:
    """Remove files that were just written; the folders that were made for them stay."""
    for path in files:
        path.unlink(missing_ok=True)
