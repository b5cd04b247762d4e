"""Sets of images with masks that torchvision reads: Pascal VOC, Cityscapes, Oxford-IIIT Pet.

Everingham et al., "The Pascal Visual Object Classes Challenge", IJCV 2010. Cordts et al., "The
Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016, arXiv:1604.01685. Parkhi et
al., "Cats and Dogs", CVPR 2012.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

import kdkit

from ..tasks._segmentation import IGNORED
from ._masks import Masked, table

VOC_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
TRIMAP = ("pet", "background", "border")


class MaskSetOptions(kdkit.DatasetOptions):
    """Where the files are."""

    root: kdkit.RecipePath = Field(
        default=Path("data"),
        description="Folder that has, or gets, the dataset's own folder.",
        json_schema_extra=kdkit.BOOKKEEPING,
    )


class FetchedOptions(MaskSetOptions):
    """Where the files are, and whether they may be fetched."""

    download: bool = Field(
        default=False,
        description="Fetch the files if they are not there.",
        json_schema_extra=kdkit.BOOKKEEPING,
    )


class MaskSet(kdkit.DatasetSource):
    """What the three have in common: torchvision finds the files, and kdkit reads them."""

    task = "segmentation"
    # a file for each image is looked for
    split_at_check = False
    folder: ClassVar[str]
    shape: ClassVar[tuple[int, int, int]] = (3, 0, 0)
    options: MaskSetOptions

    @abc.abstractmethod
    def files(self, part: Literal["train", "test"], *, download: bool = False) -> Any:
        """Image and mask files of a part, [(Path, Path)], by a dataset of torchvision."""

    @property
    @abc.abstractmethod
    def classes(self) -> Sequence[str]:
        """Names of the classes."""

    @property
    def values(self) -> Any:
        """Class index of each value of a mask's pixel."""
        return table()

    def lacks(self) -> kdkit.Lacking | None:
        """The whole set, if its folder is not there."""
        there = (self.options.root / self.folder).is_dir()
        if there or not getattr(self.options, "download", False):
            return None
        return kdkit.Lacking(f"{self.name} by torchvision", self.options.root / self.folder)

    def fetch(self) -> None:
        for part in ("train", "test"):
            self._read(part, download=True)

    def info(self) -> kdkit.DataInfo:
        train, test = len(self._files["train"]), len(self._files["test"])
        return kdkit.DataInfo(self.shape, len(self.classes), train, test, tuple(self.classes))

    def split(self, part: Literal["train", "test"]) -> Masked:
        return Masked(self._files[part], self.values)

    @cached_property
    def _files(self) -> Mapping[str, list[tuple[Path, Path]]]:
        return {part: self._read(part) for part in ("train", "test")}

    def _read(self, part: Any, *, download: bool = False) -> list[tuple[Path, Path]]:
        try:
            found = self.files(part, download=download)
        # missing, incomplete, no network: each raises something else
        except Exception as error:
            fetches = (
                "; `download: true` fetches its files" if hasattr(self.options, "download") else ""
            )
            raise kdkit.DataError(
                f"dataset '{self.name}' cannot be read from {self.options.root}"
                f" ({kdkit.cause(error)}){fetches}"
            ) from error
        return [(Path(image), Path(mask)) for image, mask in found]


class VocOptions(FetchedOptions):
    """Where the files are, and which year's."""

    year: Literal["2007", "2008", "2009", "2010", "2011", "2012"] = Field(
        default="2012", description="Year of the challenge."
    )


class VocMasks(MaskSet):
    """Pascal VOC: 20 kinds of things and the background; 1,464 images for training and 1,449 (its
    validation part) for the test in 2012. Images of many sizes: set `data.image_size`.
    """

    name = "voc_masks"
    folder = "VOCdevkit"
    classes = VOC_CLASSES
    Options = VocOptions
    options: VocOptions

    def files(self, part: Literal["train", "test"], *, download: bool = False) -> Any:
        from torchvision.datasets import VOCSegmentation

        image_set = "train" if part == "train" else "val"
        found = VOCSegmentation(self.options.root, self.options.year, image_set, download)
        return zip(found.images, found.masks, strict=True)


class Cityscapes(MaskSet):
    """Street scenes of 50 cities, 1024 x 2048, in the 19 classes that are evaluated: 2,975 for
    training and 500 (its validation part) for the test. `root` holds leftImg8bit and gtFine.
    """

    name = "cityscapes"
    folder = "leftImg8bit"
    shape = (3, 1024, 2048)
    Options = MaskSetOptions

    def files(self, part: Literal["train", "test"], *, download: bool = False) -> Any:
        from torchvision.datasets import Cityscapes as Reader

        split = "train" if part == "train" else "val"
        found = Reader(self.options.root, split, "fine", "semantic")
        return ((image, masks[0]) for image, masks in zip(found.images, found.targets, strict=True))

    @property
    def classes(self) -> Sequence[str]:
        return [name for _, name in sorted(self._train_ids.values())]

    @property
    def values(self) -> Any:
        return table({value: index for value, (index, _) in self._train_ids.items()})

    @property
    def _train_ids(self) -> dict[int, tuple[int, str]]:
        """Class index and name by the value of a pixel, for classes that are evaluated."""
        from torchvision.datasets import Cityscapes as Reader

        return {c.id: (c.train_id, c.name) for c in Reader.classes if 0 <= c.train_id < IGNORED}


class PetMasks(MaskSet):
    """Oxford-IIIT Pet: cats and dogs with trimaps of pet, background and border; 3,680 images for
    training and 3,669 for the test, of many sizes: set `data.image_size`.
    """

    name = "pet_masks"
    folder = "oxford-iiit-pet"
    classes = TRIMAP
    Options = FetchedOptions

    def files(self, part: Literal["train", "test"], *, download: bool = False) -> Any:
        from torchvision.datasets import OxfordIIITPet

        split = "trainval" if part == "train" else "test"
        OxfordIIITPet(self.options.root, split, "segmentation", download=download)
        folder = self.options.root / self.folder
        lines = (folder / "annotations" / f"{split}.txt").read_text().splitlines()
        names = [line.split()[0] for line in lines]
        trimaps = folder / "annotations" / "trimaps"
        return [(folder / "images" / f"{name}.jpg", trimaps / f"{name}.png") for name in names]

    @property
    def values(self) -> Any:
        return table({1: 0, 2: 1, 3: 2})


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The datasets of this file."""
    return [VocMasks, Cityscapes, PetMasks]
