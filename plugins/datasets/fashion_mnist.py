"""Fashion-MNIST: pictures of clothes, 28 x 28, grey.

Xiao, Rasul, Vollgraf: Fashion-MNIST, a novel image dataset for benchmarking machine learning algorithms, arXiv 1708.07747.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

import kdkit

CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class FashionMnistOptions(kdkit.DatasetOptions):
    """Where the files are."""

    root: kdkit.RecipePath = Field(default=Path("data"), description="Folder that has, or gets, the folder `FashionMNIST`.")
    download: bool = Field(default=False, description="Fetch the files if they are not there.")


class FashionMnist(kdkit.DatasetSource):
    """Pictures of clothes, 28 x 28, grey: 60,000 for training and 10,000 for the test."""

    name = "fashion_mnist"
    Options = FashionMnistOptions
    options: FashionMnistOptions

    def info(self) -> kdkit.DataInfo:
        return kdkit.DataInfo((1, 28, 28), num_classes=10, num_train=60_000, num_test=10_000, class_names=CLASSES)

    def split(self, part: Literal["train", "test"]) -> kdkit.InMemory:
        from torchvision.datasets import FashionMNIST

        root = self.options.root
        try:
            data = FashionMNIST(root, train=part == "train", download=self.options.download)
        except Exception as error:  # missing, cut short, altered, no network: each raises something else
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise kdkit.DataError(
                f"dataset 'fashion_mnist' cannot be read from {root} ({reason}); `download: true` fetches its files"
            ) from error
        return kdkit.InMemory(data.data[:, None], data.targets)


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [FashionMnist]
