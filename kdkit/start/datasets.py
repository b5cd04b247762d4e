"""The `data.dataset` section for a folder or a table of a user's own images or texts."""

from __future__ import annotations

import csv
import mimetypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdkit.errors import DataError
from kdkit.start import tasks

Section = dict[str, Any]
TABLES = (".csv", ".parquet")
TEXTS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""What a file of texts is, by its suffix."""
TEXT_COLUMNS, LABEL_COLUMNS = ("text", "sentence"), ("label", "class", "intent")
TEST_SHARE = 0.2
"""Share of the samples that become test samples where no file or folder says which."""
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
        flag = "--texts" if task == tasks.TEXTS else "--images"
        raise DataError(f"{flag}: {images.path}: no such folder or table")
    if task == tasks.TEXTS:
        return _of_texts(images)
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
    root = images.path.expanduser()
    section: Section = {"use": "image_folder", "root": images.written}
    if (root / "train").is_dir():
        parts = any((root / name).is_dir() for name in ("test", "val"))
        return section if parts else {**section, "test": TEST_SHARE}
    if any(_has_images(folder) for folder in root.iterdir()):
        return {**section, "train": ".", "test": TEST_SHARE}
    raise DataError(
        f"--images: {images.path}: has no folder 'train'; needed are train/CLASS/1.jpg and"
        " test/CLASS/2.jpg, or CLASS/1.jpg alone"
    )


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(
        (mimetypes.guess_type(path.name)[0] or "").startswith("image/") for path in folder.iterdir()
    )


def _of_texts(images: Images) -> Section:
    root = images.path.expanduser()
    found = [root]
    if root.is_dir():
        found = sorted(path for pattern in ("*", "*/*") for path in root.glob(pattern))
    found = [path for path in found if path.is_file() and path.suffix.lower() in TEXTS]
    inside = [path.relative_to(root) for path in found]
    train, test = _called("train", inside), _called("test", inside) or _called("val", inside)
    if len(train) == len(test) == 1:
        files = {"train": root / train[0], "test": root / test[0]}
    elif len(found) == 1:
        files = {"train": found[0]}
    else:
        raise DataError(
            f"--texts: {images.path}: needed is a table {', '.join(TEXTS)}, or a folder with one,"
            " or with one that has train and one that has test in its name"
        )
    kinds = {TEXTS[path.suffix.lower()] for path in files.values()}
    if len(kinds) > 1:
        raise DataError(f"--texts: {images.path}: both files must be of one kind")
    columns = _text_columns(images, files["train"])
    return {
        "use": "hf_dataset",
        "dataset": kinds.pop(),
        "files": {part: relative(path, images.beside) for part, path in files.items()},
        **({} if "test" in files else {"test": TEST_SHARE}),
        "text": columns[0] if len(columns) == 2 else columns[:-1],
        "label": columns[-1],
        "max_length": 64,
    }


def _text_columns(images: Images, file: Path) -> list[str]:
    """Return the column of the texts, or two of pairs, and that of the labels."""
    header = _header(replace(images, path=file))
    usual = [
        next((name for name in names if name in header), names[0])
        for names in (TEXT_COLUMNS, LABEL_COLUMNS)
    ]
    columns = [*images.columns] or usual
    absent = [name for name in columns if header and name not in header]
    if absent or not 2 <= len(columns) <= 3:
        raise DataError(
            f"--columns: name the columns of {file} that hold the texts and the labels, such as"
            f" text,label; it has: {', '.join(header) or 'columns that are not read here'}"
        )
    return columns


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
