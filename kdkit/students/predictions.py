"""Predicts with a student what its task asks of image files."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.inputs import is_text
from kdkit.contracts.task import Example, Task
from kdkit.data.images import Finish, ReadImages
from kdkit.data.sizes import measured_batch_size
from kdkit.data.together import Together, placed, unfitted, unfitted_boxes
from kdkit.data.transforms import for_measuring
from kdkit.errors import DataError, RunError
from kdkit.models.tapped import TappedModel
from kdkit.recipe import registry
from kdkit.recipe.data_section import DatasetEntry, DataSpec
from kdkit.recipe.explain import validated
from kdkit.students.loaded import EXPORTED, LoadedRun, exported_about, load_student

ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = 1  # its value for an image that is stored as it is shown


@dataclass(frozen=True)
class ImageFile:
    """An image file, and its name in tables: relative to the folder that it was found in."""

    path: Path
    name: Path


@dataclass(frozen=True)
class Prediction:
    """What a student answers to an image.

    Attributes:
        file: the image.
        values: by column: numbers, texts, a picture (H, W), or lists of equal length, an entry for
            each of several objects.
        example: the image as the network sees it, with the answer, for a picture.
        is_turned: whether the file has an EXIF orientation, which is not applied.
    """

    file: ImageFile
    values: Mapping[str, Any]
    example: Example
    is_turned: bool = False


@dataclass(frozen=True)
class Predictor:
    """A student, and how its images are prepared: as the test images of its run were.

    Attributes:
        student: answers batches.
        task: says what an answer means.
        info: of the data that it was trained for.
        data: size of images and batches.
    """

    student: TappedModel
    task: Task
    info: DataInfo
    data: DataSpec

    @classmethod
    def of(
        cls,
        folder: Path,
        *,
        best: bool = False,
        device: torch.device,
        plugins: Sequence[Path] = (),
        threshold: float | None = None,
    ) -> Predictor:
        """Load a finished run, or an exported student.

        Args:
            folder: of the run, or the exported one.
            best: take the epoch that was best on validation.
            device: that answers.
            plugins: Python files of the run that may be run.
            threshold: least score of what is predicted, in place of the task's option.

        Raises:
            RunError: the folder is neither; the run is not finished; the export does not say how
                images are prepared; the task has no least score, or not this one.
            DataError: it is one of texts.
        """
        if not (folder / EXPORTED).is_file():
            run = LoadedRun(folder, plugins=plugins)
            student = run.student(best=best, device=device)
            made = cls(student, run.recipe.task, run.info, run.recipe.spec.data)
        else:
            student = load_student(folder, device=device, plugins=plugins)
            made = cls(student, *_of_export(folder, plugins))
        if is_text(made.info.image_shape):
            raise DataError(f"{folder}: its student reads texts, not images")
        if threshold is None:
            return made
        return replace(made, task=_with_least_score(made.task, threshold))

    def __call__(self, files: Sequence[ImageFile], device: torch.device) -> Iterator[Prediction]:
        """Predict what the task asks of image files.

        Raises:
            DataError: a file cannot be read.
        """
        spec, task = self.data, self.task
        one_size = for_measuring(spec, self.info.image_shape)
        moving = Together(spec, task, self.info, 0, None) if task.moves else None
        everything = torch.arange(len(files))
        images = ReadImages(
            _Unlabelled(files),
            torch.zeros(len(files), dtype=torch.int64),
            everything,
            Finish(None, 0, device),
            moving or one_size,
            spec.workers,
            keep_workers=False,
        )
        plan = torch.split(everything, measured_batch_size(spec, task))
        for batch in images.batches(plan, [None] * len(plan)):
            with torch.no_grad():
                answer = self.student(batch.inputs)
            assert isinstance(batch.inputs, Tensor)
            predicted = task.predicted(answer, self.info)
            rows = zip(batch.index.tolist(), predicted, batch.inputs, answer.logits, strict=True)
            for index, values, image, logits in rows:
                own, is_turned = _size_of(files[index].path)
                answers = {"student": logits.cpu()}
                example = Example(image.cpu(), None, answers, self._frame(own))
                told = self._as_large_as(own, values)
                yield Prediction(files[index], told, example, is_turned)

    def _frame(self, own: tuple[int, int]) -> tuple[int, int, int, int] | None:
        """Return x0, y0, x1, y1 of an image of size `own` (H, W) in the padded one."""
        if not self.task.moves or self.data.size is None:
            return None
        (height, width), (top, left) = placed(own, self.data.size)
        return left, top, left + width, top + height

    def _as_large_as(self, own: tuple[int, int], values: Mapping[str, Any]) -> dict[str, Any]:
        """Bring predicted pictures and boxes to the size (H, W) of the image file; objects whose
        boxes lie in the padding are left out.
        """
        from torchvision.tv_tensors import BoundingBoxes

        size = self.data.size
        told = dict(values)
        for name, value in values.items():
            if isinstance(value, BoundingBoxes):
                told[name] = unfitted_boxes(value, own, size or own).tolist()
            elif isinstance(value, Tensor):
                told[name] = unfitted(value, own, size)
        boxes = [told[name] for name, value in values.items() if isinstance(value, BoundingBoxes)]
        if not boxes:
            return told
        inside = [x0 < x1 and y0 < y1 for x0, y0, x1, y1 in boxes[0]]
        return {
            name: [*itertools.compress(value, inside)] if isinstance(value, list) else value
            for name, value in told.items()
        }


class _Unlabelled:
    """Image files as a part of a dataset, without labels."""

    def __init__(self, files: Sequence[ImageFile]) -> None:
        self.paths = [file.path for file in files]
        # `ReadImages` takes a labelled part; these labels are not read
        self.labels = [None] * len(files)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, None]:
        from PIL import Image

        try:
            with Image.open(self.paths[index]) as image:
                return image.convert(image.mode), None  # decoded before the file is closed
        except Exception as error:  # PIL's readers raise errors of any type on a broken file
            raise DataError(f"{self.paths[index]}: cannot be read as an image: {error}") from error


def find_images(paths: Sequence[Path]) -> list[ImageFile]:
    """List image files, each once: those named, and those below the folders named, in the order of
    their paths. Files of several folders that would have one name are called by their whole paths.

    Raises:
        DataError: a folder has none, or there is no such path.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found: list[ImageFile] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if path.is_file():
            found.append(ImageFile(path, path))
            continue
        inside = (file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        files = [ImageFile(file, file.relative_to(path)) for file in sorted(inside)]
        files = [file for file in files if file.path.is_file()]
        if not files:
            known = ", ".join(IMG_EXTENSIONS)
            raise DataError(f"{path}: no image files in it (looked for {known})")
        found += files
    each: dict[Path, ImageFile] = {}
    for image in found:
        each.setdefault(image.path.resolve(), image)
    return _told_apart([*each.values()])


def _told_apart(images: Sequence[ImageFile]) -> list[ImageFile]:
    times = collections.Counter(image.name for image in images)
    return [
        image if times[image.name] == 1 else replace(image, name=image.path) for image in images
    ]


def _size_of(file: Path) -> tuple[tuple[int, int], bool]:
    """Return the size (H, W) of an image as it is stored, and whether its EXIF data turn it."""
    from PIL import Image

    with Image.open(file) as image:
        return (image.height, image.width), image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT


def _with_least_score(task: Task, value: float) -> Task:
    """Make a task with another least score of what it predicts.

    Raises:
        RunError: it has none, or not this one.
    """
    if task.least_score is None:
        raise RunError(f"--threshold: task '{task.name}' does not choose by a score")
    given = task.options.model_dump(exclude={"use"}) | {task.least_score: value}
    return type(task)(validated(task.Options, given, "--threshold", RunError))


def _of_export(folder: Path, plugins: Sequence[Path]) -> tuple[Task, DataInfo, DataSpec]:
    """Read what an export says about its task and its images."""
    record = folder / EXPORTED
    about = exported_about(folder)
    if (seen := about.get("images")) is None:
        raise RunError(
            f"{record}: does not say how images are prepared, as an older kdkit has written it;"
            " export the run again"
        )
    known = registry.load(tuple(plugins)).tasks
    if seen["task"]["use"] not in known:
        raise RunError(f"{record}: there is no task '{seen['task']['use']}'; name its --plugins")
    task = known[seen["task"]["use"]]
    chosen = {key: value for key, value in seen["task"].items() if key != "use"}
    options = validated(task.Options, chosen, str(record), RunError)
    names = tuple(about["class_names"])
    info = DataInfo(tuple(about["image_shape"]), seen["outputs"], 0, 0, names)
    data = {"dataset": DatasetEntry(use="none"), **seen["data"]}
    return task(options), info, validated(DataSpec, data, str(record), RunError)
