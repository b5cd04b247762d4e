"""Image files as one part of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import kdkit


class Files:
    """Image files with their targets; an item is an RGB image.

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
