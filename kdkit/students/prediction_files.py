"""Writes predictions: as a table, as JSON, and as pictures."""

from __future__ import annotations

import collections
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from kdkit import spreadsheets
from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.task import Example, Task
from kdkit.errors import DataError
from kdkit.files import write_atomically
from kdkit.finite import to_json
from kdkit.students.predictions import ImageFile, Prediction


@dataclass(frozen=True)
class Pictures:
    """PNG files below a folder, under their images' names; `photo.jpg.png` and `photo.tif.png`
    where two images are called `photo`.

    Attributes:
        folder: where they go.
        option: the option that says so, for messages.
        images: files that are predicted, which no picture may replace.
    """

    folder: Path
    option: str
    images: Sequence[ImageFile] = ()
    written: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Raises:
        DataError: a picture's file would be one of the images.
        """
        own = {image.path.resolve() for image in self.images}
        for file in map(self.file, (image.name for image in self.images)):
            if file.resolve() in own:
                raise DataError(
                    f"{file}: is one of the images; choose another folder for {self.option}"
                )

    def file(self, name: Path) -> Path:
        """Return the file of an image's picture, by the image's name in the table."""
        place = self._place(name)
        is_shared = self._stems[place.with_suffix("")] > 1
        ending = f"{place.suffix}.png" if is_shared else ".png"
        return self.folder / place.with_suffix(ending)

    def _place(self, name: Path) -> Path:
        """Return a path below the folder: an image that is named by its whole path needs its
        folders only beside another one of its name.
        """
        short = _short(name)
        return short if self._shorts[short] < 2 else _below(name)

    @cached_property
    def _shorts(self) -> Mapping[Path, int]:
        return collections.Counter(_short(image.name) for image in self.images)

    @cached_property
    def _stems(self) -> Mapping[Path, int]:
        return collections.Counter(self._place(image.name).with_suffix("") for image in self.images)

    def write(self, name: Path, content: bytes) -> Path:
        """Write the picture of an image, by its name in the table; return the file.

        Raises:
            DataError: the file is another image's picture.
        """
        file = self.file(name)
        if file in self.written:
            raise DataError(f"{file}: is the picture of another image of that name")
        self.written.add(file)
        write_atomically(file, content)
        return file


def _short(name: Path) -> Path:
    return Path(name.name) if name.is_absolute() else _below(name)


def _below(name: Path) -> Path:
    """Return a path that leads nowhere but down, of an image that is named from elsewhere."""
    parts = [part for part in name.parts if part not in (name.anchor, "..")]
    return Path(*parts)


@dataclass(frozen=True)
class Writer:
    """Turns predictions into rows, and writes their pictures on the way.

    Attributes:
        masks: where masks go, if anywhere.
        pictures: where drawn answers go, if anywhere.
        task: draws them.
        info: of the student's data.
    """

    masks: Pictures | None
    pictures: Pictures | None
    task: Task
    info: DataInfo

    def told(self, predictions: Iterable[Prediction]) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield the name of each image and what is predicted of it, with files for masks.

        Raises:
            DataError: an answer is a mask without a folder to write to, or masks are asked for and
                answers are none.
        """
        for one in predictions:
            has_mask = any(isinstance(value, Tensor) for value in one.values.values())
            if self.masks is not None and not has_mask:
                raise DataError(f"--masks: its answers are no masks, but: {', '.join(one.values)}")
            if self.pictures is not None:
                self.pictures.write(one.file.name, self._drawn(one))
            yield one.file.name, {k: self._plain(one, v) for k, v in one.values.items()}

    def _plain(self, one: Prediction, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if self.masks is None:
            raise DataError("its answers are masks: say where they go by --masks FOLDER")
        return str(self.masks.write(one.file.name, _png_of(value)))

    def _drawn(self, one: Prediction) -> bytes:
        figure = self.task.drawn(one.example, self.info)
        figure = _titled(one.example, one.values) if figure is None else figure
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=120)
        return stream.getvalue()


@dataclass
class Watch:
    """Counts predictions that need a word, as they pass.

    Attributes:
        images: how many have passed.
        without: how many of them have no object.
        turned: files whose EXIF data turn them.
    """

    images: int = 0
    without: int = 0
    turned: list[Path] = field(default_factory=list)

    def watching(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        for one in predictions:
            self.images += 1
            # an empty list in each column
            self.without += any(value == [] for value in one.values.values())
            if one.is_turned:
                self.turned.append(one.file.path)
            yield one

    def notes(self, task: Task) -> Iterator[str]:
        """Say in how many images there is nothing, and which are not read as they are shown."""
        if self.without and task.least_score is not None:
            least = getattr(task.options, task.least_score)
            yield (
                f"{self.without:,} of {self.images:,} images have no object with a score of"
                f" {least:g} or more (task.{task.least_score}; `--threshold` sets another)"
            )
        if self.turned:
            yield (
                f"{len(self.turned):,} of {self.images:,} images have an EXIF orientation, which is"
                f" not applied: answers are of the pixels as they are stored (first:"
                f" {self.turned[0]})"
            )


def as_csv(rows: Iterable[tuple[Path, Mapping[str, Any]]]) -> str:
    """Format a table: a row an image, or a row for each object that was found in it."""
    lines: list[list[Any]] = []
    columns: list[str] = []
    for name, values in rows:
        columns = ["file", *_columns(values)]
        lines += [[name, *map(_cell, each)] for each in _objects(values)]
    return spreadsheets.as_csv(columns, lines)


def as_json(rows: Iterable[tuple[Path, Mapping[str, Any]]]) -> str:
    """Format a list, an entry for each image; objects that were found in it are listed under
    `objects`.
    """
    entries = []
    for name, values in rows:
        several = {key: value for key, value in values.items() if isinstance(value, list)}
        entry = {"file": str(name), **{k: v for k, v in values.items() if k not in several}}
        if several:
            listed = zip(*several.values(), strict=True)
            entry["objects"] = [dict(zip(several, each, strict=True)) for each in listed]
        entries.append(entry)
    return to_json(entries, indent=2) + "\n"


def _columns(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if name == "box" and isinstance(value, list):
            yield from ("x0", "y0", "x1", "y1")
        else:
            yield name


def _objects(values: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yield the cells of each object; of an image that has none to list, those of the image."""
    if not any(isinstance(value, list) for value in values.values()):
        yield [*values.values()]
        return
    for each in zip(*values.values(), strict=True):
        cells: list[Any] = []
        for value in each:
            cells += value if isinstance(value, list) else [value]
        yield cells


def _cell(value: Any) -> Any:
    return f"{value:.4f}" if isinstance(value, float) else value


def _png_of(mask: Tensor) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(mask.cpu().numpy()).save(stream, format="png")
    return stream.getvalue()


def _titled(example: Example, values: Mapping[str, Any]) -> Any:
    """Draw an image with the answer as its title, where the task draws nothing of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 3.4), layout="constrained")
    axes = figure.subplots()
    pixels = example.image[:3].permute(1, 2, 0).clamp(0, 1).numpy()
    axes.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray")
    axes.axis("off")
    told = "\n".join(f"{name} {_cell(value)}" for name, value in [*values.items()][:4])
    axes.set_title(told.replace("$", r"\$"), fontsize=9)
    return figure
