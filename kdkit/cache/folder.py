"""Lists and removes the teacher caches in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdkit.cache.parts import JOINING, parts_of
from kdkit.cache.store import (
    CHECKS,
    LOCK,
    MARKER,
    STATES,
    WRITING,
    About,
    allocated,
    locks,
    read_about,
)
from kdkit.errors import RunError, suggest

NAME, COLUMN = re.compile(r".+-[0-9a-f]{16}"), re.compile(r"column-\d+\.bin")


@dataclass(frozen=True)
class Found:
    """A store on disk.

    Attributes:
        path: its folder.
        about: content of its cache.json; None if that is damaged.
        bytes: on disk.
        filled: number of rows written.
        written: time of the last write, in seconds.
        damage: the error in its cache.json.
    """

    path: Path
    about: About | None
    bytes: int
    filled: int
    written: float
    damage: str = ""


def stores(folder: Path) -> list[Found]:
    """List all stores in a folder, by name."""
    paths = [marker.parent for marker in sorted(folder.glob(f"*/{MARKER}"))]
    # a folder of another program may hold a `cache.json`, but has no such name and no lock
    return [look(path) for path in paths if NAME.fullmatch(path.name) and (path / LOCK).is_file()]


def look(path: Path) -> Found:
    """Read the state of a store from its files."""
    marks = path / STATES
    # treat a damaged store as empty
    states = np.fromfile(marks, dtype=np.uint8) if marks.is_file() else np.zeros(0, dtype=np.uint8)
    written = max(file.stat().st_mtime for file in path.iterdir())
    size, filled = allocated(path), int(np.count_nonzero(states))
    try:
        about = read_about(path)
    except RunError as error:
        return Found(path, None, size, filled, written, str(error))
    return Found(path, about, size, filled, written)


def clear(folder: Path, name: str | None = None) -> list[Found]:
    """Remove the stores of a folder, or the one of that name; return what was removed.

    Raises:
        RunError: there is none of that name, or one is in use; then nothing is removed.
    """
    present = stores(folder)
    chosen = [store for store in present if name in (None, store.path.name)]
    if name is not None and not chosen:
        raise RunError(
            f"no cache in {folder} is called '{name}';"
            f" {suggest(name, (store.path.name for store in present))}"
        )
    # all locks before anything is removed
    with contextlib.ExitStack() as stack:
        for store in chosen:
            handle = stack.enter_context((store.path / LOCK).open("a"))
            if not locks(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                raise RunError(f"{store.path} is in use; nothing was removed")
        for store in chosen:
            _remove(store.path)
    return chosen


def _remove(store: Path) -> None:
    """Remove a store's own files, and its folder if that is then empty; of a link, the link."""
    if store.is_symlink():
        store.unlink()
        return
    (store / MARKER).unlink()  # first, so that a half-removed folder is no longer a store
    for file in store.iterdir():
        is_own = file.name in (LOCK, WRITING, JOINING, STATES, CHECKS) or COLUMN.fullmatch(
            file.name
        )
        if is_own or file.suffix == ".part":  # of a write that was cut off
            file.unlink()
    with contextlib.suppress(OSError):  # the folder contains other files
        store.rmdir()
    shutil.rmtree(parts_of(store), ignore_errors=True)
