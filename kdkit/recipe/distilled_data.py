"""The file of a distilled dataset, and a dataset whose training part is read from one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kdkit import files
from kdkit.contracts.dataset_source import DataInfo, DatasetSource, InMemory, Lacking
from kdkit.errors import DataError, RunError

ABOUT, TENSORS = "kdkit", "tensors"
"""Keys of the safetensors metadata, sealed JSON of what made the images, and in it of the digest of
the tensors.
"""


def write(path: Path, images: Tensor, labels: Tensor, about: dict[str, Any]) -> None:
    """Write images uint8 (M, C, H, W) and labels, int64 (M,) or float32 (M, K), atomically.

    Args:
        path: of the file.
        images: the images.
        labels: their labels.
        about: plain values that say what made them; readable without loading the tensors.
    """
    tensors = {"images": images.cpu().contiguous(), "labels": labels.cpu().contiguous()}
    told = files.sealed({**about, TENSORS: _digest(**tensors)})
    files.write_atomically(path, save(tensors, {ABOUT: json.dumps(told, sort_keys=True)}))


def read(path: Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Read images, labels and what made them.

    Raises:
        DataError: it is no such file, or damaged.
    """
    try:
        with safe_open(path, "pt") as opened:
            told = json.loads((opened.metadata() or {})[ABOUT])
            about = files.unsealed(path, told, "it must be made again")
            images, labels = opened.get_tensor("images"), opened.get_tensor("labels")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(
            f"{path}: is no file of `kdkit distill-data`, or damaged ({type(error).__name__})"
        ) from None
    except RunError as error:
        raise DataError(str(error)) from None
    if not isinstance(about, dict) or about.get(TENSORS) != _digest(images, labels):
        raise DataError(f"{path}: is damaged: its images or labels are not those that were written")
    return images, labels, about


def _digest(images: Tensor, labels: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in (images, labels):
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


class Distilled(DatasetSource):
    """A dataset whose training part is replaced by the images of a file; the test part stays."""

    split_at_check = True

    def __init__(
        self,
        source: DatasetSource,
        path: Path,
        labels: Literal["shares", "hard", "solved"],
        *,
        resized: bool = False,
    ) -> None:
        super().__init__(source.options)
        self._source, self._path, self._labels, self._resized = source, path, labels, resized
        self.name = source.name  # type: ignore[misc]
        self.task = source.task  # type: ignore[misc]

    def lacks(self) -> Lacking | None:
        return self._source.lacks()

    def fetch(self) -> None:
        self._source.fetch()

    def info(self) -> DataInfo:
        """Return the dataset's own, of as many training images as the file has.

        Raises:
            DataError: the file is of other classes, or its images are of another shape and not
                resized.
        """
        info = self._source.info()
        images, _, about = read(self._path)
        if about["outputs"] != info.outputs:
            raise DataError(
                f"{self._path}: has {about['outputs']} classes of dataset '{about['dataset']}', and"
                f" dataset '{self.name}' has {info.outputs}"
            )
        # 0: the dataset's images are of several sizes
        known = not self._resized and 0 not in info.image_shape
        if known and images.shape[1:] != info.image_shape:
            raise DataError(
                f"{self._path}: has images of {tuple(images.shape[1:])} (channels, height, width),"
                f" and dataset '{self.name}' has {info.image_shape}; `data.image_size` resizes both"
            )
        return dataclasses.replace(info, num_train=len(images))

    def own_files(self) -> Sequence[Path]:
        return self._source.own_files()

    def notes(self) -> Sequence[str]:
        _, _, about = read(self._path)
        return [
            f"the training images are distilled by '{about['method']}' from {about['samples']:,}"
            f" of dataset '{about['dataset']}'",
            *self._source.notes(),
        ]

    def split(self, part: Literal["train", "test"]) -> Any:
        if part == "test":
            return self._source.split(part)
        images, labels, _ = read(self._path)
        if labels.ndim == 2 and self._labels == "hard":
            labels = labels.argmax(1)
        if labels.ndim == 2 and self._labels == "shares":
            shares = labels.clamp_min(0)
            labels = shares / shares.sum(1, keepdim=True)
        return InMemory(images, labels if labels.ndim == 2 else labels.to(torch.int64))
