"""Common style of a report's pictures: size and type, the look of each variant, the file format."""

from __future__ import annotations

import io
import itertools
import re
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kdkit.students.curves import COLORS, DASHES, GRID, INK, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 170
# inches of a picture that stands beside another; at 9 points its text is readable on a phone
WIDTH, HEIGHT = 4.4, 3.0
LETTERS = 24  # maximum length of a name in a picture
COLORS_OF_FILE = 256
FURTHER = COLORS[:-1]  # black is the baseline's
GREY = "#777777"
# The page replaces these colours by variables, which differ between light and dark. Whatever
# stands on a colour that stays, such as a number in a cell, has another one.
VARIABLES = {
    **{color.lower(): f"var(--line{i})" for i, color in enumerate(FURTHER)},
    "#000000": "var(--line)",
    INK: "var(--ink)",
    GREY: "var(--quiet)",
    "#999999": "var(--quiet)",
    GRID: "var(--rule)",
    "#ffffff": "var(--paper)",
}
DARK_CELL, LIGHT_CELL = "#fefefe", "#222222"  # numbers in a cell that is dark, or light


@dataclass(frozen=True)
class Look:
    """The style of a variant in all pictures: distinguished by colour, and in greyscale by dashes
    and marker.
    """

    color: str
    dashes: Any
    marker: str
    width: float

    def line(self) -> dict[str, Any]:
        """Return the arguments for matplotlib's `plot`."""
        return {
            "color": self.color,
            "linestyle": self.dashes,
            "marker": self.marker,
            "linewidth": self.width,
            "markersize": 4.5,
        }


def looks(names: Sequence[str], baseline: str) -> dict[str, Look]:
    """Choose the look of each variant; the baseline's line is black, solid and thicker."""
    others = [name for name in names if name != baseline]
    found = {
        name: Look(
            FURTHER[i % len(FURTHER)],
            DASHES[1 + i % (len(DASHES) - 1)],
            MARKERS[1 + i % (len(MARKERS) - 1)],
            1.7,
        )
        for i, name in enumerate(others)
    }
    return {**found, baseline: Look("#000000", "-", "o", 2.2)}


def labels(names: Sequence[str], letters: int = LETTERS) -> dict[str, str]:
    """Shorten names that are too long for a picture in their middle, keeping them distinct."""
    found: dict[str, str] = {}
    for name in names:
        short = (
            name if len(name) <= letters else f"{name[: letters // 2 - 1]}…{name[-letters // 2 :]}"
        )
        number = 2
        while short in found.values():
            ending = f"…({number})"
            short, number = f"{name[: letters - len(ending)]}{ending}", number + 1
        # Names that are alike in their first and last letters get numbers.
        found[name] = short
    return found


def groups(names: Sequence[str], baseline: str) -> list[list[str]]:
    """Split the names into groups for one panel each, with the baseline in every one: up to five
    in a single panel, of more four in each.
    """
    others = [name for name in names if name != baseline]
    first = [baseline] if baseline in names else []
    size = len(names) if len(names) <= 5 else 3
    count = max(1, -(-len(others) // size))
    # As many in each panel as in the next, not a last panel of one.
    ends = [len(others) * i // count for i in range(count + 1)]
    return [first + others[start:end] for start, end in itertools.pairwise(ends)]


def blank(width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """Make an empty picture, inches wide and high."""
    from matplotlib.figure import Figure

    # Not through pyplot, which would keep every figure and choose a backend with windows.
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def with_margin(names: Iterable[str], height: float = HEIGHT) -> tuple[Figure, Axes]:
    """Make a picture whose axes leave room for these names beside them; with equal names, axes of
    several pictures are equally wide.
    """
    figure = blank(height=height)
    # Constrained layout would give each picture other margins.
    figure.set_layout_engine(None)
    beside = 0.35 + 0.068 * max(map(len, names))  # inches
    figure.subplots_adjust(0.72 / WIDTH, 0.5 / height, 1 - beside / WIDTH, 1 - 0.25 / height)
    return figure, figure.subplots()


def titled(figure: Figure, title: str, width: float = WIDTH) -> None:
    """Write a heading at the left, broken at the edge of the picture."""
    # About 12.5 bold letters of 10 points an inch.
    lines = textwrap.wrap(plain(title), round(12.5 * width))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10, fontweight="bold", color=INK)


def spaced(wanted: Sequence[float], room: float, low: float, high: float) -> list[float]:
    """Find places as near as possible to the wanted ones (ascending), at least `room` apart,
    between low and high if there is space.
    """
    # of neighbours that touch: the lowest place wanted by each, less its offset in the block
    blocks: list[list[float]] = []
    for value in wanted:
        blocks.append([value])
        while len(blocks) > 1 and _bottom(blocks[-1], room) < _bottom(
            blocks[-2], room
        ) + room * len(blocks[-2]):
            later = blocks.pop()
            blocks[-1] += later
    places = [_bottom(block, room) + room * i for block in blocks for i in range(len(block))]
    # From the top down, then from the bottom up: if there is not enough space, names stick out
    # above.
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], high - room * (len(places) - 1 - i))
    for i in range(len(places)):
        places[i] = max(places[i], low + room * i)
    return places


def _bottom(block: Sequence[float], room: float) -> float:
    return statistics.fmean(value - room * i for i, value in enumerate(block))


def name_beside(
    axes: Axes, points: Sequence[tuple[str, float, float, str]], height: float = HEIGHT
) -> None:
    """Write names to the right of the axes, each with a line to its point.

    Args:
        axes: with their final limits.
        points: (name, x, y, colour) of each.
        height: of the picture, inches.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(
        (min(max(float(to_axes.transform((x, y))[1]), 0.0), 1.0), name, x, y, color)
        for name, x, y, color in points
    )
    # 0.16 inches a name; 0.6 inches of the height are the x axis.
    places = spaced([end[0] for end in ends], 0.16 / (height - 0.6), 0.0, 1.0)
    for place, (_, name, x, y, color) in zip(places, ends, strict=True):
        low, high = axes.get_ylim()
        axes.annotate(
            plain(name),
            (x, min(max(y, low), high)),
            (1.06, place),
            textcoords=axes.transAxes,
            va="center",
            fontsize=8.5,
            color=INK,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.8,
                "relpos": (0, 0.5),
                "shrinkB": 3,
            },
        )


def plain(text: str) -> str:
    """Escape a text for matplotlib: a dollar sign begins no formula."""
    # Two dollar signs would begin a formula.
    return text.replace("$", r"\$")


def _lay_out(figure: Figure) -> None:
    """Fix the places of everything, which are then the same in every format."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def png(figure: Figure) -> bytes:
    """Write the PNG file with a palette: lines and flat colours need no more, and a page with many
    pictures stays small.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    _lay_out(figure)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    # `quantize` takes median cut for RGB, but the fast octree for RGBA.
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    small = io.BytesIO()
    image.quantize(COLORS_OF_FILE, dither=Image.Dither.NONE).save(
        small, format="png", optimize=True
    )
    return small.getvalue()


def paper(figure: Figure, name: str, form: str) -> bytes:
    """Write the file for a paper: `pdf`, `svg` or `png`; the same picture gives the same bytes."""
    import matplotlib

    _lay_out(figure)
    made = io.BytesIO()
    dates = {"pdf": "CreationDate", "svg": "Date"}
    fixed = {dates[form]: None} if form in dates else None
    # 42: letters stay letters, which many conferences ask for
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": name}):
        figure.savefig(made, format=form, dpi=300, metadata=fixed)
    return made.getvalue()


def inline(figure: Figure, name: str) -> str:
    """Write the picture as an SVG element for the page, whose colours and fonts are the page's.

    Args:
        figure: the picture.
        name: of the picture, from which identifiers are made: an identifier is unique in a page.
    """
    import matplotlib

    _lay_out(figure)
    made = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(made, format="svg", metadata={"Date": None})
    text = made.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    # Only tags: names and numbers between them stay as they are.
    text = re.sub(r"<[^>]+>", _of_page, text[text.index("<svg") :], flags=re.S)
    return re.sub(r">\s+<", "><", text).strip()


def _of_page(tag: re.Match[str]) -> str:
    short = re.sub(r"<g id=\"[^\"]*\"", "<g", " ".join(tag[0].split()))
    short = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", short)
    short = re.sub(r"font-family: [^;\"]*;? ?", "", short)
    short = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--font)", short)
    return re.sub(r"#[0-9a-f]{6}\b", lambda color: VARIABLES.get(color[0], color[0]), short)
