"""Images with boxes in the layout of Pascal VOC.

Everingham et al., "The Pascal Visual Object Classes Challenge", IJCV 2010. The development kit
(http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf) numbers pixels from 1, (1, 1) at the
top left, and a box includes its last row and column.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from pydantic import Field

import kdkit

from ._boxes import PARTS, UNKNOWN, BoxEntry, BoxSet, BoxSetOptions, ImageEntry
from ._files import refuse_missing
from ._table import as_number

CORNERS = ("xmin", "ymin", "xmax", "ymax")
FLAGS = {"": False, "0": False, "1": True, "false": False, "true": True}


class VocBoxesOptions(BoxSetOptions):
    """Where the files are, and which lists of images."""

    root: kdkit.RecipePath = Field(
        description="Folder that holds JPEGImages, Annotations and ImageSets, such as VOC2012."
    )
    train: str = Field(
        default="train", description="List of the training images: a name in ImageSets/Main."
    )
    test: str = Field(default="test", description="List of the test images.")
    first_pixel: Literal[0, 1] = Field(
        default=1,
        description=(
            "Number of the first pixel: 1 in VOC's own files, where a box includes its last pixel;"
            " 0 as labelImg, CVAT and others write, where a box ends at `xmax`."
        ),
    )


class VocBoxes(BoxSet):
    """Your own images with boxes in Pascal VOC's layout, or VOC itself: JPEGImages/NAME.jpg (or
    .png...), Annotations/NAME.xml, and names in ImageSets/Main/{train,test,...}.txt. Images of many
    sizes need `data.image_size`.

    A box in pixels is (xmin - 1, ymin - 1, xmax, ymax), or (xmin, ymin, xmax, ymax) with
    `first_pixel: 0`. Difficult objects do not count. Classes are those of the training boxes, in
    the order of their letters, or `classes`. Pixels are read as they are stored: an image whose
    size is not the one in its xml, such as one that an EXIF orientation turns, is refused.
    """

    name = "voc_boxes"
    Options = VocBoxesOptions
    options: VocBoxesOptions

    @property
    def files(self) -> Sequence[Path]:
        lists = [self._list(part) for part in PARTS]
        try:
            names = [name for part in PARTS for name, _ in self._names[part]]
        except kdkit.DataError:  # told when the data are opened
            names = []
        return [*lists, *map(self._annotation, names)]

    def entries(self, part: Literal["train", "test"]) -> list[ImageEntry]:
        names = self._names[part]
        images = [self._image(name) for name, _ in names]
        refuse_missing(self._list(part), images, lambda place: f"line {names[place][1]}")
        return [
            _read(self._annotation(name), image, self.options.first_pixel)
            for (name, _), image in zip(names, images, strict=True)
        ]

    def notes(self) -> Sequence[str]:
        """As for all datasets of boxes; and whether pixels seem to be numbered from 0."""
        told = [*super().notes()]
        boxes = [box for part in PARTS for entry in self._entries[part] for box in entry.boxes]
        early = [box for box in boxes if -1 <= min(box.corners) < 0]
        if early and self.options.first_pixel == 1:
            told.append(
                f"boxes that begin at pixel 0: {len(early):,} (first: {early[0].at}); if the first"
                " pixel is 0, as most tools write, say `first_pixel: 0`"
            )
        return told

    @cached_property
    def _names(self) -> dict[str, list[tuple[str, int]]]:
        """Names of images, each with its line in the list."""
        found: dict[str, list[tuple[str, int]]] = {}
        for part in PARTS:
            file = self._list(part)
            lines = [line.strip() for line in _text(file).splitlines()]
            found[part] = [(name, number) for number, name in enumerate(lines, 1) if name]
            if not found[part]:
                raise kdkit.DataError(f"{file}: lists no image")
        return found

    def _list(self, part: Literal["train", "test"]) -> Path:
        name = self.options.train if part == "train" else self.options.test
        return self.options.root / "ImageSets" / "Main" / f"{name}.txt"

    def _annotation(self, name: str) -> Path:
        return self.options.root / "Annotations" / f"{name}.xml"

    def _image(self, name: str) -> str:
        """Return the file of an image, whatever its format; that of a JPEG if there is none."""
        from torchvision.datasets.folder import IMG_EXTENSIONS

        stem = os.path.join(self.options.root, "JPEGImages", name)
        endings = [*IMG_EXTENSIONS, *(ending.upper() for ending in IMG_EXTENSIONS)]
        files = (f"{stem}{ending}" for ending in endings)
        return next((file for file in files if os.path.isfile(file)), f"{stem}.jpg")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        there = ", ".join(sorted(one.stem for one in file.parent.glob("*.txt"))) or "none"
        raise kdkit.DataError(f"{file}: no such file; lists there: {there}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise kdkit.DataError(f"{file}: cannot be read: {error}") from error


def _read(file: Path, image: str, first_pixel: int) -> ImageEntry:
    """Read the boxes of an image.

    Raises:
        DataError: the file is missing or damaged, or an object in it lacks something.
    """
    if not file.is_file():
        raise kdkit.DataError(
            f"{file}: no such file; an image without objects has an xml file without `object`"
        )
    try:
        # expat, which reads it, follows no reference to another file
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError, LookupError, ValueError) as error:
        raise kdkit.DataError(f"{file}: is no XML: {error}") from error
    width, height = (int(_number(root, f"size/{side}") or 0) for side in ("width", "height"))
    size = (width, height) if width > 0 and height > 0 else UNKNOWN
    boxes = [
        _box(node, f"{file}: object {number}", first_pixel)
        for number, node in enumerate(root.findall("object"), 1)
    ]
    return ImageEntry(image, size, boxes)


def _box(node: ElementTree.Element, at: str, first_pixel: int) -> BoxEntry:
    kind = (node.findtext("name") or "").strip()
    if not kind:
        raise kdkit.DataError(f"{at}: has no name")
    x0, y0, x1, y1 = (_number(node, f"bndbox/{side}") for side in CORNERS)
    if x0 is None or y0 is None or x1 is None or y1 is None:
        raise kdkit.DataError(f"{at}: has no bndbox of four numbers: {', '.join(CORNERS)}")
    difficult = FLAGS.get((node.findtext("difficult") or "").strip().lower())
    if difficult is None:
        raise kdkit.DataError(f"{at}: difficult is neither 0 nor 1")
    return BoxEntry((x0 - first_pixel, y0 - first_pixel, x1, y1), kind, difficult, at)


def _number(node: ElementTree.Element, path: str) -> float | None:
    return as_number((node.findtext(path) or "").strip())


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [VocBoxes]
