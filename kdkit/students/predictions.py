"""Predicts with a run's student what its task asks of image files."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkit import spreadsheets
from kdkit.contracts.inputs import is_text
from kdkit.contracts.records import Batch
from kdkit.data.images import Finish, ReadImages
from kdkit.data.sizes import measured_batch_size
from kdkit.data.together import Together, unfitted
from kdkit.data.transforms import for_measuring
from kdkit.errors import DataError
from kdkit.files import write_atomically
from kdkit.students.loaded import LoadedRun


@dataclass(frozen=True)
class Prediction:
    """What a student answers to an image, by column: numbers, texts, or a picture (H, W)."""

    file: Path
    values: Mapping[str, Any]


class ImageFiles:
    """Image files as a part of a dataset, without labels."""

    def __init__(self, files: Sequence[Path]) -> None:
        # `ReadImages` takes a labelled part; these labels are not read
        self.paths, self.labels = files, [None] * len(files)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, None]:
        from PIL import Image

        try:
            with Image.open(self.paths[index]) as image:
                return image.convert(image.mode), None  # decoded before the file is closed
        except Exception as error:  # PIL's readers raise errors of any type on a broken file
            raise DataError(f"{self.paths[index]}: cannot be read as an image: {error}") from error


def find_images(path: Path) -> list[Path]:
    """List the image files below a folder, in the order of their paths; a file is itself.

    Raises:
        DataError: there are none, or there is no such path.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
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
    """Predict what a run's task asks of image files, preprocessed as its test images were.

    Args:
        run: a finished run.
        files: images.
        best: the epoch with the best validation score, not the last.
        device: where the network runs.

    Raises:
        DataError: a file cannot be read; the run is one of texts.
        RunError: the run is not finished.
    """
    if is_text(run.info.image_shape):
        raise DataError(f"{run.folder.path}: its student reads texts, not images")
    task, student = run.recipe.task, run.student(best=best, device=device)
    for batch in _batches(run, files, device):
        with torch.no_grad():
            answer = student(batch.inputs)
        pairs = zip(batch.index.tolist(), task.predicted(answer, run.info), strict=True)
        for index, values in pairs:
            yield Prediction(files[index], _as_large_as(files[index], values, run))


def _as_large_as(file: Path, values: Mapping[str, Any], run: LoadedRun) -> dict[str, Any]:
    """Bring predicted pictures to the size of the image file."""
    from PIL import Image

    with Image.open(file) as image:
        size = image.height, image.width
    fitted = run.recipe.spec.data.size
    return {
        name: unfitted(value, size, fitted) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def _batches(run: LoadedRun, files: Sequence[Path], device: torch.device) -> Iterator[Batch]:
    spec, task = run.recipe.spec, run.recipe.task
    info = run.info
    one_size = for_measuring(spec.data, info.image_shape)
    moving = Together(spec.data, task, info, spec.seed, None) if task.moves else None
    everything = torch.arange(len(files))
    images = ReadImages(
        ImageFiles(files),
        torch.zeros(len(files), dtype=torch.int64),
        everything,
        Finish(None, spec.seed, device),
        moving or one_size,
        spec.data.workers,
        keep_workers=False,
    )
    plan = torch.split(everything, measured_batch_size(spec.data, task))
    return images.batches(plan, [None] * len(plan))


@dataclass(frozen=True)
class Masks:
    """Writes masks as PNG files of class indices, below a folder, under their images' names.

    Attributes:
        folder: where they go.
        images: files that are predicted, which no mask may replace.
    """

    folder: Path | None
    images: Sequence[Path] = ()
    written: set[Path] = field(default_factory=set)

    def __call__(self, name: Path, mask: Tensor) -> Path:
        """Write the mask of an image, by its name in the table; return the file.

        Raises:
            DataError: there is no folder to write to, or the file is an image or another mask.
        """
        from PIL import Image

        if self.folder is None:
            raise DataError("its answers are masks: say where they go by --masks FOLDER")
        file = self.folder / (Path(name.name) if name.is_absolute() else name).with_suffix(".png")
        if file.resolve() in {image.resolve() for image in self.images}:
            raise DataError(f"{file}: is one of the images; choose another folder for --masks")
        if file in self.written:
            raise DataError(f"{file}: is the mask of another image of that name")
        self.written.add(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        Image.fromarray(mask.cpu().numpy()).save(stream, format="png")
        write_atomically(file, stream.getvalue())
        return file


def as_csv(predictions: Iterable[Prediction], root: Path, masks: Masks) -> str:
    """Format a CSV table of the files (relative to `root`) and what is predicted of them.

    Raises:
        DataError: masks are to be written, and the answers are none; or as for `Masks`.
    """
    rows: list[list[Any]] = []
    columns: list[str] = []
    for one in predictions:
        if masks.folder is not None and not any(
            isinstance(value, Tensor) for value in one.values.values()
        ):
            raise DataError(f"--masks: its answers are no masks, but: {', '.join(one.values)}")
        is_below = one.file != root and one.file.is_relative_to(root)
        name = one.file.relative_to(root) if is_below else one.file
        columns = ["file", *one.values]
        rows.append([name, *(_cell(name, value, masks) for value in one.values.values())])
    return spreadsheets.as_csv(columns, rows)


def _cell(name: Path, value: Any, masks: Masks) -> Any:
    if isinstance(value, Tensor):
        return masks(name, value)
    return f"{value:.4f}" if isinstance(value, float) else value
