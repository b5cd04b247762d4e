"""Pieces of the generated pages in Markdown."""

from __future__ import annotations

import re


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A table of these columns, as lines."""

    def row(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [row(columns), row(["---"] * len(columns)), *map(row, rows)]


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def unwrapped(text: str) -> str:
    """A text on one line."""
    return " ".join(text.split())
