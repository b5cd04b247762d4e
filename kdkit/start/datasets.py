"""The `data.dataset` section for a folder or a table of a user's own images."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdkit.errors import DataError

Section = dict[str, Any]
TABLES = (".csv", ".parquet")
TEST_SHARE = 0.2
"""Share of the images that become test images where an annotation tool wrote one file."""
MOST_FILES = 200
"""Maximum number of json files that are looked at to find the annotations."""


@dataclass(frozen=True)
class Images:
    """What the user says about the images.

    Attributes:
        path: folder, or table.
        beside: the folder of the recipe, from which its paths begin.
        classes: names of the classes, where no file tells them.
        columns: of a table, those that are asked for.
    """

    path: Path
    beside: Path
    classes: Sequence[str] = ()
    columns: Sequence[str] = ()

    @property
    def written(self) -> str:
        """The path as a recipe in `beside` says it; an absolute one stays so."""
        return relative(self.path, self.beside)

    @property
    def is_table(self) -> bool:
        return self.path.suffix.lower() in TABLES


def relative(path: Path, folder: Path) -> str:
    """Return a path as a recipe in that folder says it: from there, unless it is absolute."""
    path = path.expanduser()
    if path.is_absolute():
        return path.as_posix()
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def section(task: str, images: Images) -> Section:
    """Return the `data.dataset` section of these images.

    Raises:
        DataError: there are none, or none in a layout that the task knows; says which it knows.
    """
    if not images.path.expanduser().exists():
        raise DataError(f"--images: {images.path}: no such folder or table")
    if images.is_table and task != "segmentation":
        return _boxes_of_table(images) if task == "detection" else _of_table(task, images)
    if not images.path.expanduser().is_dir():
        raise DataError(f"--images: {images.path}: is no folder, and no table .csv or .parquet")
    if task not in FOLDERS:
        raise DataError(
            f"--images: {images.path}: {task} needs a table .csv or .parquet with a column 'path',"
            " and those of the targets"
        )
    return FOLDERS[task](images)


def _of_class_folders(images: Images) -> Section:
    train = images.path.expanduser() / "train"
    if not train.is_dir():
        raise DataError(
            f"--images: {images.path}: has no folder 'train'; needed are train/CLASS/1.jpg and"
            " test/CLASS/2.jpg"
        )
    return {"use": "image_folder", "root": images.written}


def _of_masks(images: Images) -> Section:
    if not images.classes:
        raise DataError(
            "--classes: name the classes in the order of the masks' values, such as"
            " background,road,tree"
        )
    return {"use": "mask_folder", "root": images.written, "classes": [*images.classes]}


def _of_annotations(images: Images) -> Section:
    """The section of boxes in COCO json or Pascal VOC, by the files that are there."""
    root = images.path.expanduser()
    if (root / "ImageSets" / "Main").is_dir():
        return {"use": "voc_boxes", "root": images.written, "first_pixel": 0}
    found = [path.relative_to(root) for path in _json_files(root)]
    train = _called("train", found)
    # Roboflow writes three parts, and the test is that of `test`
    test = _called("test", found) or _called("val", found)
    if len(train) == len(test) == 1:
        parts: Section = {"train": train[0].as_posix(), "test": test[0].as_posix()}
    elif len(found) == 1:
        parts = {"train": found[0].as_posix(), "test": TEST_SHARE}
        # CVAT and Label Studio keep images in a folder of their own
        folders = (path for name in ("images/default", "images") if (path := root / name).is_dir())
        if (folder := next(folders, None)) and not (root / found[0]).parent.samefile(folder):
            parts["train_images"] = folder.relative_to(root).as_posix()
    else:
        raise DataError(
            f"--images: {images.path}: has {len(found) or 'no'} json files, of which none is"
            " clearly that of training and test; needed are COCO json (one file, or two with"
            " train and test in their paths), Pascal VOC (ImageSets/Main), or a table of boxes"
        )
    return {"use": "coco_json", "root": images.written, **parts}


def _json_files(root: Path) -> list[Path]:
    """List json files in a folder and in folders up to two levels below."""
    found: list[Path] = []
    for pattern in ("*.json", "*/*.json", "*/*/*.json"):
        for path in root.glob(pattern):
            found.append(path)
            if len(found) == MOST_FILES:
                return sorted(found)
    return sorted(found)


def _called(word: str, paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if word in path.as_posix().lower()]


def _of_table(task: str, images: Images) -> Section:
    key = {"classification": "class", "multilabel": "labels", "regression": "numbers"}[task]
    columns = [*images.columns]
    if not columns and task == "classification":
        columns = [name for name in _header(images) if name in ("class", "label")][:1]
    if not columns:
        raise DataError(
            f"--columns: name the columns of {images.path} that hold the {key}; it has:"
            f" {', '.join(_header(images)) or 'columns that are not read here'}"
        )
    given = columns if key == "numbers" or len(columns) > 1 else columns[0]
    return {"use": "image_table", "train": images.written, key: given}


def _boxes_of_table(images: Images) -> Section:
    return {"use": "box_table", "train": images.written}


def _header(images: Images) -> list[str]:
    """Read the names of a CSV table's columns; none of other tables."""
    if images.path.suffix.lower() != ".csv":
        return []
    try:
        with images.path.expanduser().open(encoding="utf-8-sig", newline="") as stream:
            return [name.strip() for name in next(csv.reader(stream), [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--images: {images.path}: is no CSV table in UTF-8 ({error})") from None


FOLDERS: dict[str, Callable[[Images], Section]] = {
    "classification": _of_class_folders,
    "segmentation": _of_masks,
    "detection": _of_annotations,
}
"""Tasks whose images may be a folder, and how its section is made."""
