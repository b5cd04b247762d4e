"""CIFAR-10: animals and vehicles, 32 x 32, RGB.

Krizhevsky: Learning multiple layers of features from tiny images, 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

import kdkit

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Cifar10Options(kdkit.DatasetOptions):
    """Where the files are."""

    root: kdkit.RecipePath = Field(default=Path("data"), description="Folder that has, or gets, the folder `cifar-10-batches-py`.")
    download: bool = Field(default=False, description="Fetch the files if they are not there.")


class Cifar10(kdkit.DatasetSource):
    """Animals and vehicles, 32 x 32, RGB: 50,000 for training and 10,000 for the test."""

    name = "cifar10"
    Options = Cifar10Options
    options: Cifar10Options

    def info(self) -> kdkit.DataInfo:
        return kdkit.DataInfo((3, 32, 32), num_classes=10, num_train=50_000, num_test=10_000, class_names=CLASSES)

    def split(self, part: Literal["train", "test"]) -> kdkit.InMemory:
        from torchvision.datasets import CIFAR10

        root = self.options.root
        try:
            data = CIFAR10(root, train=part == "train", download=self.options.download)
        except Exception as error:  # missing, cut short, altered, no network: each raises something else
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise kdkit.DataError(f"dataset 'cifar10' cannot be read from {root} ({reason}); `download: true` fetches its files") from error
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2)
        return kdkit.InMemory(images.contiguous(), torch.tensor(data.targets))


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [Cifar10]
