"""Images of your own that a table lists, with a class, labels or numbers for each."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

import kdkit

from ._files import Files, refuse_missing
from ._table import Table, as_number, parts

SEPARATORS = ",;|/ "  # what may stand between the names in a cell, for a hint


class ImageTableOptions(kdkit.DatasetOptions):
    """Which tables, and which of their columns."""

    train: kdkit.RecipePath = Field(
        description=(
            "Table of the training images, .csv (UTF-8, commas) or .parquet (extra `parquet`);"
            " without `test`, of all images, with a column `split` that says `train` or `test`."
        )
    )
    test: kdkit.RecipePath | None = Field(default=None, description="Table of the test images.")
    images: kdkit.RecipePath | None = Field(
        default=None, description="Folder that paths begin at (default: each table's own folder)."
    )
    path: str = Field(default="path", description="Column of the paths of image files.")
    class_: str | None = Field(
        default=None,
        alias="class",
        description="Column of the class: classification.",
    )
    labels: str | tuple[str, ...] | None = Field(
        default=None,
        description=(
            "Several labels an image: one column of their names (in Parquet also lists of names),"
            " or a list of columns of numbers in [0, 1], one for each label: multilabel."
        ),
    )
    separator: str = Field(
        default=";", min_length=1, description="Separates the names in a column of labels."
    )
    numbers: tuple[str, ...] | None = Field(
        default=None, description="Columns of numbers: regression."
    )

    @model_validator(mode="after")
    def _one_kind_of_target(self) -> Self:
        given = self._given
        if len(given) != 1:
            raise ValueError(
                f"give one of class, labels and numbers; given: {', '.join(given) or 'none'}"
            )
        if not self.targets:
            raise ValueError(f"{given[0]}: name at least one column")
        if twice := [name for name in self.targets if self.targets.count(name) > 1]:
            raise ValueError(f"{given[0]}: column '{twice[0]}' is named twice")
        return self

    @property
    def _given(self) -> list[str]:
        kinds = {"class": self.class_, "labels": self.labels, "numbers": self.numbers}
        return [name for name, value in kinds.items() if value is not None]

    @property
    def kind(self) -> str:
        """The option that names the columns of the targets."""
        return self._given[0]

    @property
    def targets(self) -> tuple[str, ...]:
        """Columns of the targets."""
        found = self.class_ or self.labels or self.numbers or ()
        return (found,) if isinstance(found, str) else found


class ImageTable(kdkit.DatasetSource):
    """Your own images, listed by a table: a row is an image file with its class (classification),
    its labels (multilabel) or numbers (regression). Needs `data.image_size`.

    Classes, and labels that are names in one column, are those of the training table, in the order
    of their letters. An empty cell is refused; in a column of labels it says that there are none.
    Pixels are read as they are stored: an EXIF orientation is not applied, and numbers that are
    coordinates belong to the stored pixels.
    """

    name = "image_table"
    Options = ImageTableOptions
    options: ImageTableOptions

    @classmethod
    def for_task(cls, options: Any) -> str:
        if options.class_ is not None:
            return "classification"
        return "multilabel" if options.labels is not None else "regression"

    def info(self) -> kdkit.DataInfo:
        train, test = (len(self._parts[part]) for part in ("train", "test"))
        # 0: of any size; `data.image_size` says to which they are brought
        return kdkit.DataInfo((3, 0, 0), len(self._names), train, test, self._names)

    def own_files(self) -> Sequence[Path]:
        """The tables and the image files that they list."""
        tables = [path for path in (self.options.train, self.options.test) if path is not None]
        try:
            images = [Path(path) for part in self._parts.values() for path in part.paths]
        except kdkit.DataError:  # told when the data are opened
            images = []
        return [*(path for path in tables if path.is_file()), *images]

    def split(self, part: Literal["train", "test"]) -> Files:
        return self._parts[part]

    @cached_property
    def _tables(self) -> dict[str, Table]:
        o = self.options
        wanted = {name: f"which `{o.kind}` names" for name in o.targets}
        wanted[o.path] = "which `path` names"
        return parts(o.train, o.test, wanted)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """Names of the classes, labels or numbers."""
        o, train = self.options, self._tables["train"]
        if o.class_ is not None:
            return tuple(sorted(set(map(str, train.filled(o.class_)))))
        if not isinstance(o.labels, str):
            return o.targets
        found = sorted({name for cell in train.columns[o.labels] for name in self._listed(cell)})
        if not found:
            raise kdkit.DataError(f"{train.path}: column '{o.labels}' names no label")
        return tuple(found)

    @cached_property
    def _parts(self) -> dict[str, Files]:
        tables = self._tables
        return {
            part: Files(self._paths(table), self._targets(table)) for part, table in tables.items()
        }

    def _paths(self, table: Table) -> list[str]:
        folder = self.options.images or table.path.parent
        names = table.filled(self.options.path)
        found = [os.path.join(folder, str(name)) for name in names]
        refuse_missing(table.path, found, table.at)
        return found

    def _targets(self, table: Table) -> Any:
        o = self.options
        if o.class_ is not None:
            return self._classes(table, o.class_)
        if isinstance(o.labels, str):
            return self._named_labels(table, o.labels)
        return self._numbers(table, shares=o.labels is not None)

    def _classes(self, table: Table, column: str) -> list[int]:
        number = {name: i for i, name in enumerate(self._names)}
        found = []
        for row, name in enumerate(map(str, table.filled(column))):
            if name not in number:
                raise table.refuse(row, self._unknown("class", name))
            found.append(number[name])
        return found

    def _named_labels(self, table: Table, column: str) -> Tensor:
        """Labels that a row names, as 0 and 1, (N, K) uint8."""
        number = {name: i for i, name in enumerate(self._names)}
        places: list[tuple[int, int]] = []
        for row, cell in enumerate(table.columns[column]):
            for name in self._listed(cell):
                if name not in number:
                    raise table.refuse(row, self._unknown("label", name))
                places.append((row, number[name]))
        found = torch.zeros(len(table), len(number), dtype=torch.uint8)
        # reshaped: a table may name no label at all
        found[tuple(torch.tensor(places, dtype=torch.int64).reshape(-1, 2).T)] = 1
        return found

    def _listed(self, cell: Any) -> Collection[str]:
        """Names in a cell of labels."""
        parts = cell if isinstance(cell, list) else str(cell or "").split(self.options.separator)
        return [name for part in parts if (name := str(part).strip())]

    def _unknown(self, what: str, name: str) -> str:
        more = ", ..." if len(self._names) > 20 else ""
        return (
            f"{what} {name[:50]!r} is not in the training table, which has:"
            f" {', '.join(self._names[:20])}{more}{self._separated(name)}"
        )

    def _separated(self, name: str) -> str:
        """Return a hint if a name is several known ones; empty if not."""
        o = self.options
        for sign in SEPARATORS:
            parts = [part.strip() for part in name.split(sign)]
            if len(parts) > 1 and set(parts) <= set(self._names):
                option = f"labels: {o.class_}, " if o.class_ is not None else ""
                return f"; for several labels in a cell: {option}separator: '{sign}'"
        return ""

    def _numbers(self, table: Table, shares: bool) -> Tensor:
        """Values of the columns, (N, K) float32; `shares`: each in [0, 1]."""
        columns = []
        for name in self.options.targets:
            values = []
            for row, cell in enumerate(table.filled(name)):
                value = as_number(cell)
                if value is None or (shares and not 0 <= value <= 1):
                    wanted = "no number from 0 to 1" if shares else "no finite number"
                    raise table.refuse(row, f"column '{name}': {str(cell)[:50]!r} is {wanted}")
                values.append(value)
            columns.append(torch.tensor(values, dtype=torch.float32))
        return torch.stack(columns, 1)


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [ImageTable]
