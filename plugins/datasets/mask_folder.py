"""Images and masks of your own, in folders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

import kdkit

from ..tasks._segmentation import IGNORED
from ._masks import Masked, pairs, size_of, table

Byte = Annotated[int, Field(ge=0, le=255)]
Color = tuple[Byte, Byte, Byte]


class MaskFolderOptions(kdkit.DatasetOptions):
    """Where images and masks are, and what the masks' pixels mean."""

    root: kdkit.RecipePath = Field(description="Folder that holds the folders below.")
    classes: tuple[str, ...] | dict[str, Color] = Field(
        description=(
            "Names of the classes, in the order of the masks' values 0, 1, ...; or, for masks in"
            " colours, the colour [R, G, B] of each name."
        )
    )
    ignore: tuple[Byte, ...] = Field(
        default=(IGNORED,), description="Values of pixels that do not count."
    )
    ignore_colors: tuple[Color, ...] = Field(
        default=(), description="Colours of pixels that do not count, for masks in colours."
    )
    train: str = Field(default="train/images", description="Training images inside `root`.")
    train_masks: str = Field(default="train/masks", description="Their masks.")
    test: str = Field(default="test/images", description="Test images inside `root`.")
    test_masks: str = Field(default="test/masks", description="Their masks.")
    mask_ending: str = Field(
        default="",
        description="What a mask's name has behind its image's, such as `_mask` (none: '').",
    )

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [*self.classes]
        if len(set(names)) < len(names):
            raise ValueError("classes: two classes have one name")
        if isinstance(self.classes, dict):
            colors = [*self.classes.values(), *self.ignore_colors]
            if len(set(colors)) < len(colors):
                raise ValueError("classes: two classes have one colour")
            if self.ignore != (IGNORED,):
                raise ValueError("ignore: masks in colours have `ignore_colors`")
        elif self.ignore_colors:
            raise ValueError("ignore_colors: give the colours of `classes`, too")
        elif wrong := [value for value in self.ignore if value < len(names)]:
            raise ValueError(f"ignore: {wrong[0]} is the value of class '{names[wrong[0]]}'")
        return self


class MaskFolder(kdkit.DatasetSource):
    """Your own images with masks: train/images/*.jpg beside train/masks/*.png of the same names,
    and test/ likewise. Images of many sizes need `data.image_size`.

    A mask has the size of its image and one channel of class indices, or is in the colours that
    `classes` gives. Pixels are read as they are stored: an EXIF orientation is not applied.
    """

    name = "mask_folder"
    task = "segmentation"
    Options = MaskFolderOptions
    options: MaskFolderOptions

    def info(self) -> kdkit.DataInfo:
        train, test = self._files["train"], self._files["test"]
        names = tuple(self.options.classes)
        return kdkit.DataInfo((3, *size_of(train[0][0])), len(names), len(train), len(test), names)

    def own_files(self) -> Sequence[Path]:
        """The folders of images and masks."""
        o = self.options
        folders = [o.root / name for name in (o.train, o.train_masks, o.test, o.test_masks)]
        return [folder for folder in folders if folder.is_dir()]

    def split(self, part: Literal["train", "test"]) -> Masked:
        o = self.options
        if isinstance(o.classes, dict):
            known = {color: index for index, color in enumerate(o.classes.values())}
            ignored = dict.fromkeys(o.ignore_colors, IGNORED)
            return Masked(self._files[part], colors=known | ignored)
        return Masked(self._files[part], table(ignore=o.ignore))

    @cached_property
    def _files(self) -> dict[str, list[tuple[Path, Path]]]:
        o = self.options
        folders = {"train": (o.train, o.train_masks), "test": (o.test, o.test_masks)}
        return {
            part: pairs(o.root / images, o.root / masks, o.mask_ending)
            for part, (images, masks) in folders.items()
        }


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [MaskFolder]
