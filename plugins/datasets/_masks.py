"""Images beside masks, as files: what the datasets of segmentation share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import kdkit

from ..tasks._segmentation import IGNORED

ORIENTATION = 0x0112  # EXIF tag
MASKS = (".png", ".bmp", ".tif", ".tiff", ".gif")


class Masked:
    """Image files beside the files of their masks; an item is (PIL image, mask (H, W) uint8).

    Args:
        files: image and mask of each item.
        values: class index of each of the 256 values of a mask's pixel (None: the value itself).
        colors: class index by (R, G, B), for masks in colours.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, Path]],
        values: np.ndarray[Any, Any] | None = None,
        colors: Mapping[tuple[int, int, int], int] | None = None,
    ) -> None:
        self.paths = [image for image, _ in files]
        self.masks = [mask for _, mask in files]
        self.values, self.colors = values, colors

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, mask = _opened(self.paths[index]), _opened(self.masks[index])
        if image.size != mask.size == image.size[::-1] and image.getexif().get(ORIENTATION):
            raise kdkit.DataError(
                f"{self.paths[index]}: lies on its side, its EXIF orientation says how to turn it,"
                " and its mask is turned already; write its pixels upright"
                " (`PIL.ImageOps.exif_transpose`)"
            )
        return image, self._classes(mask, self.masks[index])

    def _classes(self, mask: Any, path: Path) -> Any:
        if self.colors is not None:
            return _by_color(np.asarray(mask.convert("RGB")), self.colors, path)
        if mask.mode not in ("L", "P", "1"):
            raise kdkit.DataError(
                f"{path}: a mask has a class index for each pixel, and this is of PIL's mode"
                f" {mask.mode}; give the colours of `classes` if it is in colours"
            )
        indices = np.asarray(mask, dtype=np.uint8)
        return indices if self.values is None else self.values[indices]


def _opened(path: Path) -> Any:
    from PIL import Image

    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # a broken file raises whatever its format's reader raises
        raise kdkit.DataError(f"{path}: cannot be read as an image: {error}") from error
    return image


def _by_color(
    pixels: np.ndarray[Any, Any], colors: Mapping[tuple[int, int, int], int], path: Path
) -> np.ndarray[Any, Any]:
    codes = _code(*(pixels[..., channel].astype(np.int64) for channel in range(3)))
    known = np.array([_code(*color) for color in colors])
    order = known.argsort()
    places = order[np.searchsorted(known, codes, sorter=order).clip(max=len(known) - 1)]
    wrong = known[places] != codes
    if wrong.any():
        color = tuple(pixels[wrong][0].tolist())
        raise kdkit.DataError(f"{path}: a pixel has the colour {color}, which is no class's")
    indices: np.ndarray[Any, Any] = np.array([*colors.values()], dtype=np.uint8)[places]
    return indices


def _code(red: Any, green: Any, blue: Any) -> Any:
    return (red << 16) + (green << 8) + blue


def table(indices: Mapping[int, int] | None = None, ignore: Sequence[int] = ()) -> Any:
    """Class index of each value of a pixel: as in `indices` (others do not count), or the value
    itself but for those in `ignore`.
    """
    values = np.arange(256, dtype=np.uint8) if indices is None else np.full(256, IGNORED, np.uint8)
    for value, index in (indices or {}).items():
        values[value] = index
    values[[*ignore]] = IGNORED
    return values


def pairs(images: Path, masks: Path, ending: str = "") -> list[tuple[Path, Path]]:
    """Pair the images of a folder with their masks: the same name, with `ending` before its
    suffix.

    Raises:
        DataError: a folder does not exist or has no images, an image has no mask, or two have one.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    for folder in (images, masks):
        if not folder.is_dir():
            raise kdkit.DataError(f"{folder}: no such folder")
    found = sorted(path for path in images.iterdir() if path.suffix.lower() in IMG_EXTENSIONS)
    if not found:
        raise kdkit.DataError(f"{images}: has no images (looked for {', '.join(IMG_EXTENSIONS)})")
    if images == masks:
        raise kdkit.DataError(f"{images}: holds images and masks; give each a folder of its own")
    of_masks = sorted(path for path in masks.iterdir() if path.suffix.lower() in MASKS)
    for files in (found, of_masks):
        _refuse_twins(files)
    there = {path.stem: path for path in of_masks}
    missing = [path.name for path in found if path.stem + ending not in there]
    if missing:
        others = f" and {len(missing) - 1:,} others" if len(missing) > 1 else ""
        raise kdkit.DataError(
            f"{masks}: has no mask {Path(missing[0]).stem}{ending}.png for {missing[0]}{others}"
            f" (looked for {', '.join(MASKS)})"
        )
    return [(path, there[path.stem + ending]) for path in found]


def _refuse_twins(files: Sequence[Path]) -> None:
    """Refuse two files of one name, such as a.jpg and a.png: which belongs to which is unknown."""
    for one, other in itertools.pairwise(sorted(files, key=lambda path: path.stem)):
        if one.stem == other.stem:
            raise kdkit.DataError(f"{one.parent}: has {one.name} and {other.name}, of one name")


def size_of(path: Path) -> tuple[int, int]:
    """Return the height and width of an image, from its header."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:
        raise kdkit.DataError(f"{path}: cannot be read as an image: {error}") from error
