"""A teacher's answers to the training images, from a file."""

import zipfile
from pathlib import Path

import numpy
import torch
from pydantic import Field
from safetensors import safe_open

import kdkit

# `safe_open` names types so; `numpy` has no bfloat16.
FLOATING = ("F16", "BF16", "F32", "F64", "float16", "float32", "float64")
ROWS = "a row of floating-point logits for each training image"


class AnswersSource(kdkit.KnownAnswers):
    """Answers that a teacher gave: `model: answers/ARRAY` with `file: FILE`.

    ARRAY is the name of an array (N, K) in the file. Row i answers image i of the dataset's whole
    training part.
    """

    name = "answers"

    class Options(kdkit.AnswersOptions):
        """Where the answers are."""

        file: kdkit.RecipePath = Field(
            description="An npz or safetensors file; reading it runs no code."
        )

    options: Options

    def shape(self) -> tuple[int, ...]:
        """What the file says of the array."""
        try:
            shape, kind = (_npz if self._is_npz else _safetensors)(
                self.options.file, self.model_name
            )
        # it says more than `_damaged` would
        except kdkit.ModelError:
            raise
        except Exception as error:  # whatever a damaged file makes a reader raise
            raise self._damaged(error) from None
        if kind not in FLOATING:
            raise kdkit.ModelError(
                f"{self.options.file.name}: '{self.model_name}' is {kind}, not {ROWS}"
            )
        return shape

    def read(self) -> torch.Tensor:
        """The whole array."""
        # refuses what is no such array before all of it is read
        self.shape()
        try:
            if self._is_npz:
                # a pickle could run code
                with numpy.load(self.options.file, allow_pickle=False) as file:
                    rows = file[self.model_name]
                # torch takes the machine's own byte order only
                return torch.from_numpy(rows.astype(rows.dtype.newbyteorder("=")))
            with safe_open(self.options.file, framework="pt") as file:
                found: torch.Tensor = file.get_tensor(self.model_name)
                return found
        except Exception as error:
            raise self._damaged(error) from None

    @property
    def _is_npz(self) -> bool:
        return self.options.file.suffix != ".safetensors"

    def _damaged(self, error: Exception) -> kdkit.ModelError:
        kind = "npz" if self._is_npz else "safetensors"
        says = " ".join(str(error).split()) or type(error).__name__
        return kdkit.ModelError(f"{self.options.file.name}: no {kind} file, or damaged: {says}")


def _npz(path: Path, name: str) -> tuple[tuple[int, ...], str]:
    """Shape and type of an array, from the first bytes of it: the rest may not fit into the
    memory.
    """
    with zipfile.ZipFile(path) as archive:
        _refuse_unknown(path, name, [entry.removesuffix(".npy") for entry in archive.namelist()])
        with archive.open(f"{name}.npy") as entry:
            version = numpy.lib.format.read_magic(entry)
            header = (
                numpy.lib.format.read_array_header_1_0
                if version == (1, 0)
                else numpy.lib.format.read_array_header_2_0
            )
            shape, _, kind = header(entry)
    return shape, str(kind.newbyteorder("="))


def _safetensors(path: Path, name: str) -> tuple[tuple[int, ...], str]:
    with safe_open(path, framework="pt") as file:
        _refuse_unknown(path, name, list(file.keys()))
        array = file.get_slice(name)
        return tuple(array.get_shape()), array.get_dtype()


def _refuse_unknown(path: Path, name: str, names: list[str]) -> None:
    if name not in names:
        raise kdkit.ModelError(
            f"{path.name}: has no array '{name}'; it has {', '.join(names[:8]) or 'none'}"
        )


@kdkit.hookimpl
def kdkit_models() -> list[type[kdkit.ModelSource]]:
    return [AnswersSource]
