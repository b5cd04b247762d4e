"""The row of a store: its columns, and the check sum that detects damage."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Column:
    """One tensor of each row: its name, its shape, and torch's name of its type."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def type(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def bytes(self) -> int:
        """Size of one row in bytes."""
        return math.prod(self.shape) * self.type.itemsize


class CheckSum:
    """A check sum that changes with any bit of a row, with its position, and from store to store.

    The 8-byte words w_i of a row r give sum_i a_i w_i + a_0 (r + 1) modulo 2^64, with odd a_i that
    follow from the store's name: an odd factor keeps every changed bit in the sum. One product of a
    matrix and a vector, several times as fast as a CRC.

    Args:
        name: of the store.
        columns: of a row.
    """

    def __init__(self, name: str, columns: Sequence[Column]) -> None:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest())
        # a column is padded to whole words of 8 bytes
        words = [-(-column.bytes // 8) for column in columns]
        factors = np.random.PCG64(seed).random_raw(1 + sum(words)) | np.uint64(1)
        self._of_row, *self._of_columns = np.split(factors, np.cumsum([1, *words[:-1]]))
        self._columns = columns

    def __call__(self, rows: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Compute it for rows (N,) with their values (N, ...) by column: (N,) int64."""
        # + 1, so that the first row's number counts too; unsigned integers wrap around
        sums = (rows.numpy().astype(np.uint64) + np.uint64(1)) * self._of_row
        for column, factors in zip(self._columns, self._of_columns, strict=True):
            plain = (
                values[column.name]
                .reshape(len(rows), math.prod(column.shape))
                .contiguous()
                .view(torch.uint8)
            )
            full = functional.pad(plain, (0, -column.bytes % 8)) if column.bytes % 8 else plain
            sums += full.numpy().view(np.uint64) @ factors
        return torch.from_numpy(sums.view(np.int64))
