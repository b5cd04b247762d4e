"""CIFAR-100: a hundred kinds of things, 32 x 32, RGB.

Krizhevsky: Learning multiple layers of features from tiny images, 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

import kdkit


class Cifar100Options(kdkit.DatasetOptions):
    """Where the files are."""

    root: kdkit.RecipePath = Field(default=Path("data"), description="Folder that has, or gets, the folder `cifar-100-python`.")
    download: bool = Field(default=False, description="Fetch the files if they are not there.")


class Cifar100(kdkit.DatasetSource):
    """A hundred kinds of things, 32 x 32, RGB: 50,000 for training and 10,000 for the test."""

    name = "cifar100"
    Options = Cifar100Options
    options: Cifar100Options

    def info(self) -> kdkit.DataInfo:
        return kdkit.DataInfo((3, 32, 32), num_classes=100, num_train=50_000, num_test=10_000)

    def split(self, part: Literal["train", "test"]) -> kdkit.InMemory:
        from torchvision.datasets import CIFAR100

        root = self.options.root
        try:
            data = CIFAR100(root, train=part == "train", download=self.options.download)
        except Exception as error:  # missing, cut short, altered, no network: each raises something else
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise kdkit.DataError(
                f"dataset 'cifar100' cannot be read from {root} ({reason}); `download: true` fetches its files"
            ) from error
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2)
        return kdkit.InMemory(images.contiguous(), torch.tensor(data.targets))


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [Cifar100]
