"""The small sets that torchvision reads: MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100, held in
memory.

LeCun, Cortes, Burges: The MNIST database of handwritten digits, 1998. Xiao, Rasul, Vollgraf:
Fashion-MNIST, 2017, arXiv:1708.07747. Krizhevsky: Learning multiple layers of features from tiny
images, 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

import kdkit

CLOTHES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


IDX = tuple(
    f"raw/{part}-{what}-ubyte"
    for part in ("train", "t10k")
    for what in ("images-idx3", "labels-idx1")
)


class SmallSetOptions(kdkit.DatasetOptions):
    """Where the files are."""

    root: kdkit.RecipePath = Field(
        default=Path("data"),
        description="Folder that has, or gets, the dataset's own folder.",
        json_schema_extra=kdkit.BOOKKEEPING,
    )
    download: bool = Field(
        default=False,
        description="Fetch the files if they are not there.",
        json_schema_extra=kdkit.BOOKKEEPING,
    )


class SmallSet(kdkit.DatasetSource):
    """What the four have in common: only their names and facts differ."""

    torchvision_name: ClassVar[str]
    folder: ClassVar[str]
    # `split` reads all images, whose numbers are known
    split_at_check = False
    files: ClassVar[tuple[str, ...]]
    facts: ClassVar[kdkit.DataInfo]
    Options = SmallSetOptions
    options: SmallSetOptions

    def lacks(self) -> kdkit.Lacking | None:
        """torchvision's files, whose digests it compares with those that it knows."""
        if not self.options.download or self._complete:
            return None
        return kdkit.Lacking(
            f"{self.torchvision_name} by torchvision", self.options.root / self.folder
        )

    def fetch(self) -> None:
        self._open("train", download=True)

    def info(self) -> kdkit.DataInfo:
        if not self.options.download and not (self.options.root / self.folder).is_dir():
            raise kdkit.DataError(
                f"dataset '{self.name}' is not in {self.options.root.absolute()}; `download: true`"
                " fetches its files"
            )
        return self.facts

    def split(self, part: Literal["train", "test"]) -> kdkit.InMemory:
        data = self._open(part)
        pixels = torch.as_tensor(data.data)
        # grey images come without an axis of channels, colours with it last
        images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        return kdkit.InMemory(images, torch.as_tensor(data.targets))

    @property
    def _complete(self) -> bool:
        return all((self.options.root / self.folder / file).is_file() for file in self.files)

    def _open(self, part: str, *, download: bool = False) -> Any:
        from torchvision import datasets

        root, kind = self.options.root, getattr(datasets, self.torchvision_name)
        if part == "test" and hasattr(kind, "train_list"):
            # it would look for the training files too, which a run without images has no use for
            kind = type(self.torchvision_name, (kind,), {"train_list": []})
        try:
            return kind(root, train=part == "train", download=download)
        # missing, cut short, altered, no network: each raises something else
        except Exception as error:
            reason = kdkit.cause(error)
            raise kdkit.DataError(
                f"dataset '{self.name}' cannot be read from {root} ({reason}); `download: true`"
                " fetches its files"
            ) from error


class Mnist(SmallSet):
    """Handwritten digits, 28 x 28, grey: 60,000 for training and 10,000 for the test."""

    name = "mnist"
    torchvision_name = "MNIST"
    folder = "MNIST"
    files = IDX
    facts = kdkit.DataInfo(
        (1, 28, 28),
        outputs=10,
        num_train=60_000,
        num_test=10_000,
        class_names=tuple("0123456789"),
    )


class FashionMnist(SmallSet):
    """Pictures of clothes, 28 x 28, grey: 60,000 for training and 10,000 for the test."""

    name = "fashion_mnist"
    torchvision_name = "FashionMNIST"
    folder = "FashionMNIST"
    files = IDX
    facts = kdkit.DataInfo(
        (1, 28, 28), outputs=10, num_train=60_000, num_test=10_000, class_names=CLOTHES
    )


class Cifar10(SmallSet):
    """Animals and vehicles, 32 x 32, RGB: 50,000 for training and 10,000 for the test."""

    name = "cifar10"
    torchvision_name, folder = "CIFAR10", "cifar-10-batches-py"
    files = ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6)))
    facts = kdkit.DataInfo(
        (3, 32, 32), outputs=10, num_train=50_000, num_test=10_000, class_names=THINGS
    )


class Cifar100(SmallSet):
    """A hundred kinds of things, 32 x 32, RGB: 50,000 for training and 10,000 for the test."""

    name = "cifar100"
    torchvision_name = "CIFAR100"
    folder = "cifar-100-python"
    files = ("meta", "train", "test")
    facts = kdkit.DataInfo((3, 32, 32), outputs=100, num_train=50_000, num_test=10_000)


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The datasets of this file."""
    return [Mnist, FashionMnist, Cifar10, Cifar100]
