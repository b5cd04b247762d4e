"""A plugin for benchmarks/study.py: the dataset `counted_folder`, which is `image_folder` and
counts the images that are read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from kdkit_plugins.datasets.image_folder import Files, ImageFolder, ImageFolderOptions
from pydantic import Field

import kdkit


class CountedOptions(ImageFolderOptions):
    """Where the images are, and where it is noted that one was read."""

    log: kdkit.RecipePath = Field(
        description=(
            "File that grows by one byte for each training image that is read, by whichever"
            " process."
        )
    )


class CountedFiles(Files):
    """Image files that note when they are read."""

    def __init__(self, files: Files, log: Path) -> None:
        super().__init__(files.paths, files.labels)
        self.log = log

    def __getitem__(self, index: int) -> tuple[Any, int]:
        note = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(note, b".")
        os.close(note)
        return super().__getitem__(index)


class CountedFolder(ImageFolder):
    """Images in folders, counted as they are read for training."""

    name = "counted_folder"
    Options = CountedOptions
    options: CountedOptions

    def split(self, part: Literal["train", "test"]) -> Files:
        files = super().split(part)
        return CountedFiles(files, self.options.log) if part == "train" else files


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [CountedFolder]
