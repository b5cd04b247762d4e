"""Elements of a report, independent of the output format: sections of paragraphs, tables, pictures,
listings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# `kind` tells the template of the page how to write a block: Jinja has no isinstance.
@dataclass(frozen=True)
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
        folded: a title, of which alone is shown until it is opened; empty: the table is open.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    marked: int | None = None
    folded: str = ""
    kind: str = "figures"


@dataclass(frozen=True)
class Picture:
    """A drawing.

    Attributes:
        name: of its file, without ending.
        figure: the drawing.
        alt: its content in words.
        wide: whether it takes the full page width (a phone scrolls), not a place among several side
            by side.
        photo: whether it shows photographs: they stay pixels on the page, on white.
    """

    name: str
    figure: Figure = field(repr=False)
    alt: str
    wide: bool = False
    photo: bool = False


@dataclass(frozen=True)
class Pictures:
    """A numbered figure: drawings side by side, as many as fit the page.

    Attributes:
        title: its content, in a few words.
        pictures: the drawings.
        caption: explanation of what they show.
        folded: whether only the title is shown until it is opened.
    """

    title: str
    pictures: Sequence[Picture]
    caption: str = ""
    folded: bool = False
    kind: str = "pictures"


Verdict = Literal["better", "worse", "inconclusive"]


@dataclass(frozen=True)
class Bar:
    """A row of a `Forest`: a difference with its interval.

    Attributes:
        name: of the variant.
        about: description of it.
        mean: of the difference.
        interval: its ends; None without one.
        verdict: whether the difference is one.
        text: the figures.
    """

    name: str
    about: str
    mean: float
    interval: tuple[float, float] | None
    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Against:
    """Differences of all variants to one of them.

    Attributes:
        name: of that variant.
        summary: the verdicts in a sentence.
        bars: the best first.
        ticks: of the axis, its ends first and last.
        better: on which side of 0 a variant is better.
    """

    name: str
    summary: str
    bars: Sequence[Bar]
    ticks: Sequence[float]
    better: Literal["left", "right"]

    def place(self, value: float) -> float:
        """Return the place of a value on the axis in percent, not beyond its ends."""
        low, high = self.ticks[0], self.ticks[-1]
        return 100 * (min(max(value, low), high) - low) / (high - low)


@dataclass(frozen=True)
class Forest:
    """A numbered figure: differences with their intervals, to any of the variants.

    Attributes:
        title: its content, in a few words.
        against: the differences to each variant, those to the baseline first.
        caption: explanation of what it shows.
        pictures: the differences to the baseline, drawn: for output that cannot lay out a forest.
    """

    title: str
    against: Sequence[Against]
    caption: str
    pictures: Sequence[Picture]
    kind: str = "forest"


@dataclass(frozen=True)
class Listing:
    """A preformatted text, such as a recipe; `folded` shows only its title until it is opened."""

    title: str
    text: str
    folded: bool = True
    kind: str = "listing"


Block = Words | Facts | Figures | Pictures | Forest | Listing


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
    def drawn(self) -> Mapping[int, Pictures | Forest]:
        """All figures by their numbers, in order."""
        blocks = (block for part in self.sections for block in part.blocks)
        return dict(enumerate((b for b in blocks if isinstance(b, Pictures | Forest)), 1))

    def number(self, block: Block) -> int:
        """Return the number of a figure."""
        return next(number for number, one in self.drawn.items() if one is block)

    @property
    def pictures(self) -> Iterator[Picture]:
        """All drawings, in order."""
        return (one for figure in self.drawn.values() for one in figure.pictures)
