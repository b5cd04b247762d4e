"""Common style of a report's pictures: size and type, the look of each variant, the file format."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kdkit.students.curves import COLORS, DASHES, INK, MARKERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 170
# inches of a picture that stands beside another; at 9 points its text is readable on a phone
WIDTH, HEIGHT = 5.2, 3.5
LETTERS = 30  # maximum length of a name in a picture
COLORS_OF_FILE = 256
FURTHER = COLORS[:-1]  # black is the baseline's


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


def groups(names: Sequence[str], baseline: str, size: int = 6) -> list[list[str]]:
    """Split the names into groups of that size for one panel each, with the baseline in every
    one.
    """
    others = [name for name in names if name != baseline]
    first = [baseline] if baseline in names else []
    # As many in each panel as in the next, not a last panel of one.
    count = max(1, -(-len(others) // (size - 1)))
    step = -(-len(others) // count) if others else 1
    return [first + others[i : i + step] for i in range(0, max(1, len(others)), step)]


def blank(width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """Make an empty picture, inches wide and high."""
    from matplotlib.figure import Figure

    # Not through pyplot, which would keep every figure and choose a backend with windows.
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def titled(figure: Figure, title: str, width: float = WIDTH) -> None:
    """Write a heading at the left, broken at the edge of the picture."""
    # About 12.5 bold letters of 10 points an inch.
    lines = textwrap.wrap(plain(title), round(12.5 * width))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10, fontweight="bold", color=INK)


def keyed(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Draw the legend of the lines below the axes; in two columns if the names are short."""
    columns = 1 if max(map(len, names), default=0) > 24 else 2
    figure.legend(
        handles,
        [plain(name) for name in names],
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=3.6,
        columnspacing=1.5,
    )


def plain(text: str) -> str:
    """Escape a text for matplotlib: a dollar sign begins no formula."""
    # Two dollar signs would begin a formula.
    return text.replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """Write the PNG file with a palette: lines and flat colours need no more, and a page with many
    pictures stays small.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    # `quantize` takes median cut for RGB, but the fast octree for RGBA.
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    small = io.BytesIO()
    image.quantize(COLORS_OF_FILE, dither=Image.Dither.NONE).save(
        small, format="png", optimize=True
    )
    return small.getvalue()
