"""Images with boxes that a table lists, one row a box."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

import kdkit

from ._boxes import UNKNOWN, BoxEntry, BoxSet, BoxSetOptions, ImageEntry
from ._files import refuse_missing
from ._table import Table, as_number, parts


class BoxTableOptions(BoxSetOptions):
    """Which tables, and which of their columns."""

    train: kdkit.RecipePath = Field(
        description=(
            "Table of the training boxes, .csv (UTF-8, commas) or .parquet (extra `parquet`);"
            " without `test`, of all boxes, with a column `split` that says `train` or `test`."
        )
    )
    test: kdkit.RecipePath | None = Field(default=None, description="Table of the test boxes.")
    images: kdkit.RecipePath | None = Field(
        default=None, description="Folder that paths begin at (default: each table's own folder)."
    )
    path: str = Field(default="path", description="Column of the paths of image files.")
    corners: tuple[str, str, str, str] = Field(
        default=("x0", "y0", "x1", "y1"),
        description="Columns of left, top, right and bottom edge, in pixels from 0.",
    )
    class_: str = Field(default="class", alias="class", description="Column of the class.")
    ignored: str | None = Field(
        default=None, description="Column that has 1 where a box does not count, else 0 or nothing."
    )


class BoxTable(BoxSet):
    """Your own images with boxes, listed by a table: a row is an image file, the edges of a box in
    pixels, and its class. An image without a box has one row with nothing in these columns. Images
    of many sizes need `data.image_size`.

    Classes are those of the training boxes, in the order of their letters, or `classes`. Boxes
    belong to the pixels as they are stored: an EXIF orientation is not applied.
    """

    name = "box_table"
    Options = BoxTableOptions
    options: BoxTableOptions

    @property
    def files(self) -> Sequence[Path]:
        return [path for path in (self.options.train, self.options.test) if path is not None]

    def entries(self, part: Literal["train", "test"]) -> list[ImageEntry]:
        o, table = self.options, self._tables[part]
        folder = o.images or table.path.parent
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(table.filled(o.path)):
            rows.setdefault(os.path.join(folder, str(name)), []).append(row)
        paths, first = [*rows], [of_image[0] for of_image in rows.values()]
        refuse_missing(table.path, paths, lambda place: table.at(first[place]))
        found = []
        for path, of_image in rows.items():
            boxes = [self._box(table, row) for row in of_image]
            found.append(ImageEntry(path, UNKNOWN, [box for box in boxes if box is not None]))
        return found

    @cached_property
    def _tables(self) -> dict[str, Table]:
        o = self.options
        wanted = {name: "which `corners` names" for name in o.corners}
        wanted |= {o.path: "which `path` names", o.class_: "which `class` names"}
        if o.ignored is not None:
            wanted[o.ignored] = "which `ignored` names"
        found = parts(o.train, o.test, wanted)
        if o.test is None:
            self._refuse_shared(found["train"], found["test"])
        return found

    def _refuse_shared(self, train: Table, test: Table) -> None:
        """Refuse an image some of whose boxes are for training and others for the test."""
        lines = {name: row for row, name in enumerate(train.filled(self.options.path))}
        for row, name in enumerate(test.filled(self.options.path)):
            if name in lines:
                raise test.refuse(row, f"{name!r} is of both splits, see {train.at(lines[name])}")

    def _box(self, table: Table, row: int) -> BoxEntry | None:
        """Return the box of a row; None if the row says that its image has none."""
        o = self.options
        cells = {name: table.columns[name][row] for name in (*o.corners, o.class_)}
        empty = [name for name, cell in cells.items() if cell is None]
        if len(empty) == len(cells):
            return None
        if empty:
            raise table.refuse(
                row, f"column '{empty[0]}' is empty; a row without a box has nothing in any"
            )
        x0, y0, x1, y1 = (self._edge(table, row, name) for name in o.corners)
        at = f"{table.path}: {table.at(row)}"
        return BoxEntry((x0, y0, x1, y1), str(cells[o.class_]), self._is_ignored(table, row), at)

    def _edge(self, table: Table, row: int, column: str) -> float:
        cell = table.columns[column][row]
        value = as_number(cell)
        if value is None:
            raise table.refuse(row, f"column '{column}': {str(cell)[:50]!r} is no finite number")
        return value

    def _is_ignored(self, table: Table, row: int) -> bool:
        column = self.options.ignored
        cell: Any = None if column is None else table.columns[column][row]
        value = 0 if cell is None else as_number(cell)
        if value not in (0, 1):
            raise table.refuse(row, f"column '{column}': {str(cell)[:50]!r} is neither 0 nor 1")
        return bool(value)


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [BoxTable]
