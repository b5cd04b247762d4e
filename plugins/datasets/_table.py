"""Tables in CSV and Parquet files: the columns that are asked for, with the place of each row."""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kdkit

ENDINGS = (".csv", ".parquet")
SPLIT = "split"  # column of a table that holds both parts
LARGEST = torch.finfo(torch.float32).max
MOST_NAMES = 20  # columns that a message lists


@dataclass(frozen=True)
class Table:
    """Rows of a table file.

    Attributes:
        path: the file.
        columns: values of the rows by column; None where a cell is empty. Those of a CSV file are
            text without spaces around it.
        places: of each row, its line in a CSV file, or its number in a Parquet file, from 1.
        place: what `places` count: `line` or `row`.
    """

    path: Path
    columns: Mapping[str, Sequence[Any]]
    places: Sequence[int]
    place: str = "line"

    def __len__(self) -> int:
        return len(self.places)

    def at(self, row: int) -> str:
        """Return where a row is: `line 7`."""
        return f"{self.place} {self.places[row]}"

    def refuse(self, row: int, says: str) -> kdkit.DataError:
        """Return the error of a row: file, line, and what is wrong there."""
        return kdkit.DataError(f"{self.path}: {self.at(row)}: {says}")

    def filled(self, column: str) -> Sequence[Any]:
        """Return the values of a column.

        Raises:
            DataError: a cell is empty.
        """
        values = self.columns[column]
        if None in values:
            raise self.refuse(values.index(None), f"column '{column}' is empty")
        return values

    def taken(self, rows: Sequence[int]) -> Table:
        """Return the table of these rows."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Table(self.path, columns, [self.places[row] for row in rows], self.place)


def parts(train: Path, test: Path | None, wanted: Mapping[str, str]) -> dict[str, Table]:
    """Read the tables `train` and `test`; without `test`, one table whose column `split` says which
    part a row belongs to.

    Raises:
        DataError: see `read`; or a row belongs to neither part, or a part has no row.
    """
    if test is not None:
        return {"train": read(train, wanted), "test": read(test, wanted)}
    purpose = "which says `train` or `test` where there is no table `test`"
    both = read(train, {**wanted, SPLIT: purpose})
    rows: dict[str, list[int]] = {"train": [], "test": []}
    for row, part in enumerate(both.filled(SPLIT)):
        if part not in rows:
            raise both.refuse(row, f"split {part!r}; allowed: train, test")
        rows[part].append(row)
    if empty := [part for part, chosen in rows.items() if not chosen]:
        raise kdkit.DataError(f"{train}: no row has the split '{empty[0]}'")
    return {part: both.taken(chosen) for part, chosen in rows.items()}


def as_number(cell: Any) -> float | None:
    """Return a cell's number; None if it is none that float32 can hold."""
    try:
        # Python takes 1_000 for a thousand, which other programs do not
        value = float("" if "_" in str(cell) else cell)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) and abs(value) <= LARGEST else None


def read(path: Path, wanted: Mapping[str, str]) -> Table:
    """Read columns of a CSV file (UTF-8, commas, first line: the names) or a Parquet file.

    Args:
        path: the file.
        wanted: columns, each with its purpose, for the message that it is missing.

    Raises:
        DataError: the file cannot be read, or has no such column or no row.
    """
    if path.suffix.lower() not in ENDINGS:
        raise kdkit.DataError(f"{path}: is no table; allowed: files that end in .csv or .parquet")
    if not path.is_file():
        raise kdkit.DataError(f"{path}: no such file")
    table = (_read_csv if path.suffix.lower() == ".csv" else _read_parquet)(path, wanted)
    if not len(table):
        raise kdkit.DataError(f"{path}: has no rows")
    return table


def _read_csv(path: Path, wanted: Mapping[str, str]) -> Table:
    try:
        # utf-8-sig: spreadsheet programs write a byte order mark
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return _of_lines(path, _lines(path, stream), wanted)
    except UnicodeDecodeError as error:
        raise kdkit.DataError(f"{path}: is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise kdkit.DataError(f"{path}: cannot be read: {error.strerror}") from error


def _lines(path: Path, stream: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each row that is not blank, with the number of its first line."""
    reader = csv.reader(stream, strict=True)
    begins = 1
    try:
        for cells in reader:
            if cells:
                yield begins, [cell.strip() for cell in cells]
            begins = reader.line_num + 1  # a quoted cell may go over several lines
    except csv.Error as error:
        raise kdkit.DataError(f"{path}: line {begins}: is no CSV: {error}") from error


def _of_lines(
    path: Path, lines: Iterator[tuple[int, list[str]]], wanted: Mapping[str, str]
) -> Table:
    _, names = next(lines, (1, []))
    _refuse_names(path, names, wanted)
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    number = {name: names.index(name) for name in wanted}
    places: list[int] = []
    for line, cells in lines:
        if len(cells) != len(names):
            says = f"line {line}: has {len(cells)} cells, and the first line {len(names)}"
            raise kdkit.DataError(f"{path}: {says}")
        places.append(line)
        for name, column in columns.items():
            column.append(cells[number[name]] or None)
    return Table(path, columns, places)


def _read_parquet(path: Path, wanted: Mapping[str, str]) -> Table:
    try:
        from pyarrow import parquet
    except ImportError:
        raise kdkit.DataError(
            f"{path}: Parquet needs pyarrow: pip install 'kdkit[parquet]'"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        _refuse_names(path, file.schema_arrow.names, wanted)
        found = file.read(columns=list(dict.fromkeys(wanted))).to_pydict()
    except kdkit.DataError:
        raise
    except Exception as error:  # pyarrow raises errors of many types on a damaged file
        raise kdkit.DataError(f"{path}: cannot be read as Parquet: {kdkit.cause(error)}") from error
    columns = {name: [_cell(value) for value in found[name]] for name in wanted}
    return Table(path, columns, range(1, file.metadata.num_rows + 1), place="row")


def _cell(value: Any) -> Any:
    """Return the value without spaces around it; None for an empty text and for NaN, as which
    data frames write a missing value.
    """
    if isinstance(value, str):
        return value.strip() or None
    return None if isinstance(value, float) and math.isnan(value) else value


def _refuse_names(path: Path, names: Sequence[str], wanted: Mapping[str, str]) -> None:
    """Check that columns have different names, and those that are wanted are there.

    Raises:
        DataError: a name comes twice, or is not there.
    """
    # columns without a name, such as the index of a data frame, are not asked for
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise kdkit.DataError(f"{path}: has two columns '{twice[0]}'")
    for name, purpose in wanted.items():
        if len(names) == 1 and ";" in names[0]:  # as spreadsheets write it in some languages
            raise kdkit.DataError(f"{path}: has semicolons between its cells; commas are read")
        if name not in names:
            spelt = {one.lower(): one for one in names}
            close = difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=0.5)
            hint = f"did you mean '{spelt[close[0]]}'? " if close else ""
            more = f", ... ({len(names)} in all)" if len(names) > MOST_NAMES else ""
            there = ", ".join(names[:MOST_NAMES]) or "none"
            says = f"has no column '{name}', {purpose}; {hint}it has: {there}{more}"
            raise kdkit.DataError(f"{path}: {says}")
