"""CamVid: street scenes from a car, with 11 classes of pixels.

Brostow, Fauqueur, Cipolla, "Semantic Object Classes in Video: A High-Definition Ground Truth
Database", Pattern Recognition Letters 2009; in the split and classes of Badrinarayanan et al.,
"SegNet", TPAMI 2017, arXiv:1511.00561.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field

import kdkit

from ._masks import Masked, pairs, size_of, table

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
UNLABELLED = 11


class CamVidOptions(kdkit.DatasetOptions):
    """Where the frames are."""

    root: kdkit.RecipePath = Field(
        default=Path("data/camvid"),
        description="Folder with train, trainannot, val, valannot, test and testannot.",
        json_schema_extra=kdkit.BOOKKEEPING,
    )
    val: Literal["train", "leave"] = Field(
        default="train", description="Whether the 101 validation frames are trained on, too."
    )


class CamVid(kdkit.DatasetSource):
    """Street scenes, 11 classes, in SegNet's split: 367 frames for training (468 with those of
    validation) and 233 for the test; pixels of no class do not count.

    Frames are 480 x 360 as published; smaller copies work, too.
    """

    name = "camvid"
    task = "segmentation"
    Options = CamVidOptions
    options: CamVidOptions

    def info(self) -> kdkit.DataInfo:
        train, test = self._files["train"], self._files["test"]
        shape = (3, *size_of(train[0][0]))
        return kdkit.DataInfo(shape, len(CLASSES), len(train), len(test), CLASSES)

    def own_files(self) -> Sequence[Path]:
        """The folder, as copies of several sizes are in use."""
        return [self.options.root] if self.options.root.is_dir() else []

    def split(self, part: Literal["train", "test"]) -> Masked:
        return Masked(self._files[part], table(ignore=(UNLABELLED,)))

    @cached_property
    def _files(self) -> dict[str, list[tuple[Path, Path]]]:
        trained = ["train", "val"] if self.options.val == "train" else ["train"]
        root = self.options.root
        return {
            part: [pair for name in names for pair in pairs(root / name, root / f"{name}annot")]
            for part, names in (("train", trained), ("test", ["test"]))
        }


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [CamVid]
