"""What a report is made of, whatever it is written as: sections of paragraphs, tables, pictures,
listings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str
    kind: str = "words"


@dataclass(frozen=True)
class Facts:
    """Pairs of a title and what it says."""

    pairs: Sequence[tuple[str, str]]
    kind: str = "facts"


@dataclass(frozen=True)
class Figures:
    """A table of numbers: the first column is what they are of.

    Attributes:
        header: of each column.
        rows: as many cells each.
        caption: what the figures are.
        marked: the row to look at, if any.
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
        alt: what it shows, in words.
        caption: below it.
        wide: as wide as the page (a phone scrolls), not one of several side by side.
    """

    name: str
    png: bytes = field(repr=False)
    alt: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Pictures:
    """Drawings side by side, as many as the page is wide."""

    pictures: Sequence[Picture]
    kind: str = "pictures"


@dataclass(frozen=True)
class Listing:
    """A text to be kept as it is, such as a recipe; `folded` shows its title only, until it is
    asked for.
    """

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
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        title: of the study.
        question: what it asks; may be empty.
        answer: the finding, in a few sentences.
        sections: the rest.
    """

    title: str
    question: str
    answer: Sequence[str]
    sections: Sequence[Section]

    @property
    def pictures(self) -> list[Picture]:
        """All of them, in order."""
        return [
            one
            for part in self.sections
            for block in part.blocks
            if isinstance(block, Pictures)
            for one in block.pictures
        ]
