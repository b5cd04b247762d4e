"""A run's learning curves: as numbers, as block characters for a terminal, as a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdkit.contracts.task import ScoreInfo
from kdkit.files import write_atomically
from kdkit.runs.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLOCKS = " ▁▂▃▄▅▆▇█"
# Okabe and Ito's colours, which every kind of eye tells apart, in an order that alternates dark and
# light; dashes and markers tell the lines apart in grey.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
# one more than colours, so that pairs repeat late
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)), (0, (8, 2)))
MARKERS = "os^DvPXph"
INK, GRID = "#333333", "#dddddd"
TALL = 30.0  # losses are drawn on a logarithmic scale from this ratio of largest to smallest on


@dataclass
class Curve:
    """Points (x, y), x in epochs over all stages."""

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        self.x.append(x)
        self.y.append(y)


@dataclass
class Curves:
    """All curves of a run.

    Attributes:
        scores: on "test" and "validation", by name; of further students on "test, student 2"... NaN
            values have no point.
        losses: "loss" (the total) and each term with its weight.
        lr: learning rate of the last step of each epoch.
        stages: the beginning and the name of each stage.
    """

    scores: dict[str, dict[str, Curve]] = field(default_factory=dict)
    losses: dict[str, Curve] = field(default_factory=dict)
    lr: Curve = field(default_factory=Curve)
    stages: list[tuple[float, str]] = field(default_factory=list)
    epochs: int = 0

    def of(self, score: ScoreInfo) -> dict[str, Curve]:
        """Return the curves of a score on each part of the data."""
        return {
            name: values[score.name] for name, values in self.scores.items() if score.name in values
        }


def deciding(scores: Sequence[ScoreInfo]) -> ScoreInfo:
    """Return the first score, which decides; if none is known, a score without values."""
    return scores[0] if scores else ScoreInfo(name="score", title="score")


def read(folder: RunFolder) -> Curves:
    """Read the curves of a run so far."""
    curves = Curves()
    for line in folder.metrics("epoch"):
        # epochs are numbered from 1 in each stage
        if not curves.stages or line["stage"] != curves.stages[-1][1]:
            curves.stages.append((curves.epochs, line["stage"]))
        x = curves.stages[-1][0] + line["epoch"]
        curves.epochs = int(x)
        _take(curves, line, x)
    return curves


def _take(curves: Curves, line: dict[str, Any], x: float) -> None:
    curves.lr.add(x, line["lr"])
    for name, value in line["train"].items():
        if name == "loss" or name.endswith(".weighted"):
            curves.losses.setdefault(name.removesuffix(".weighted"), Curve()).add(x, value)
    measured = [(split, line.get(split, {})) for split in ("test", "validation")]
    peers = enumerate(line.get("peers", ()), 2)
    measured += [(f"test, student {number}", peer["test"]) for number, peer in peers]
    for split, values in measured:
        for name, value in values.items():
            if math.isfinite(value):
                curves.scores.setdefault(split, {}).setdefault(name, Curve()).add(x, value)


def blocks(curve: Curve, epochs: int, width: int) -> str:
    """Draw a curve in one line of text: `epochs` on up to `width` characters.

    Its lowest value is the lowest block, its highest the full one. A character shows the last value
    up to its place; before the first value and after the last one there is nothing.
    """
    columns = min(width, epochs)
    low, span = min(curve.y), max(curve.y) - min(curve.y)
    text = ""
    for column in range(1, columns + 1):
        until, since = column * epochs / columns, (column - 1) * epochs / columns
        # validation may be measured every few epochs only
        known = [y for x, y in zip(curve.x, curve.y, strict=True) if x <= until]
        if not known or since >= curve.x[-1]:
            text += BLOCKS[0]
        else:
            # a constant curve is drawn at half height
            text += BLOCKS[1 + round((known[-1] - low) / span * 7)] if span else BLOCKS[4]
    return text


def draw(
    curves: Curves, title: str, file: Path, score: ScoreInfo, teacher: float | None = None
) -> None:
    """Draw a score, weighted losses and learning rate in the format of the file's suffix.

    Args:
        curves: of at least one epoch.
        title: the title of the picture.
        file: the file to write.
        score: the deciding score.
        teacher: the teacher's score, drawn as a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # not pyplot, which keeps global state and may look for a display
    figure = Figure(figsize=(8, 8.4), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    quality, loss, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.3))
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold", color=INK)
    _lines(quality, curves.of(score), curves, score.number)
    if teacher is not None:
        quality.axhline(
            teacher,
            color="#777777",
            linestyle=(0, (6, 3)),
            linewidth=1.3,
            label=f"teacher, test ({score.number(teacher)})",
            zorder=1,
        )
    _lines(loss, curves.losses, curves, "{:.4g}".format)
    values = [v for curve in curves.losses.values() for v in curve.y]
    # a logarithmic axis has no place for 0 or a negative loss
    if min(values) > 0 and max(values) / min(values) > TALL:
        loss.set_yscale("log")
    rate.plot(
        *broken(curves.lr.x, curves.lr.y, curves.stages),
        color=INK,
        linewidth=1.6,
        marker="." if len(curves.lr.x) < 20 else None,
    )
    for axes, label in (
        (quality, score.heading),
        (loss, "training loss,\nterms weighted"),
        (rate, "learning rate"),
    ):
        _furnish(axes, label, curves)
    for axes in (quality, loss):
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            handlelength=3.2,
        )
    _name_stages(quality, curves)
    rate.set_xlabel("epoch" if len(curves.stages) == 1 else "epoch, over all stages", color=INK)
    picture = io.BytesIO()
    figure.savefig(picture, format=file.suffix.removeprefix(".") or "png")
    write_atomically(file, picture.getvalue())  # replaces a link, instead of writing to its target


def _lines(
    axes: Axes, lines: Mapping[str, Curve], curves: Curves, number: Callable[[float], str]
) -> None:
    for i, (name, curve) in enumerate(lines.items()):
        # a marker at every epoch of a long run would hide the line
        every = max(1, math.ceil(len(curve.x) / 12))
        axes.plot(
            *broken(curve.x, curve.y, curves.stages),
            color=COLORS[i % len(COLORS)],
            linestyle=DASHES[i % len(DASHES)],
            marker=MARKERS[i % len(MARKERS)],
            markevery=every,
            markersize=4.5,
            linewidth=1.8,
            label=f"{name} ({number(curve.y[-1])})",
        )


def broken(
    x: Sequence[float], y: Sequence[float], stages: Sequence[tuple[float, str]]
) -> tuple[list[float], list[float]]:
    """Return the points with a gap before each stage, which does not continue the curve."""
    xs = []
    ys = []
    starts = [start for start, _ in stages[1:]]
    for position, value in zip(x, y, strict=True):
        # matplotlib interrupts a line at NaN
        while starts and position > starts[0]:
            xs.append(starts.pop(0))
            ys.append(math.nan)
        xs.append(position)
        ys.append(value)
    return xs, ys


def _furnish(axes: Axes, label: str, curves: Curves) -> None:
    furnish(axes, label)
    over_epochs(axes, curves.epochs, curves.stages)


def furnish(axes: Axes, label: str) -> None:
    """Draw a plain frame with a grid behind the lines; `label` is the title of the y axis."""
    axes.set_ylabel(label, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(which="both", colors=INK, labelsize=9)


def over_epochs(axes: Axes, epochs: int, stages: Sequence[tuple[float, str]]) -> None:
    """Draw an x axis over all epochs, with a line at the beginning of each stage."""
    from matplotlib.ticker import MaxNLocator

    margin = max(0.3, 0.02 * epochs)
    axes.set_xlim(1 - margin, epochs + margin)
    # by itself, it divides an axis of one epoch into fractions
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for start, _ in stages[1:]:
        axes.axvline(start + 0.5, color="#999999", linewidth=1)


def _name_stages(axes: Axes, curves: Curves) -> None:
    """Write the names of the stages above the topmost panel, where no curve runs."""
    if len(curves.stages) < 2:
        return
    ends = [start for start, _ in curves.stages[1:]] + [curves.epochs]
    for (start, name), end in zip(curves.stages, ends, strict=True):
        middle = (start + 0.5 + min(end + 0.5, curves.epochs)) / 2
        room = max(3, round(90 * (end - start) / curves.epochs))  # characters
        text = name if len(name) <= room else f"{name[: room - 1]}…"
        axes.annotate(
            text,
            (middle, 1.01),
            xycoords=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
            color=INK,
        )
