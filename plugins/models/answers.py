"""A teacher's answers to the training images, from a file or a folder of files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, Field

import kdkit

from ._answer_files import array_file

FLOATING = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int16", "int32", "int64")
ROWS = "a row of floating-point logits for each training sample"
INDEX = "index.json"


# the index stands for its folder: it has the digests of all files, and a run's fingerprint its own
def _index_of(path: Path) -> Path:
    return path / INDEX if path.is_dir() else path


class AnswersSource(kdkit.KnownAnswers):
    """Answers that a teacher gave: `model: answers/ARRAY` with `file: FILE`, or a folder.

    ARRAY is the name of an array (N, K) in the file. Row i answers image i of the dataset's whole
    training part. A folder holds the rows in several files in order, and an `index.json`
    (`kdkit.AnswerIndex`) with their digests; of each row all logits, or the `top_k` largest. Its
    other arrays are outputs of the layers of their names, which losses may read.
    """

    name = "answers"

    class Options(kdkit.AnswersOptions):
        """Where the answers are."""

        file: Annotated[kdkit.RecipePath, AfterValidator(_index_of)] = Field(
            description=(
                "An npz, safetensors, Parquet or tar file (shard of a web dataset), or a folder of"
                " them, as `kdkit cache --export` writes it; reading it runs no code."
            )
        )

    options: Options

    def shape(self) -> tuple[int, ...]:
        """What the file says of the array."""
        if self._is_folder:
            index, array = self._indexed()
            return (index.rows, *array.shape)
        shape, kind = array_file(self.options.file).about(self.model_name)
        if kind not in FLOATING:
            raise kdkit.ModelError(
                f"{self.options.file.name}: '{self.model_name}' is {kind}, not {ROWS}"
            )
        return shape

    def read(self) -> torch.Tensor | kdkit.TopK:
        """The whole array."""
        # refuses what is no such array before all of it is read
        shape = self.shape()
        if not self._is_folder:
            return array_file(self.options.file).read(self.model_name)
        index, array = self._indexed()
        name, k = self.model_name, array.top_k
        if k is None:
            return self._joined(index, name, array.shape, (array.dtype,))
        if len(shape) != 2:
            raise kdkit.ModelError(f"'{name}' has `top_k`, and rows of {len(shape) - 1} dimensions")
        values = self._joined(index, f"{name}.values", (k,), (array.dtype,))
        indices = self._joined(index, f"{name}.indices", (k,), INTEGERS)
        if array.rest:
            rest = self._joined(index, f"{name}.rest", (1,), FLOATING)
            found = kdkit.TopK(values, indices, rest, array.shape[0])
        else:
            found = kdkit.TopK.of_log_probabilities(values, indices, array.shape[0])
        found.verify()
        return found

    def layers(self) -> Mapping[str, tuple[int, ...]]:
        """The other arrays of the folder's index; none of a file."""
        if not self._is_folder:
            return {}
        index, _ = self._indexed()
        arrays = ((n, one) for n, one in index.arrays.items() if n != self.model_name)
        return {n: _channels_first(one) for n, one in arrays if one.top_k is None}

    def read_layer(self, name: str) -> torch.Tensor:
        """All rows of an array; maps with channels last in memory stay so."""
        index, _ = self._indexed()
        array = index.arrays[name]
        rows = self._joined(index, name, array.shape, (array.dtype,))
        return rows.permute(0, 3, 1, 2) if array.channels_last else rows

    @property
    def _is_folder(self) -> bool:
        return self.options.file.suffix == ".json"

    def _indexed(self) -> tuple[kdkit.AnswerIndex, kdkit.AnswerArray]:
        index = kdkit.AnswerIndex.read(self.options.file)
        if self.model_name not in index.arrays:
            raise kdkit.ModelError(
                f"{self.options.file.parent.name}: has no array '{self.model_name}'; it has"
                f" {', '.join(index.arrays)}"
            )
        return index, index.arrays[self.model_name]

    def _joined(
        self, index: kdkit.AnswerIndex, name: str, shape: tuple[int, ...], kinds: tuple[str, ...]
    ) -> torch.Tensor:
        """Read an array's rows of a shape from all files."""
        parts = []
        for path, rows in index.verified(self.options.file):
            file, wanted = array_file(path), (rows, *shape)
            found, kind = file.about(name)
            if found != wanted:
                raise kdkit.ModelError(
                    f"{path.name}: '{name}' is {found}, and {INDEX} says {wanted}"
                )
            if kind not in kinds:
                raise kdkit.ModelError(
                    f"{path.name}: '{name}' is {kind}, and {INDEX} says {' or '.join(kinds)}"
                )
            parts.append(file.read(name))
        return torch.cat(parts)


def _channels_first(array: kdkit.AnswerArray) -> tuple[int, ...]:
    return (array.shape[-1], *array.shape[:-1]) if array.channels_last else array.shape


@kdkit.hookimpl
def kdkit_models() -> list[type[kdkit.ModelSource]]:
    return [AnswersSource]
