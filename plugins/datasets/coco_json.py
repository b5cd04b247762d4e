"""Images with boxes in COCO's format of instances, as annotation tools export it.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, arXiv:1405.0312; the format:
https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

import kdkit

from ._boxes import UNKNOWN, BoxEntry, BoxSet, BoxSetOptions, ImageEntry, listed
from ._files import refuse_missing
from ._share import Share, drawn
from ._table import as_number

ID = int | str  # what an id is


class CocoJsonOptions(BoxSetOptions):
    """Where images and annotations are."""

    root: kdkit.RecipePath = Field(description="Folder that holds the files and folders below.")
    train: str = Field(description="Annotations of the training images, a json file in `root`.")
    test: str | Share = Field(
        description=(
            "Annotations of the test images; or, such as 0.2, the share of the images in `train`"
            " that are test images instead, drawn by their file names."
        )
    )
    train_images: str | None = Field(
        default=None,
        description="Folder in `root` of the training images (default: that of the annotations).",
    )
    test_images: str | None = Field(
        default=None, description="Folder in `root` of the test images (default: likewise)."
    )

    @model_validator(mode="after")
    def _images_of_a_file(self) -> Self:
        if self.test_images is not None and not isinstance(self.test, str):
            raise ValueError("test_images: test images that are drawn are in `train_images`")
        return self


class CocoJson(BoxSet):
    """Your own images with boxes, as CVAT, Label Studio, Roboflow and others export them: COCO json
    with `images`, `annotations` and `categories`. Images of many sizes need `data.image_size`.

    Classes are the categories, in the order of their ids; both files must have the same, or those
    that `classes` names. Crowds (`iscrowd`) do not count. Masks and keypoints are not read. An
    image without annotations is one without objects. Pixels are read as they are stored: an image
    whose size is not the one in the json, such as one that an EXIF orientation turns, is refused.
    """

    name = "coco_json"
    Options = CocoJsonOptions
    options: CocoJsonOptions

    @property
    def files(self) -> Sequence[Path]:
        o = self.options
        return [o.root / name for name in (o.train, o.test) if isinstance(name, str)]

    def entries(self, part: Literal["train", "test"]) -> list[ImageEntry]:
        entries = self._contents["test" if part == "test" and self._has_file else "train"].entries
        if not isinstance(share := self.options.test, str):
            chosen = drawn([os.path.basename(one.path) for one in entries], share)
            entries = [one for i, one in enumerate(entries) if (i in chosen) == (part == "test")]
        if not entries:
            raise kdkit.DataError(f"{self.files[0]}: too few images for a {part} part")
        return entries

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the categories: as the recipe says, or in the order of ids."""
        contents = [*self._contents.values()]
        wanted = self.options.classes or contents[0].categories
        for one in contents:
            there = sorted(one.categories)
            if absent := [name for name in wanted if name not in there]:
                raise kdkit.DataError(
                    f"{one.path}: has no category {absent[0]!r}; it has: {listed(there)}"
                )
            if not self.options.classes and (more := set(there) - set(wanted)):
                raise kdkit.DataError(
                    f"{one.path}: category {min(more)!r} is not in {contents[0].path}, which has:"
                    f" {listed(wanted)}; `classes` chooses some"
                )
        return tuple(wanted)

    @property
    def _has_file(self) -> bool:
        """Whether test images have a file of their own."""
        return isinstance(self.options.test, str)

    @cached_property
    def _contents(self) -> dict[str, _Content]:
        o = self.options
        folders = (o.train_images, o.test_images)
        return {
            part: _read(file, file.parent if folder is None else o.root / folder)
            for part, file, folder in zip(("train", "test"), self.files, folders, strict=False)
        }


@dataclass(frozen=True)
class _Content:
    """What a file lists: names of categories in the order of their ids, and images with boxes."""

    path: Path
    categories: tuple[str, ...]
    entries: list[ImageEntry]


def _read(path: Path, folder: Path) -> _Content:
    """Read a file whose images are in that folder.

    Raises:
        DataError: it cannot be read, or something in it is wrong.
    """
    if not path.is_file():
        raise kdkit.DataError(f"{path}: no such file")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise kdkit.DataError(f"{path}: is no JSON: {error}") from error
    categories = _categories(path, content)
    images = _by_id(path, content, "images")
    if not images:
        raise kdkit.DataError(f"{path}: lists no image")
    boxes = _boxes(path, content, images, categories)
    files = _files(path, folder, images)
    entries = [
        ImageEntry(file, _size(one), boxes[key])
        for file, (key, one) in zip(files, images.items(), strict=True)
    ]
    return _Content(path, tuple(categories.values()), entries)


def _boxes(
    path: Path, content: Any, images: Mapping[Any, Any], categories: Mapping[Any, str]
) -> dict[Any, list[BoxEntry]]:
    """Return the boxes of each image by its id."""
    found: dict[Any, list[BoxEntry]] = {key: [] for key in images}
    for number, one in enumerate(_list(path, content, "annotations")):
        at = f"{path}: annotation {one['id']}" if "id" in one else f"{path}: annotations[{number}]"
        key = one.get("image_id")
        if not isinstance(key, ID) or key not in found:
            raise kdkit.DataError(f"{at}: image_id {key!r} is that of no image")
        found[key].append(_box(one, categories, at))
    return found


def _files(path: Path, folder: Path, images: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    """Return the files of images that exist, each once."""
    keys = [*images]
    files = []
    for key, one in images.items():
        name = one.get("file_name")
        if not isinstance(name, str) or not name:
            raise kdkit.DataError(f"{path}: image {key}: has no file_name")
        # tools on Windows write its separator
        files.append(os.path.join(folder, name.replace("\\", "/")))
    refuse_missing(path, files, lambda place: f"image {keys[place]}")
    seen: dict[str, Any] = {}
    for file, key in zip(files, keys, strict=True):
        # each would hold a part of its boxes
        if file in seen:
            raise kdkit.DataError(f"{path}: images {seen[file]} and {key} are one file, {file!r}")
        seen[file] = key
    return files


def _list(path: Path, content: Any, key: str) -> list[dict[str, Any]]:
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise kdkit.DataError(
            f"{path}: has no list of `{key}`; COCO's format of instances has images, annotations"
            " and categories"
        )
    return found


def _by_id(path: Path, content: Any, key: str) -> dict[Any, dict[str, Any]]:
    """Return the objects of a list by their ids, in the order of the file."""
    found: dict[Any, dict[str, Any]] = {}
    for number, one in enumerate(_list(path, content, key)):
        name = one.get("id")
        if not isinstance(name, ID):
            raise kdkit.DataError(f"{path}: {key}[{number}]: has no id")
        if name in found:
            raise kdkit.DataError(f"{path}: two {key} have the id {name!r}")
        found[name] = one
    return found


def _categories(path: Path, content: Any) -> dict[Any, str]:
    """Return the names of categories by id, in the order of ids."""
    found = _by_id(path, content, "categories")
    names: dict[Any, str] = {}
    # numbers before words, as ids of both kinds have no order
    for key in sorted(found, key=lambda key: (isinstance(key, str), key)):
        name = found[key].get("name")
        if not isinstance(name, str) or name in names.values():
            wrong = "has the name of another one" if isinstance(name, str) else "has no name"
            raise kdkit.DataError(f"{path}: category {key} {wrong}")
        names[key] = name
    return names


def _box(one: Mapping[str, Any], categories: Mapping[Any, str], at: str) -> BoxEntry:
    key = one.get("category_id")
    if not isinstance(key, ID) or key not in categories:
        known = listed([f"{number} {name!r}" for number, name in categories.items()])
        raise kdkit.DataError(
            f"{at}: category_id {key!r} is that of no category; there are {known}"
        )
    given = one.get("bbox")
    numbers = [as_number(value) for value in given] if isinstance(given, list) else []
    x, y, width, height = numbers if len(numbers) == 4 else [None] * 4
    if x is None or y is None or width is None or height is None:
        raise kdkit.DataError(
            f"{at}: bbox {str(given)[:80]} is no list of four numbers: x, y, width, height"
        )
    crowd = as_number(one.get("iscrowd") or 0)
    if crowd is None:
        raise kdkit.DataError(f"{at}: iscrowd is neither 0 nor 1")
    return BoxEntry((x, y, x + width, y + height), categories[key], crowd > 0, at)


def _size(one: Mapping[str, Any]) -> tuple[int, int]:
    """Return width and height if the file tells both."""
    sides = [as_number(one.get(key)) for key in ("width", "height")]
    width, height = (int(side) if side is not None and side >= 1 else 0 for side in sides)
    return (width, height) if width and height else UNKNOWN


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [CocoJson]
