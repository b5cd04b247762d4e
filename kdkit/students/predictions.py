"""Predicts the classes of image files with a run's student."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdkit import spreadsheets
from kdkit.contracts.inputs import is_text
from kdkit.data.images import Finish, ReadImages
from kdkit.data.transforms import for_measuring
from kdkit.errors import DataError
from kdkit.students.loaded import LoadedRun

COLUMNS = ("file", "class", "probability")


@dataclass(frozen=True)
class Prediction:
    """The most likely class of an image, by its name or number, with its probability."""

    file: Path
    label: str
    probability: float


class ImageFiles:
    """Image files as a part of a dataset, without labels."""

    def __init__(self, files: Sequence[Path]) -> None:
        # `ReadImages` takes a labelled part; these labels are not read
        self.files, self.labels = files, [0] * len(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        try:
            with Image.open(self.files[index]) as image:
                return image.convert(image.mode), 0  # decoded before the file is closed
        except Exception as error:  # PIL's readers raise errors of any type on a broken file
            raise DataError(f"{self.files[index]}: cannot be read as an image: {error}") from error


def find_images(path: Path) -> list[Path]:
    """List the image files below a folder, in the order of their paths; a file is itself.

    Raises:
        DataError: there are none.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if path.is_file():
        return [path]
    files = (file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
    images = sorted(file for file in files if file.is_file())
    if not images:
        raise DataError(f"{path}: no image files in it (looked for {', '.join(IMG_EXTENSIONS)})")
    return images


def predict_files(
    run: LoadedRun, files: Sequence[Path], *, best: bool = False, device: torch.device
) -> Iterator[Prediction]:
    """Predict the classes of image files, preprocessed as a run's test images were.

    Args:
        run: a finished run.
        files: images.
        best: the epoch with the best validation accuracy, not the last.
        device: where the network runs.

    Raises:
        DataError: a file cannot be read; the run is one of texts.
        RunError: the run is not finished.
    """
    if is_text(run.info.image_shape):
        raise DataError(f"{run.folder.path}: its student reads texts, not images")
    task = run.recipe.task
    if task.rows_are != "classes" or not task.fits((1, run.info.outputs), run.info, 1):
        raise DataError(f"{run.folder.path}: task '{task.name}' has not one class for an image")
    spec, names = run.recipe.spec, run.info.class_names
    student = run.student(best=best, device=device)
    everything = torch.arange(len(files))
    images = ReadImages(
        ImageFiles(files),
        torch.zeros(len(files), dtype=torch.int64),
        everything,
        Finish(None, spec.seed, device),
        for_measuring(spec.data, run.info.image_shape),
        spec.data.workers,
        keep_workers=False,
    )
    plan = torch.split(everything, spec.data.eval_batch_size)
    for batch in images.batches(plan, [None] * len(plan)):
        with torch.no_grad():
            shares = student(batch.inputs).logits.float().softmax(1)
        largest, numbers = shares.max(1)
        columns = (batch.index.tolist(), largest.tolist(), numbers.tolist())
        for index, share, number in zip(*columns, strict=True):
            yield Prediction(files[index], names[number] if names else str(number), share)


def as_csv(predictions: Sequence[Prediction], root: Path) -> str:
    """Format a CSV table of file (relative to `root`), class and probability."""

    def name(file: Path) -> Path:
        return file.relative_to(root) if file != root and file.is_relative_to(root) else file

    rows = ([name(p.file), p.label, f"{p.probability:.4f}"] for p in predictions)
    return spreadsheets.as_csv(COLUMNS, rows)
