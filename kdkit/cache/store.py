"""Rows of tensors in memory-mapped files: written once, read by processes, runs, studies.

A store is a folder: `cache.json` describes its content, each column is one sparse file,
`checks.bin` has a check sum of each row, and `states.bin` a byte. A row is marked WRITTEN when its
values are in all columns, and ON_DISK when they have also reached the disk. A process that opens a
store without other users treats WRITTEN rows as empty: the machine may have failed before they were
on disk. So a crash can lose rows, but never leaves a wrong one. Rows are written under a lock and
do not change afterwards, so that readers need no lock. Only a damaged row is written again; a
concurrent reader detects the damage by its check sum. The files of one store belong on a disk of
one machine: other machines would not see each other's marks.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired, TextIO

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from kdkit import files
from kdkit.cache.rows import CheckSum, Column
from kdkit.errors import DamagedFile, RunError
from kdkit.units import gigabytes

MARKER = "cache.json"
LOCK = ".lock"
WRITING = ".writing"
STATES = "states.bin"
CHECKS = "checks.bin"
EMPTY = 0
WRITTEN = 1
ON_DISK = 2
# bytes of a block of the file system, the unit in which sparse files grow
PAGE = 4096
READ_AT_ONCE = 1024  # rows per read when many are checked
# free disk space to preserve, in bytes: writing to a mapping on a full disk kills the process
RESERVE = 256 << 20


class About(TypedDict):
    """The entries of cache.json that are shown to users."""

    teacher: str
    data: str
    views: int
    images: int
    count: int
    name: NotRequired[str]
    columns: NotRequired[list[dict[str, Any]]]


def read_about(path: Path) -> About:
    """Read a store's cache.json.

    Raises:
        DamagedFile: it is damaged, or another store's.
    """
    way_out = f"`kdkit cache --clear {path.name} --dir {path.parent}` removes the cache"
    about = files.read_json(path / MARKER, About, way_out)
    if about.get("name", path.name) != path.name:
        raise DamagedFile(path / MARKER, "it is another cache's", way_out)
    return about


class AnswerStore:
    """The open rows of one folder; created if they do not exist.

    Args:
        path: the folder; its name ends in a fingerprint of all that the rows depend on.
        columns: the columns of a row.
        count: number of rows.
        about: plain values that `kdkit cache --list` shows.

    Raises:
        RunError: the files are damaged.
    """

    def __init__(
        self, path: Path, columns: Sequence[Column], count: int, about: Mapping[str, Any]
    ) -> None:
        self.path = path
        self.columns = tuple(columns)
        self.count = count
        self._lock = self._enter(
            {
                **about,
                "name": path.name,
                "columns": [asdict(column) for column in columns],
                "count": count,
            }
        )
        self._refuse_damaged()
        self._pages: list[mmap.mmap] = []
        self._values = {
            column.name: self._mapped(number, column) for number, column in enumerate(self.columns)
        }
        self._marks, self._states = _map(path / STATES, torch.uint8)
        pages, self._checks = _map(path / CHECKS, torch.int64)
        self._pages.append(pages)
        self._check_sum = CheckSum(path.name, self.columns)
        # of its own: LOCK is held by all users as long as they read
        self._turn = (path / WRITING).open("a")
        os.register_at_fork(after_in_child=self._turn.close)
        self._fresh: list[Tensor] = []

    def known(self, rows: Tensor) -> Tensor:
        """Look up which of the rows (N,) int64 exist, (N,) bool."""
        return self._states[rows] != EMPTY

    def read(self, rows: Tensor, *, pinned: bool = False) -> dict[str, Tensor]:
        """Read existing rows, (N, ...) by column; in page-locked memory to copy to a GPU faster."""
        values = {}
        for column in self.columns:
            out = torch.empty((len(rows), *column.shape), dtype=column.type, pin_memory=pinned)
            values[column.name] = torch.index_select(self._values[column.name], 0, rows, out=out)
        return values

    def damaged(self, rows: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Compare check sums: return which rows (N,) differ from what was written, (N,) bool."""
        return self._checks[rows] != self._check_sum(rows, values)

    def whole(self, rows: Tensor) -> Tensor:
        """Check which of the rows (N,) exist and are not damaged, (N,) bool."""
        sound = self.known(rows)
        known = sound.nonzero()[:, 0]
        for start in range(0, len(known), READ_AT_ONCE):
            chunk = known[start : start + READ_AT_ONCE]
            sound[chunk] = ~self.damaged(rows[chunk], self.read(rows[chunk]))
        return sound

    def write(self, rows: Tensor, values: Mapping[str, Tensor]) -> None:
        """Add rows (N,) with values (N, ...) by column; sound existing rows stay unchanged.

        Raises:
            RunError: the disk is nearly full.
        """
        unique, first = np.unique(rows.numpy(), return_index=True)
        numbers, chosen = torch.from_numpy(unique), torch.from_numpy(first)
        with self._alone_in_writing():
            # asked under the lock: another process may have written them meanwhile
            new = ~self.whole(numbers)
            numbers, chosen = numbers[new], chosen[new]
            if not len(numbers):
                return
            self._refuse_full_disk(len(numbers))
            # first, so that a crash in the middle of a damaged row does not leave it marked
            self._states[numbers] = EMPTY
            added = {
                column.name: values[column.name][chosen].to(column.type) for column in self.columns
            }
            for name, value in added.items():
                self._values[name][numbers] = value
            self._checks[numbers] = self._check_sum(numbers, added)
            self._states[numbers] = WRITTEN
        self._fresh.append(numbers)

    def commit(self) -> None:
        """Flush the written values to the disk, and after that the marks that confirm them."""
        if not self._fresh:
            return
        rows, self._fresh = torch.cat(self._fresh), []
        # values before marks: a mark on disk says that the values are there
        for pages in self._pages:
            pages.flush()
        self._states[rows] = ON_DISK
        self._marks.flush()

    def close(self) -> None:
        """Commit, and release the lock so that others may clear the store."""
        self.commit()
        self._turn.close()
        self._lock.close()

    def allocated(self) -> int:
        """Return the bytes that its files currently take on disk."""
        return allocated(self.path)

    def missing_bytes(self, rows: Tensor) -> int:
        """Estimate the bytes that ascending rows would still take on disk, in whole pages."""
        absent = rows[~self.known(rows)]
        return sum(_span(absent, column.bytes) for column in self.columns)

    def _enter(self, about: Mapping[str, Any]) -> TextIO:
        """Take the store's lock, shared with its users; without any, make or mend the store."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                handle = (self.path / LOCK).open("a")
            except FileNotFoundError:  # another process is clearing the store
                continue
            # a forked worker would inherit the lock and hold it after this process has released it
            os.register_at_fork(after_in_child=handle.close)
            try:
                if locks(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) and self._holds(handle):
                    self._mend(about) if (self.path / MARKER).is_file() else self._make(about)
                # turns an exclusive lock into a shared one; between the two, the store may be
                # cleared
                locks(handle, fcntl.LOCK_SH)
                if self._holds(handle) and (self.path / MARKER).is_file():
                    return handle
            # BaseException: a lock must not survive Ctrl-C either
            except BaseException:
                handle.close()
                raise
            handle.close()

    def _holds(self, handle: TextIO) -> bool:
        """Check whether this lock is still the folder's: clearing a folder removes its lock."""
        lock = self.path / LOCK
        return lock.exists() and os.path.samestat(lock.stat(), os.fstat(handle.fileno()))

    def _make(self, about: Mapping[str, Any]) -> None:
        for name, size in self._sizes().items():
            with (self.path / name).open("wb") as stream:
                stream.truncate(size)  # sparse: blocks are allocated when they are written
                os.fsync(stream.fileno())
        # last: a folder without it is not a store yet, and is made again
        files.write_json(self.path / MARKER, about)

    def _mend(self, about: Mapping[str, Any]) -> None:
        self._refuse_damaged()
        try:
            read_about(self.path)
        except DamagedFile:  # cache.json is only shown to users, so it can be rewritten
            files.write_json(self.path / MARKER, about)
        pages, states = _map(self.path / STATES, torch.uint8)
        # the machine may have failed before these values reached the disk
        states[states == WRITTEN] = EMPTY
        pages.flush()

    def _refuse_damaged(self) -> None:
        for name, size in self._sizes().items():
            file = self.path / name
            # writing would follow a link
            if file.is_symlink() or not file.is_file() or file.stat().st_size != size:
                raise RunError(
                    f"{file} is damaged or missing; `kdkit cache --clear {self.path.name} --dir"
                    f" {self.path.parent}` removes the cache"
                )

    def _sizes(self) -> dict[str, int]:
        """Return the size of each file in bytes, by name."""
        columns = {
            _file(number): self.count * column.bytes for number, column in enumerate(self.columns)
        }
        return {**columns, CHECKS: self.count * 8, STATES: self.count}

    def _mapped(self, number: int, column: Column) -> Tensor:
        pages, values = _map(self.path / _file(number), column.type)
        self._pages.append(pages)
        return values.view(self.count, *column.shape)

    @contextlib.contextmanager
    def _alone_in_writing(self) -> Iterator[None]:
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)

    def _refuse_full_disk(self, rows: int) -> None:
        # + 2: a row may begin and end in the middle of a page
        needed = sum(rows * (column.bytes // PAGE + 2) * PAGE for column in self.columns)
        free = shutil.disk_usage(self.path).free
        if free - needed < RESERVE:
            raise RunError(
                f"{self.path}: the disk has {gigabytes(free)} left, too little to keep more"
                f" answers; {SMALLER}"
            )


SMALLER = (
    "keep less (`what: logits`, `top_k`, `dtype: fp16`, fewer `views`), choose another `dir`, or"
    " make room with `kdkit cache --clear`"
)


def allocated(path: Path) -> int:
    """Return the bytes that files take on disk; of sparse files only what was written."""
    return sum(file.stat().st_blocks * 512 for file in path.iterdir())


def _file(number: int) -> str:
    return f"column-{number}.bin"


def _map(file: Path, dtype: torch.dtype) -> tuple[mmap.mmap, Tensor]:
    with file.open("r+b") as stream:
        pages = mmap.mmap(stream.fileno(), 0)
    return pages, torch.frombuffer(pages, dtype=dtype)


def _span(rows: Tensor, size: int) -> int:
    """Return the bytes of all pages that contain ascending rows (N,) of `size` bytes each."""
    if size >= PAGE:
        return len(rows) * size
    # neighbouring rows share a page
    return PAGE * len(torch.unique_consecutive(rows * size // PAGE))


def locks(handle: TextIO, how: int) -> bool:
    """Take a lock (`fcntl.LOCK_...`) on an open file; False if it would have to wait."""
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    return True
