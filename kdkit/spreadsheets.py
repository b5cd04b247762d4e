"""Writes CSV that a spreadsheet program opens without evaluating anything."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

# first characters of cells that spreadsheet programs take for formulas
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def as_csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format as CSV; an apostrophe precedes texts that a spreadsheet would take for formulas."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_plain(cell) for cell in row] for row in (columns, *rows))
    return text.getvalue()


def _plain(cell: object) -> object:
    if isinstance(cell, int | float) or cell is None:
        return cell
    text = str(cell)
    # a text such as -0.5 is a number, not a formula
    safe = f"'{text}" if text.startswith(FORMULA) and not _is_number(text) else text
    return safe.replace("\r", " ")  # otherwise some programs would begin a row there


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
