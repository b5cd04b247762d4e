"""MNIST: handwritten digits, 28 x 28, grey.

LeCun, Cortes, Burges: The MNIST database of handwritten digits, 1998.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

import kdkit


class MnistOptions(kdkit.DatasetOptions):
    """Where the files are."""

    root: kdkit.RecipePath = Field(default=Path("data"), description="Folder that has, or gets, the folder `MNIST`.")
    download: bool = Field(default=False, description="Fetch the files if they are not there.")


class Mnist(kdkit.DatasetSource):
    """Handwritten digits, 28 x 28, grey: 60,000 for training and 10,000 for the test."""

    name = "mnist"
    Options = MnistOptions
    options: MnistOptions

    def info(self) -> kdkit.DataInfo:
        return kdkit.DataInfo((1, 28, 28), num_classes=10, num_train=60_000, num_test=10_000, class_names=tuple("0123456789"))

    def split(self, part: Literal["train", "test"]) -> kdkit.InMemory:
        from torchvision.datasets import MNIST

        root = self.options.root
        try:
            data = MNIST(root, train=part == "train", download=self.options.download)
        except Exception as error:  # missing, cut short, altered, no network: each raises something else
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise kdkit.DataError(f"dataset 'mnist' cannot be read from {root} ({reason}); `download: true` fetches its files") from error
        return kdkit.InMemory(data.data[:, None], data.targets)


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [Mnist]
