"""Elements of a report, independent of the output format: sections of paragraphs, tables, pictures,
listings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
# `kind` tells the template of the page how to write a block: Jinja has no isinstance.
class Words:
    """A paragraph."""

    text: str
    kind: str = "words"


@dataclass(frozen=True)
class Facts:
    """Pairs of a title and a description."""

    pairs: Sequence[tuple[str, str]]
    kind: str = "facts"


@dataclass(frozen=True)
class Figures:
    """A table of numbers; the first column names the rows.

    Attributes:
        header: of each column.
        rows: with as many cells as the header.
        caption: explanation of the figures.
        marked: the row to highlight, if any.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    marked: int | None = None
    kind: str = "figures"


@dataclass(frozen=True)
class Picture:
    """A drawing.

    Attributes:
        name: of its file, without ending.
        png: the file.
        alt: its content in words.
        caption: below it.
        wide: whether it takes the full page width (a phone scrolls), not a place among several side
            by side.
    """

    name: str
    png: bytes = field(repr=False)
    alt: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Pictures:
    """Drawings side by side, as many as fit the page."""

    pictures: Sequence[Picture]
    kind: str = "pictures"


@dataclass(frozen=True)
class Listing:
    """A preformatted text, such as a recipe; `folded` shows only its title until it is opened."""

    title: str
    text: str
    folded: bool = True
    kind: str = "listing"


Block = Words | Facts | Figures | Pictures | Listing


@dataclass(frozen=True)
class Section:
    """A headed part of the page."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """Its name in links."""
        # Links must not depend on how a browser escapes blanks and signs.
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        title: of the study.
        question: question of the study; may be empty.
        answer: the finding, in a few sentences.
        sections: all other content.
    """

    title: str
    question: str
    answer: Sequence[str]
    sections: Sequence[Section]

    @property
    def pictures(self) -> list[Picture]:
        """Return all pictures, in order."""
        return [
            one
            for part in self.sections
            for block in part.blocks
            if isinstance(block, Pictures)
            for one in block.pictures
        ]
