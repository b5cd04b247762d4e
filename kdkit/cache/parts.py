"""Parts of a cache that processes fill each for itself, and that one of them joins."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import torch

from kdkit.cache.store import LOCK, READ_AT_ONCE, AnswerStore, locks, read_about

MOST = 64  # parts
LOOK = 1.0  # seconds until a part that another process fills is looked at again
DONE = "done"
JOINING = ".joining"


def parts_of(path: Path) -> Path:
    """Return the folder where processes fill parts of a store."""
    return path.with_name(f"{path.name}.parts")


@dataclass(frozen=True)
class Parts:
    """The parts of a store, in a folder beside it: each has a whole store's sparse files and its
    name, so that a row has the same place and the same check sum in both.

    Only locks and whole files pass between processes: no two machines write one file.

    Attributes:
        store: open.
        count: number of parts; equal in all processes.
        full: says whether the store has all rows that are wanted.
    """

    store: AnswerStore
    count: int
    full: Callable[[], bool]

    def free(self) -> Generator[tuple[int, AnswerStore], None, None]:
        """Yield part after part that no other process fills, with its open store, until all are
        filled; a part counts as filled when the next one is asked for.

        What a process left that has ended is gone on with.
        """
        while not self.full() and (missing := [*filter(self._is_missing, range(self.count))]):
            taken = False
            for part in missing:
                folder = self._folder(part)
                # another process may join meanwhile, and remove all parts
                with contextlib.suppress(FileNotFoundError):
                    folder.mkdir(parents=True, exist_ok=True)
                    with (folder / LOCK).open("a") as claim:
                        # another process may have filled it meanwhile, or even joined all
                        if (
                            not locks(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                            or not self._is_missing(part)
                            or self.full()
                        ):
                            continue
                        taken = True
                        store = self._open(part)
                        try:
                            yield part, store
                        finally:
                            store.close()
                        (folder / DONE).touch()
            if not taken:
                time.sleep(LOOK)

    def join(self) -> None:
        """Copy all parts into the store, and remove them; damaged rows are left out.

        Raises:
            RunError: the disk is nearly full.
        """
        with (self.store.path / JOINING).open("a") as turn:
            locks(turn, fcntl.LOCK_EX)
            if not self.full():
                for part in range(self.count):
                    self._copy(part)
                self.store.commit()
            shutil.rmtree(parts_of(self.store.path), ignore_errors=True)

    def _copy(self, part: int) -> None:
        store = self._open(part)
        try:
            known = store.known(torch.arange(store.count)).nonzero()[:, 0]
            for start in range(0, len(known), READ_AT_ONCE):
                rows = known[start : start + READ_AT_ONCE]
                values = store.read(rows)
                sound = ~store.damaged(rows, values)
                self.store.write(rows[sound], {k: v[sound] for k, v in values.items()})
        finally:
            store.close()

    def _is_missing(self, part: int) -> bool:
        return not (self._folder(part) / DONE).exists()

    def _folder(self, part: int) -> Path:
        return parts_of(self.store.path) / f"{part:02}"

    def _open(self, part: int) -> AnswerStore:
        own = self.store
        path = self._folder(part) / own.path.name
        return AnswerStore(path, own.columns, own.count, read_about(own.path))
