"""Images of your own: a folder for each part, and in it a folder for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

import kdkit

from ._archive import SCHEMES, fetch
from ._files import Files
from ._share import Share, drawn


class ImageFolderOptions(kdkit.DatasetOptions):
    """Where the images are."""

    root: kdkit.RecipePath = Field(description="Folder that holds the parts' folders.")
    train: str = Field(
        default="train", description="Training folder inside `root`; `.` is `root` itself."
    )
    test: str | Share | None = Field(
        default=None,
        description=(
            "Test folder inside `root` (default: `test`, or else `val`); or, such as 0.2, the share"
            " of each class in `train` that are test images instead, drawn by their file names."
        ),
    )
    url: str | None = Field(
        default=None,
        description=(
            "Address (https or http) of a zip archive whose only top folder, or content, is `root`."
        ),
        json_schema_extra=kdkit.BOOKKEEPING,
    )
    sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-fA-F]{64}$",
        description="Of the archive at `url`; another one is refused.",
        json_schema_extra=kdkit.BOOKKEEPING,
    )
    max_gb: float = Field(
        default=20.0,
        gt=0,
        description="Largest size of the archive, and of the images in it, in 10^9 bytes.",
        json_schema_extra=kdkit.BOOKKEEPING,
    )
    download: bool = Field(
        default=False,
        description=(
            "Fetch the archive at `url` before training, if `root` is not there; only its images"
            " are unpacked."
        ),
        json_schema_extra=kdkit.BOOKKEEPING,
    )

    @model_validator(mode="after")
    def _something_to_fetch(self) -> Self:
        if self.download and self.url is None:
            raise ValueError("`download: true` needs the `url` of a zip archive")
        if self.url is not None and not self.url.startswith(SCHEMES):
            raise ValueError(f"url: '{self.url}' begins with none of {', '.join(SCHEMES)}")
        return self


class ImageFolder(kdkit.DatasetSource):
    """Your own images, in folders: train/CLASS/*.jpg and test/CLASS/*.jpg (or val/), or CLASS/*.jpg
    alone (`train: .`, `test: 0.2`). Needs `data.image_size`.

    Images that lie in train/ itself, without class folders, have no labels; the classes are then
    the test part's folders. Test images may have none either, for a task that measures without.
    Pixels are read as they are stored: an EXIF orientation is not applied.
    """

    name = "image_folder"
    split_at_check = False
    Options = ImageFolderOptions
    options: ImageFolderOptions

    def lacks(self) -> kdkit.Lacking | None:
        """The archive, where there is no folder yet."""
        o = self.options
        return (
            kdkit.Lacking(o.url, o.root) if o.download and o.url and not o.root.exists() else None
        )

    def fetch(self) -> None:
        """The images of the archive."""
        from torchvision.datasets.folder import IMG_EXTENSIONS

        o = self.options
        assert o.url is not None
        fetch(o.url, o.root, IMG_EXTENSIONS, o.max_gb * 1e9, o.sha256)

    def info(self) -> kdkit.DataInfo:
        train, test = self._parts["train"], self._parts["test"]
        names = tuple(self._classes)
        # 0: of any size; `data.image_size` says to which they are brought
        return kdkit.DataInfo(
            (3, 0, 0),
            len(names),
            len(train),
            len(test),
            names,
            labelled=self._has_classes(self.options.train),
            test_labelled=self._has_classes(self._test),
        )

    def own_files(self) -> Sequence[Path]:
        """The folders of both parts."""
        folders = [self.options.root / name for name in (self.options.train, self._test)]
        return [folder for folder in folders if folder.is_dir()]

    def split(self, part: Literal["train", "test"]) -> Files:
        return self._parts[part]

    def _has_classes(self, name: str) -> bool:
        """Whether a part has folders of classes; if not, it has images, or nothing."""
        folder = self._folder(name)
        return not _images_in(folder) or any(path.is_dir() for path in folder.iterdir())

    @cached_property
    def _classes(self) -> dict[str, int]:
        from torchvision.datasets.folder import find_classes

        named = [part for part in (self.options.train, self._test) if self._has_classes(part)]
        if not named:
            return {}
        folder = self._folder(named[0])
        try:
            found: dict[str, int] = find_classes(folder)[1]
        except FileNotFoundError as error:
            raise kdkit.DataError(f"{folder}: has no folders, one for each class, in it") from error
        return found

    @cached_property
    def _parts(self) -> dict[str, Files]:
        train, share = self._files(self.options.train), self.options.test
        if not isinstance(share, float):
            return {"train": train, "test": self._files(self._test)}
        names = [os.path.basename(path) for path in train.paths]
        chosen = drawn(names, share, train.labels)
        places = {"train": {*range(len(train))} - chosen, "test": chosen}
        return {
            part: Files([train.paths[i] for i in there], [train.labels[i] for i in there])
            for part, there in ((part, sorted(found)) for part, found in places.items())
        }

    def _files(self, name: str) -> Files:
        """The images of a part, with their classes if it has any."""
        if self._has_classes(name):
            return self._list(name)
        images = _images_in(self._folder(name))
        return Files([str(path) for path in images], [-1] * len(images))  # -1: no label

    @property
    def _test(self) -> str:
        """Name of the folder in which the test images lie."""
        if isinstance(self.options.test, float):
            return self.options.train
        there = (name for name in ("test", "val") if (self.options.root / name).is_dir())
        return self.options.test or next(there, "test")

    def _folder(self, name: str) -> Path:
        folder = self.options.root / name
        if not folder.is_dir():
            inside = (
                sorted(path.name for path in self.options.root.iterdir() if path.is_dir())
                if self.options.root.is_dir()
                else []
            )
            has = (
                f"{self.options.root} has {', '.join(inside[:10])}"
                if inside
                else f"{self.options.root} is no folder or has none in it"
            )
            hint = (
                f"; `download: true` fetches it from {self.options.url}"
                if self.options.url and not self.options.root.exists()
                else ""
            )
            raise kdkit.DataError(f"{folder}: no such folder; {has}{hint}")
        return folder

    def _list(self, name: str) -> Files:
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        folder = self._folder(name)
        strangers = sorted(
            path.name
            for path in folder.iterdir()
            if path.is_dir() and path.name not in self._classes
        )
        if strangers:
            raise kdkit.DataError(
                f"{folder / strangers[0]}: no such class in"
                f" {self.options.root / self.options.train}"
            )
        # a class may be absent from one part; no image at all is refused below
        found = make_dataset(folder, self._classes, extensions=IMG_EXTENSIONS, allow_empty=True)
        if not found:
            raise kdkit.DataError(
                f"{folder}: has no images in class folders (looked for {', '.join(IMG_EXTENSIONS)})"
            )
        return Files([path for path, _ in found], [label for _, label in found])


def _images_in(folder: Path) -> list[Path]:
    """The image files that lie in a folder itself, in the order of their names."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMG_EXTENSIONS)


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [ImageFolder]
