"""Image files as one part of a dataset."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kdkit

MOST_TOLD = 3  # missing files that a message names


class Files:
    """Image files with their targets; an item is an RGB image.

    Its pixels are those that the file holds, as for torchvision's and timm's loaders: an EXIF
    orientation is not applied, so that figures and exported networks are those of these libraries,
    and coordinates among the targets belong to the stored pixels.

    Args:
        paths: of each image.
        labels: their targets, a sequence or a tensor (N, ...).
    """

    def __init__(self, paths: Sequence[str], labels: Any) -> None:
        self.paths = paths
        self.labels = labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        from PIL import Image

        try:
            with Image.open(self.paths[index]) as image:
                # more than 8 bits, which kdkit refuses and RGB would cut off
                wide = image.mode.startswith(("I", "F"))
                return image.convert(image.mode if wide else "RGB"), self.labels[index]
        except Exception as error:  # a broken file raises whatever its format's reader raises
            raise kdkit.DataError(
                f"{self.paths[index]}: cannot be read as an image: {error}"
            ) from error


def refuse_missing(table: Path, paths: Sequence[str], at: Callable[[int], str]) -> None:
    """Check that the image files which a table, list or the like names exist.

    Args:
        table: the file that names them.
        paths: of the images.
        at: where in the table an image is named, by its place in `paths`.

    Raises:
        DataError: some do not exist.
    """
    missing = [place for place, path in enumerate(paths) if not os.path.isfile(path)]
    if missing:
        told = ", ".join(f"{at(place)} {paths[place]!r}" for place in missing[:MOST_TOLD])
        more = ", ..." if len(missing) > MOST_TOLD else ""
        raise kdkit.DataError(
            f"{table}: {len(missing):,} of {len(paths):,} image files do not exist: {told}{more}"
        )
