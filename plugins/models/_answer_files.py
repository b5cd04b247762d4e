"""Arrays by name in npz, safetensors, Parquet and tar files. Reading them runs no code."""

import abc
import functools
import io
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import safe_open

import kdkit

# as `safe_open` names them -> as torch does
SAFETENSORS = {
    **{"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"},
    **{"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "U8": "uint8"},
}


class ArrayFile(abc.ABC):
    """A file of arrays.

    Args:
        path: the file.
    """

    kind: str

    def __init__(self, path: Path) -> None:
        self.path = path

    def about(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return shape and type of an array, from the beginning of it: the rest may not fit into
        the memory.

        Raises:
            ModelError: there is none of that name, or the file is damaged.
        """
        try:
            return self._about(name)
        except kdkit.ModelError:  # it says more than `_damaged` would
            raise
        except Exception as error:  # whatever a damaged file makes a reader raise
            raise self._damaged(error) from None

    def read(self, name: str) -> torch.Tensor:
        """Return an array.

        Raises:
            ModelError: see `about`.
        """
        self.about(name)
        try:
            return self._read(name)
        except kdkit.ModelError:
            raise
        except Exception as error:
            raise self._damaged(error) from None

    @abc.abstractmethod
    def _about(self, name: str) -> tuple[tuple[int, ...], str]: ...

    @abc.abstractmethod
    def _read(self, name: str) -> torch.Tensor: ...

    def _refuse_unknown(self, name: str, names: Sequence[str]) -> None:
        if name not in names:
            raise kdkit.ModelError(
                f"{self.path.name}: has no array '{name}'; it has {', '.join(names[:8]) or 'none'}"
            )

    def _damaged(self, error: Exception) -> kdkit.ModelError:
        says = " ".join(str(error).split()) or type(error).__name__
        return kdkit.ModelError(f"{self.path.name}: no {self.kind} file, or damaged: {says}")


class Npz(ArrayFile):
    """Arrays that `numpy.savez` has written."""

    kind = "npz"

    def _about(self, name: str) -> tuple[tuple[int, ...], str]:
        with zipfile.ZipFile(self.path) as archive:
            self._refuse_unknown(name, [one.removesuffix(".npy") for one in archive.namelist()])
            with archive.open(f"{name}.npy") as entry:
                version = numpy.lib.format.read_magic(entry)
                header = (
                    numpy.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else numpy.lib.format.read_array_header_2_0
                )
                shape, _, kind = header(entry)
        return shape, str(kind.newbyteorder("="))

    def _read(self, name: str) -> torch.Tensor:
        # a pickle could run code
        with numpy.load(self.path, allow_pickle=False) as file:
            rows = file[name]
        # torch takes the machine's own byte order only
        return torch.from_numpy(rows.astype(rows.dtype.newbyteorder("=")))


class Safetensors(ArrayFile):
    """Tensors by name."""

    kind = "safetensors"

    def _about(self, name: str) -> tuple[tuple[int, ...], str]:
        with safe_open(self.path, framework="pt") as file:
            self._refuse_unknown(name, list(file.keys()))
            array = file.get_slice(name)
            kind = array.get_dtype()
            return tuple(array.get_shape()), SAFETENSORS.get(kind, kind)

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
            return found


class Parquet(ArrayFile):
    """Columns of lists of numbers, all of one length (extra `parquet`)."""

    kind = "Parquet"

    def _about(self, name: str) -> tuple[tuple[int, ...], str]:
        with self._opened() as file:
            schema = file.schema_arrow
            self._refuse_unknown(name, schema.names)
            kind = schema.field(name).type
            if not hasattr(kind, "value_type"):
                raise kdkit.ModelError(
                    f"{self.path.name}: '{name}' is {kind}, not lists of numbers"
                )
            first = next(iter(file.iter_batches(batch_size=1, columns=[name])), None)
            width = 0 if first is None else len(first.column(0)[0])
            numbers = numpy.dtype(kind.value_type.to_pandas_dtype())
            return (file.metadata.num_rows, width), numbers.name

    def _read(self, name: str) -> torch.Tensor:
        shape, _ = self._about(name)
        with self._opened() as file:
            column = file.read(columns=[name]).column(name).combine_chunks()
        numbers = column.flatten()
        lengths = {len(row) for row in column if row.is_valid}
        if column.null_count or numbers.null_count or lengths != {shape[1]}:
            raise kdkit.ModelError(
                f"{self.path.name}: the lists of '{name}' are not all {shape[1]} numbers"
            )
        return torch.from_numpy(numbers.to_numpy(zero_copy_only=False).copy()).view(shape)

    def _opened(self) -> Any:
        try:
            from pyarrow import parquet
        except ImportError:
            raise kdkit.ModelError(
                f"{self.path.name}: Parquet needs pyarrow: pip install 'kdkit[parquet]'"
            ) from None
        return parquet.ParquetFile(self.path)


class Tar(ArrayFile):
    """A shard of a web dataset: row i is of the i-th KEY, in KEY.NAME.npy; KEY.npy is of `logits`,
    KEY.npz of all its arrays. Other members, such as images, are left alone.
    """

    kind = "tar"

    def _about(self, name: str) -> tuple[tuple[int, ...], str]:
        rows = self._rows(name)
        return (len(rows), *rows[0].shape), rows[0].dtype.name

    def _read(self, name: str) -> torch.Tensor:
        rows = numpy.stack(self._rows(name))
        return torch.from_numpy(rows.astype(rows.dtype.newbyteorder("=")))

    def _rows(self, name: str) -> list[numpy.ndarray]:
        """Return an array's rows, all of one shape and type."""
        self._refuse_unknown(name, sorted({one for row in self._samples.values() for one in row}))
        rows: list[numpy.ndarray] = []
        for key, sample in self._samples.items():
            if name not in sample:
                raise kdkit.ModelError(f"{self.path.name}: '{key}' has no array '{name}'")
            row, first = sample[name], rows[0] if rows else sample[name]
            if (row.shape, row.dtype) != (first.shape, first.dtype):
                raise kdkit.ModelError(
                    f"{self.path.name}: '{name}' of '{key}' is {row.dtype} {row.shape}, and others"
                    f" are {first.dtype} {first.shape}"
                )
            rows.append(row)
        return rows

    @functools.cached_property
    def _samples(self) -> dict[str, dict[str, numpy.ndarray]]:
        """All arrays by key and name, in the order of the file."""
        samples: dict[str, dict[str, numpy.ndarray]] = {}
        # uncompressed: no member is larger than the file
        with tarfile.open(self.path, "r:") as archive:
            for member in archive:
                # a link would stand for another member; a sparse one may be larger than the file
                if not (member.isdir() or member.isreg()) or member.issparse():
                    raise kdkit.ModelError(f"{self.path.name}: '{member.name}' is no plain file")
                file = member.name.rpartition("/")[2]
                end = file.partition(".")[2]
                if (content := archive.extractfile(member)) is None or not end:
                    continue
                sample = samples.setdefault(member.name.removesuffix(f".{end}"), {})
                if not end.endswith(("npy", "npz")):
                    continue
                loaded = numpy.load(io.BytesIO(content.read()), allow_pickle=False)
                name = end.removesuffix("npy").removesuffix(".") or "logits"
                arrays = {name: loaded} if isinstance(loaded, numpy.ndarray) else dict(loaded)
                if sample.keys() & arrays.keys():
                    raise kdkit.ModelError(f"{self.path.name}: has '{member.name}' twice")
                sample |= arrays
        return samples


def array_file(path: Path) -> ArrayFile:
    """Return the reader of a file, by the end of its name; npz by default."""
    kinds: dict[str, type[ArrayFile]] = {
        ".safetensors": Safetensors,
        ".parquet": Parquet,
        ".tar": Tar,
    }
    return kinds.get(path.suffix, Npz)(path)
