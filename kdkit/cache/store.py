"""Rows of tensors in memory-mapped files: each is written once, and read by many processes, runs
and studies.

A store is a folder: `cache.json` says what is in it, each column is one sparse file, `checks.bin`
has a check sum of each row, and `states.bin` a byte. A row is marked WRITTEN when its values are in
all columns, and ON_DISK when they have also reached the disk. Whoever opens a store that nobody
else uses takes WRITTEN rows for empty ones: the machine may have failed before they were on disk.
So a crash can cost rows, and never leaves a wrong one. Rows are written under a lock and do not
change afterwards, so that readers need none. Only a damaged row is written again; who reads it
meanwhile sees by its check sum that it is damaged. The files of one store belong on a disk of one
machine: other machines would not see each other's marks.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import TypedDict

from kdkit import files
from kdkit.errors import DamagedFile, RunError

MARKER = "cache.json"
LOCK = ".lock"
WRITING = ".writing"
STATES = "states.bin"
CHECKS = "checks.bin"
EMPTY = 0
WRITTEN = 1
ON_DISK = 2
PAGE = 4096
READ_AT_ONCE = 1024  # rows that are looked at, of many
# bytes of the disk that writing leaves free: a full disk would end the process without a word
RESERVE = 256 << 20


@dataclass(frozen=True)
class Column:
    """One tensor of each row: what it is called, its shape, and its type by torch's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def type(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def bytes(self) -> int:
        """Of one row."""
        return math.prod(self.shape) * self.type.itemsize


class About(TypedDict):
    """What cache.json says of a store, as far as people are told."""

    teacher: str
    data: str
    views: int
    images: int
    count: int
    name: NotRequired[str]


def read_about(path: Path) -> About:
    """What a store's cache.json says.

    Raises:
        DamagedFile: it is damaged, or another store's.
    """
    way_out = f"`kdkit cache --clear {path.name} --dir {path.parent}` removes the cache"
    about = files.read_json(path / MARKER, About, way_out)
    if about.get("name", path.name) != path.name:
        raise DamagedFile(path / MARKER, "it is another cache's", way_out)
    return about


class AnswerStore:
    """The rows of one folder, open; made if they are not there.

    Args:
        path: the folder; its name ends in a fingerprint of all that the rows depend on.
        columns: what a row consists of.
        count: number of rows.
        about: plain values that `kdkit cache --list` tells.

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
        self._turn = (path / WRITING).open("a")
        os.register_at_fork(after_in_child=self._turn.close)
        self._fresh: list[Tensor] = []

    def known(self, rows: Tensor) -> Tensor:
        """Which of the rows (N,) int64 are there, (N,) bool."""
        return self._states[rows] != EMPTY

    def read(self, rows: Tensor, *, pinned: bool = False) -> dict[str, Tensor]:
        """The values of rows that are there, (N, ...) by column; in page-locked memory for a
        quick way to a GPU.
        """
        found = {}
        for column in self.columns:
            out = torch.empty((len(rows), *column.shape), dtype=column.type, pin_memory=pinned)
            found[column.name] = torch.index_select(self._values[column.name], 0, rows, out=out)
        return found

    def damaged(self, rows: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Which rows (N,) were read as something else than what was written, (N,) bool."""
        return self._checks[rows] != self._check_sum(rows, values)

    def whole(self, rows: Tensor) -> Tensor:
        """Which of the rows (N,) are there and not damaged, (N,) bool."""
        found = self.known(rows)
        there = found.nonzero()[:, 0]
        for start in range(0, len(there), READ_AT_ONCE):
            part = there[start : start + READ_AT_ONCE]
            found[part] = ~self.damaged(rows[part], self.read(rows[part]))
        return found

    def write(self, rows: Tensor, values: Mapping[str, Tensor]) -> None:
        """Add rows (N,) with their values (N, ...) by column; a row that is there already, and
        not damaged, stays as it is.

        Raises:
            RunError: the disk is nearly full.
        """
        unique, first = np.unique(rows.numpy(), return_index=True)
        places, chosen = torch.from_numpy(unique), torch.from_numpy(first)
        with self._alone_in_writing():
            new = ~self.whole(places)
            places, chosen = places[new], chosen[new]
            if not len(places):
                return
            self._refuse_full_disk(len(places))
            self._states[places] = EMPTY
            added = {
                column.name: values[column.name][chosen].to(column.type) for column in self.columns
            }
            for name, value in added.items():
                self._values[name][places] = value
            self._checks[places] = self._check_sum(places, added)
            self._states[places] = WRITTEN
        self._fresh.append(places)

    def commit(self) -> None:
        """Bring what was written to the disk, and then the marks that say so."""
        if not self._fresh:
            return
        rows, self._fresh = torch.cat(self._fresh), []
        for pages in self._pages:
            pages.flush()
        self._states[rows] = ON_DISK
        self._marks.flush()

    def close(self) -> None:
        """Commit, and let others clear it."""
        self.commit()
        self._turn.close()
        self._lock.close()

    def allocated(self) -> int:
        """Bytes that it takes on disk by now."""
        return allocated(self.path)

    def missing_bytes(self, rows: Tensor) -> int:
        """Bytes that the disk would give to those of the rows, ascending, that are not there,
        about: files are given whole pages.
        """
        absent = rows[~self.known(rows)]
        return sum(_span(absent, column.bytes) for column in self.columns)

    def _enter(self, about: Mapping[str, Any]) -> TextIO:
        """The store's lock, held together with its other users; the store is made first, or
        mended, if there are none.
        """
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                handle = (self.path / LOCK).open("a")
            except FileNotFoundError:  # it is being cleared
                continue
            os.register_at_fork(after_in_child=handle.close)
            try:
                if locks(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) and self._holds(handle):
                    self._mend(about) if (self.path / MARKER).is_file() else self._make(about)
                locks(handle, fcntl.LOCK_SH)
                if self._holds(handle) and (self.path / MARKER).is_file():
                    return handle
            except BaseException:
                handle.close()
                raise
            handle.close()

    def _holds(self, handle: TextIO) -> bool:
        """Whether this lock is still the folder's: who clears a folder removes it."""
        lock = self.path / LOCK
        return lock.exists() and os.path.samestat(lock.stat(), os.fstat(handle.fileno()))

    def _make(self, about: Mapping[str, Any]) -> None:
        for name, size in self._sizes().items():
            with (self.path / name).open("wb") as stream:
                stream.truncate(size)  # sparse: no block is taken before it is written
                os.fsync(stream.fileno())
        files.write_json(self.path / MARKER, about)

    def _mend(self, about: Mapping[str, Any]) -> None:
        self._refuse_damaged()
        try:
            read_about(self.path)
        except DamagedFile:  # nothing but what people are told hangs on it
            files.write_json(self.path / MARKER, about)
        pages, states = _map(self.path / STATES, torch.uint8)
        states[states == WRITTEN] = EMPTY
        pages.flush()

    def _refuse_damaged(self) -> None:
        for name, size in self._sizes().items():
            file = self.path / name
            # a link would be written through
            if file.is_symlink() or not file.is_file() or file.stat().st_size != size:
                raise RunError(
                    f"{file} is damaged or missing; `kdkit cache --clear {self.path.name} --dir"
                    f" {self.path.parent}` removes the cache"
                )

    def _sizes(self) -> dict[str, int]:
        """Bytes of the files, by name."""
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
        wanted = sum(rows * (column.bytes // PAGE + 2) * PAGE for column in self.columns)
        free = shutil.disk_usage(self.path).free
        if free - wanted < RESERVE:
            raise RunError(
                f"{self.path}: the disk has {gigabytes(free)} left, too little to keep more"
                f" answers; {SMALLER}"
            )


class CheckSum:
    """A number that changes with any bit of a row, with its place, and from store to store.

    The 8-byte words w_i of a row r give sum_i a_i w_i + a_0 (r + 1) modulo 2^64, with odd a_i that
    follow from the store's name: an odd factor keeps every changed bit in the sum. One product of a
    matrix and a vector, several times as fast as a CRC.

    Args:
        name: of the store.
        columns: of a row.
    """

    def __init__(self, name: str, columns: Sequence[Column]) -> None:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest())
        words = [-(-column.bytes // 8) for column in columns]
        factors = np.random.PCG64(seed).random_raw(1 + sum(words)) | np.uint64(1)
        self._of_row, *self._of_columns = np.split(factors, np.cumsum([1, *words[:-1]]))
        self._columns = columns

    def __call__(self, rows: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Of rows (N,) with their values (N, ...) by column: (N,) int64."""
        found = (rows.numpy().astype(np.uint64) + np.uint64(1)) * self._of_row
        for column, factors in zip(self._columns, self._of_columns, strict=True):
            plain = (
                values[column.name]
                .reshape(len(rows), math.prod(column.shape))
                .contiguous()
                .view(torch.uint8)
            )
            full = functional.pad(plain, (0, -column.bytes % 8)) if column.bytes % 8 else plain
            found += full.numpy().view(np.uint64) @ factors
        return torch.from_numpy(found.view(np.int64))


SMALLER = (
    "keep less (`what: logits`, `top_k`, `dtype: fp16`, fewer `views`), choose another `dir`, or"
    " make room with `kdkit cache --clear`"
)


def gigabytes(count: int) -> str:
    """`1.62 GB`; small sizes in smaller units."""
    unit, name = next(
        ((size, name) for size, name in ((1e9, "GB"), (1e6, "MB")) if count >= size), (1e3, "kB")
    )
    return f"{count / unit:,.3g} {name}" if count < 1000 * unit else f"{count / unit:,.0f} {name}"


def allocated(path: Path) -> int:
    """Bytes that a folder's files take on disk; of sparse ones, what was written."""
    return sum(file.stat().st_blocks * 512 for file in path.iterdir())


def _file(number: int) -> str:
    return f"column-{number}.bin"


def _map(file: Path, dtype: torch.dtype) -> tuple[mmap.mmap, Tensor]:
    with file.open("r+b") as stream:
        pages = mmap.mmap(stream.fileno(), 0)
    return pages, torch.frombuffer(pages, dtype=dtype)


def _span(rows: Tensor, size: int) -> int:
    """Bytes of the pages that ascending rows (N,) of that size lie in."""
    return (
        len(rows) * size
        if size >= PAGE
        else PAGE * len(torch.unique_consecutive(rows * size // PAGE))
    )


def locks(handle: TextIO, how: int) -> bool:
    """Take a lock (`fcntl.LOCK_...`) on an open file; False where others hold it and it was not
    to wait.
    """
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    return True
