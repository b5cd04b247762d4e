"""Images with boxes: what the datasets of detection share."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

import kdkit

from ._files import Files
from ._masks import ORIENTATION, size_of

PARTS: dict[Literal["train", "test"], str] = {"train": "training", "test": "test"}
UNKNOWN = (0, 0)  # size of an image that its annotations do not tell
MOST_NAMES = 20  # classes that a message lists
NO_AREA = "without an area, left out"
OUTSIDE = "outside their images, left out"
BEYOND = "that reach beyond their images, clipped"
OTHER = "of other classes than `classes` names, left out"
TWICE = "listed twice, both kept"
LEFT_OUT = (NO_AREA, OUTSIDE, OTHER)


class BoxEntry(NamedTuple):
    """A box as its file lists it.

    Attributes:
        corners: x0, y0, x1, y1 in pixels; the first pixel reaches from 0 to 1.
        kind: name of its class.
        ignored: whether it does not count, being neither found nor missed.
        at: file and place where it is listed, for messages.
    """

    corners: tuple[float, float, float, float]
    kind: str
    ignored: bool
    at: str


class ImageEntry(NamedTuple):
    """An image file with its boxes; `size` is (width, height), `UNKNOWN` if no file tells it."""

    path: str
    size: tuple[int, int]
    boxes: list[BoxEntry]


class Boxed:
    """Image files with boxes; an item is an RGB image and a mapping of `boxes` (M, 4) float32, x0,
    y0, x1, y1 in pixels of the image, `labels` (M,) int64 and `ignored` (M,) bool.

    Boxes are clipped to the image; those without an area, or outside, are left out.

    Args:
        entries: of the images.
        classes: index of each class by its name; boxes of other classes are left out.
    """

    def __init__(self, entries: Sequence[ImageEntry], classes: Mapping[str, int]) -> None:
        self.paths = [entry.path for entry in entries]
        self._images = Files(self.paths, range(len(entries)))
        self._sizes = [entry.size for entry in entries]
        rows = [
            [(*box.corners, classes[box.kind], box.ignored) for box in boxes if box.kind in classes]
            for _, _, boxes in entries
        ]
        # one tensor of all boxes, as worker processes share its memory, but not that of lists
        flat = list(itertools.chain.from_iterable(rows))
        self._rows = torch.tensor(flat, dtype=torch.float32).reshape(-1, 6)
        self._ends = torch.tensor([0, *itertools.accumulate(map(len, rows))])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Tensor]]:
        image, place = self._images[index]
        self._refuse_other_size(image, place)
        first, end = self._ends[place : place + 2].tolist()
        rows = self._rows[first:end]
        corners = rows[:, :4].clamp(min=0).minimum(torch.tensor([*image.size, *image.size]))
        has_area = (corners[:, 2:] > corners[:, :2]).all(1)
        labels, ignored = rows[has_area, 4:].unbind(1)
        return image, {"boxes": corners[has_area], "labels": labels.long(), "ignored": ignored > 0}

    def _refuse_other_size(self, image: Any, place: int) -> None:
        """Check that boxes belong to the pixels that are stored, not to a turned or scaled copy."""
        if self._sizes[place] in (UNKNOWN, image.size):
            return
        told, own = ("{} x {}".format(*size) for size in (self._sizes[place], image.size))
        turned = self._sizes[place] == image.size[::-1] and image.getexif().get(ORIENTATION)
        raise kdkit.DataError(
            f"{self.paths[place]}: is {own} pixels, and {told} where its boxes are listed"
            + (
                "; its EXIF orientation says how to turn it: write its pixels upright"
                " (`PIL.ImageOps.exif_transpose`)"
                if turned
                else ""
            )
        )


class BoxSetOptions(kdkit.DatasetOptions):
    """Which boxes are used."""

    classes: tuple[str, ...] = Field(
        default=(),
        description="Names of the classes, in the order of a network's outputs (default: all).",
    )

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: two classes have one name")
        return self


class BoxSet(kdkit.DatasetSource):
    """What the datasets of boxes have in common, once their files are read."""

    task = "detection"
    options: BoxSetOptions

    @property
    @abc.abstractmethod
    def files(self) -> Sequence[Path]:
        """The files that list images and boxes."""

    @abc.abstractmethod
    def entries(self, part: Literal["train", "test"]) -> list[ImageEntry]:
        """Read the images of a part, at least one, with their boxes; called once.

        Raises:
            DataError: files are missing or wrong.
        """

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes: as the recipe says, or those of the training boxes, sorted."""
        trained = {box.kind for entry in self._entries["train"] for box in entry.boxes}
        return self.options.classes or tuple(sorted(trained))

    def info(self) -> kdkit.DataInfo:
        train, test = (len(self._parts[part]) for part in PARTS)
        return kdkit.DataInfo(
            (3, *self._height_and_width()), len(self.classes), train, test, self.classes
        )

    def own_files(self) -> Sequence[Path]:
        """The files that list boxes, and the images that they name."""
        try:
            images = [Path(entry.path) for part in PARTS for entry in self._entries[part]]
        except kdkit.DataError:  # told when the data are opened
            images = []
        return [*(file for file in self.files if file.is_file()), *images]

    def notes(self) -> Sequence[str]:
        """How many boxes are left out, clipped or listed twice, and which images and classes have
        none.
        """
        told = [note for part in PARTS for note in self._notes(part)]
        seen = {box.kind for entry in self._entries["train"] for box in entry.boxes}
        if unseen := [name for name in self.classes if name not in seen]:
            told.append(f"classes without a training box: {listed(unseen)}")
        return told

    def split(self, part: Literal["train", "test"]) -> Boxed:
        # not in `info`: a dataset of unlabelled images is asked for its training part alone
        if part == "test":
            self._refuse_nothing_to_find()
        return self._parts[part]

    @cached_property
    def _entries(self) -> dict[str, list[ImageEntry]]:
        return {part: self.entries(part) for part in PARTS}

    @cached_property
    def _parts(self) -> dict[str, Boxed]:
        known = {name: index for index, name in enumerate(self.classes)}
        if not self.options.classes:
            self._refuse_unknown(known)
        return {part: Boxed(entries, known) for part, entries in self._entries.items()}

    def _refuse_unknown(self, known: Mapping[str, int]) -> None:
        for entry in self._entries["test"]:
            for box in entry.boxes:
                if box.kind not in known:
                    raise kdkit.DataError(
                        f"{box.at}: no training box has class {box.kind!r}; they have:"
                        f" {listed(self.classes)}"
                    )

    def _refuse_nothing_to_find(self) -> None:
        entries, known = self._entries["test"], frozenset(self.classes)
        for entry in entries:
            boxes = [box for box in entry.boxes if not box.ignored]
            # `all` ends at the first that counts, so that few sizes are read from image files
            if not all(_fault(box, _size(entry), known) in LEFT_OUT for box in boxes):
                return
        raise kdkit.DataError(
            f"dataset '{self.name}': `test`: none of its {len(entries):,} images has a box that"
            " counts, so that nothing could be measured"
        )

    def _height_and_width(self) -> tuple[int, int]:
        """Height and width of all images; 0, 0 if they differ."""
        sizes = {entry.size for part in PARTS for entry in self._entries[part]}
        if len(sizes - {UNKNOWN}) > 1:
            return 0, 0
        if UNKNOWN not in sizes:
            ((width, height),) = sizes
            return height, width
        # if others differ, they are refused as they are read
        return size_of(Path(self._entries["train"][0].path))

    def _notes(self, part: Literal["train", "test"]) -> list[str]:
        kinds = (NO_AREA, OUTSIDE, BEYOND, OTHER, TWICE)
        faulty: dict[str, list[BoxEntry]] = {kind: [] for kind in kinds}
        empty: list[str] = []
        known = frozenset(self.classes)
        for entry in self._entries[part]:
            size = _size(entry)
            faults = [_fault(box, size, known) for box in entry.boxes]
            seen: set[tuple[tuple[float, ...], str]] = set()
            for box, fault in zip(entry.boxes, faults, strict=True):
                if fault is not None:
                    faulty[fault].append(box)
                elif (box.corners, box.kind) in seen:
                    faulty[TWICE].append(box)
                seen.add((box.corners, box.kind))
            if all(fault in LEFT_OUT for fault in faults):
                empty.append(entry.path)
        told = [
            f"{PARTS[part]} boxes {fault}: {len(boxes):,} (first: {boxes[0].at})"
            for fault, boxes in faulty.items()
            if boxes
        ]
        if empty:
            count = f"{len(empty):,} of {len(self._entries[part]):,}"
            told.append(f"{PARTS[part]} images without a box: {count} (first: {empty[0]})")
        return told


def _size(entry: ImageEntry) -> tuple[int, int]:
    """Return width and height of an image, from its header if no file tells them."""
    if entry.size != UNKNOWN:
        return entry.size
    height, width = size_of(Path(entry.path))
    return width, height


def _fault(box: BoxEntry, size: tuple[int, int], known: Collection[str]) -> str | None:
    """Say what is wrong with a box in an image of that width and height, if anything is."""
    x0, y0, x1, y1 = box.corners
    if box.kind not in known:
        return OTHER
    if x0 >= x1 or y0 >= y1:
        return NO_AREA
    if max(x0, 0) >= min(x1, size[0]) or max(y0, 0) >= min(y1, size[1]):
        return OUTSIDE
    # by up to a pixel, tools only round
    is_beyond = min(x0, y0) < -1 or x1 > size[0] + 1 or y1 > size[1] + 1
    return BEYOND if is_beyond else None


def listed(names: Sequence[str]) -> str:
    """Join the names of classes for a message, the first of many."""
    more = f", ... ({len(names)} in all)" if len(names) > MOST_NAMES else ""
    return f"{', '.join(names[:MOST_NAMES])}{more}" or "none"
