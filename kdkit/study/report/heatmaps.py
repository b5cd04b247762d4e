"""Heat maps and images of a report: classes, confusions, softened answers, similar layers."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdkit.students.curves import COLORS, INK
from kdkit.study.report.document import Picture
from kdkit.study.report.drawing import DARK_CELL, LIGHT_CELL, WIDTH, blank, labels, plain, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ONE_WAY, TWO_WAYS = "Blues", "RdBu"  # both go from light to dark, in grey as well
CELL = 0.42  # inches per class
MOST_PAIRS = 10  # confusions shown for many classes, in each direction
TEMPERATURES = (1, 2, 3, 4, 5)
CLASS_LETTERS = 18  # maximum length of a class's name
BARS = 10  # number of classes in the picture of an answer


def class_accuracy(names: Sequence[str], classes: Sequence[str], accuracy: Tensor) -> Picture:
    """Draw a heat map of the accuracies in percent (variants, classes)."""
    short, across = labels(names), _short(classes, range(len(classes)))
    # Inches a letter: long names would squeeze the cells of a picture of fixed width.
    left = 0.085 * max(len(label) for label in short.values())
    long = max(map(len, across)) > 4
    width = max(WIDTH, 0.6 + left + CELL * len(classes))
    figure = blank(width, 1.15 + 0.27 * len(names) + (0.07 * max(map(len, across)) if long else 0))
    axes = figure.subplots()
    # NaN cells must not set the lower end of the scale
    _heat(axes, accuracy, ONE_WAY, float(accuracy.nan_to_num(100).min()) - 5, 100, "{:.0f}", 8)
    _ticks(axes, [short[name] for name in names], across, 90 if long else 0)
    axes.set_xlabel("class", color=INK)
    rows = zip(names, accuracy.tolist(), strict=True)
    told = "; ".join(
        f"{name}: worst {min(row):.0f} %, class {classes[row.index(min(row))]}"
        for name, row in rows
    )
    return Picture(
        "class-accuracy", figure, f"Heat map of test accuracy by class. {told}.", wide=True
    )


def confusion_change(name: str, baseline: str, classes: Sequence[str], change: Tensor) -> Picture:
    """Draw how many more percent of a class's images the variant assigns to each class than the
    baseline (true, predicted).
    """
    # excluded, because the diagonal changes most
    bound = max(1.0, float((change - change.diag().diag()).abs().max()))
    width = max(WIDTH, 1.2 + CELL * len(classes))
    across = _short(classes, range(len(classes)))
    # Nearly square cells, as both axes are the same classes.
    figure = blank(width, 1.0 + 0.8 * width)
    axes = figure.subplots()
    _heat(axes, change, TWO_WAYS, -bound, bound, "{:+.1f}", 7.5, least=0.05)
    _ticks(axes, across, across, 90 if max(map(len, across)) > 4 else 0)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    told = ", ".join(
        f"{classes[t]} as {classes[p]} {change[t, p]:+.1f}" for t, p in _strongest(change, 4)
    )
    return Picture(
        "confusion-change",
        figure,
        f"Change of the confusion matrix from {baseline} to {name}, points: {told}.",
        wide=True,
    )


def confusion_pairs(name: str, baseline: str, classes: Sequence[str], change: Tensor) -> Picture:
    """Draw the pairs of different classes whose confusion changed most; for data with many
    classes.
    """
    pairs = sorted(_strongest(change, MOST_PAIRS), key=lambda pair: float(change[pair]))
    values = [float(change[pair]) for pair in pairs]
    figure = blank(WIDTH, 1.2 + 0.24 * len(pairs))
    axes = figure.subplots()
    axes.barh(
        range(len(pairs)),
        values,
        color=[COLORS[0] if v < 0 else COLORS[1] for v in values],
        edgecolor=INK,
        linewidth=0.6,
    )
    short = labels(classes, CLASS_LETTERS)
    axes.set_yticks(
        range(len(pairs)), [plain(f"{short[classes[t]]} as {short[classes[p]]}") for t, p in pairs]
    )
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("points", color=INK)
    for place, value in enumerate(values):
        axes.annotate(
            f"{value:+.1f}",
            (value, place),
            (3 if value > 0 else -3, 0),
            textcoords="offset points",
            ha="left" if value > 0 else "right",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.margins(x=0.3)
    told = ", ".join(f"{classes[t]} as {classes[p]} {change[t, p]:+.1f}" for t, p in pairs)
    return Picture(
        "confusion-change",
        figure,
        f"Confusions that changed most from {baseline} to {name}, points: {told}.",
    )


def _strongest(change: Tensor, count: int) -> list[tuple[int, int]]:
    """List the (true, predicted) pairs of different classes with the largest changes."""
    size = change.abs().fill_diagonal_(0).flatten()
    order = size.argsort(descending=True)[:count]
    return [(int(i) // len(change), int(i) % len(change)) for i in order if size[i] > 0]


def images(png: bytes, title: str) -> Figure:
    """Draw a picture of a run, such as the images that it has made."""
    from matplotlib.image import imread

    figure = blank(WIDTH, WIDTH)
    axes = figure.subplots()
    axes.imshow(imread(io.BytesIO(png)), cmap="gray", interpolation="none")
    axes.set_axis_off()
    axes.set_title(plain(title), fontsize=9, color=INK)
    return figure


def softened(
    number: int, image: Tensor, label: int, logits: Tensor, classes: Sequence[str]
) -> Picture:
    """Draw an image (C, H, W) in [0, 1], and next to it the teacher's answer (K,) at several
    temperatures, on one scale.
    """
    shown = (
        logits.argsort(descending=True)[:BARS] if len(logits) > BARS else torch.arange(len(logits))
    )
    first, second = logits.topk(2).indices.tolist()
    answers = {t: (logits / t).softmax(0) for t in TEMPERATURES}
    names = _short(classes, shown.tolist())
    long = max(map(len, names)) > 1
    figure = blank(WIDTH, 3.1 + (0.065 * max(map(len, names)) if long else 0))
    (photo, *panels) = figure.subplots(2, 3).flat
    photo.imshow(_visible(image).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="none")
    photo.set_axis_off()
    photo.set_title(plain(labels(classes, CLASS_LETTERS)[classes[label]]), fontsize=9, color=INK)
    colors = [COLORS[1] if i == label else COLORS[0] for i in shown.tolist()]
    for place, (axes, (t, answer)) in enumerate(zip(panels, answers.items(), strict=True), 1):
        axes.bar(
            range(len(shown)),
            answer[shown].tolist(),
            width=0.8,
            color=colors,
            edgecolor=INK,
            linewidth=0.5,
        )
        # T = 1 has the highest bar: with one scale for all, softening is seen.
        axes.set_ylim(0, 1.15 * float(answers[1].max()))
        left, bottom = place in (1, 3), place > 2
        axes.tick_params(labelleft=left, labelbottom=bottom, labelsize=7.5, colors=INK, length=2)
        axes.tick_params(axis="x", pad=1.5)
        axes.set_xticks(
            range(len(shown)), [plain(name) for name in names], rotation=90 if long else 0
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        rising = plain(labels(classes, 10)[classes[second]])
        axes.set_title(f"T = {t}\n{rising} {answer[second]:.2f}", fontsize=8.5, color=INK)
    chances = "; ".join(
        f"T {t}: {classes[first]} {p[first]:.2f}, {classes[second]} {p[second]:.2f}"
        for t, p in answers.items()
    )
    alt = f"A test image of class {classes[label]}, and the teacher's probabilities. {chances}."
    return Picture(f"softened-{number}", figure, alt)


def _short(classes: Sequence[str], chosen: Iterable[int]) -> list[str]:
    """Shorten the names of some of the classes for a picture."""
    short = labels(classes, CLASS_LETTERS)
    return [short[classes[i]] for i in chosen]


def _visible(image: Tensor) -> Tensor:
    """Convert an image to (H, W) or (H, W, 3)."""
    # matplotlib takes grey images of two dimensions only, and warns of colours outside [0, 1].
    return image.permute(1, 2, 0).clamp(0, 1) if len(image) == 3 else image[0].clamp(0, 1)


def similar_layers(
    number: int, name: str, rows: Sequence[str], columns: Sequence[str], values: Tensor
) -> Picture:
    """Draw a heat map of CKA (teacher's layers, student's layers), 0 to 1."""
    down, across = list(labels(rows).values()), list(labels(columns).values())
    figure = blank(WIDTH, 1.4 + 0.36 * len(rows))
    axes = figure.subplots()
    _heat(axes, values, ONE_WAY, 0, 1, "{:.2f}", 8.5)
    # Names that are wider than a cell are turned, so that neighbours do not overlap.
    cell = (WIDTH - 0.6 - 0.07 * max(map(len, down))) / len(across)  # inches
    _ticks(axes, down, across, 0 if 0.072 * max(map(len, across)) < cell else 45)
    axes.set_ylabel("teacher", color=INK)
    axes.set_xlabel("student", color=INK)
    titled(figure, labels([name])[name])
    told = "; ".join(
        f"teacher's {row}: " + ", ".join(f"{c} {v:.2f}" for c, v in zip(columns, line, strict=True))
        for row, line in zip(rows, values.tolist(), strict=True)
    )
    return Picture(
        f"similar-layers-{number}", figure, f"Linear CKA of layers, student of {name}. {told}."
    )


def _heat(
    axes: Axes,
    values: Tensor,
    colors: str,
    low: float,
    high: float,
    number: str,
    size: float,
    least: float = -1.0,
) -> None:
    """Draw cells with their numbers; numbers closer to 0 than `least` are left out."""
    image = axes.imshow(
        values.numpy(), cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="none"
    )
    for y, row in enumerate(values.tolist()):
        for x, value in enumerate(row):
            # NaN, of a class without test images, is not equal to itself.
            if value != value or abs(value) < least:
                continue
            red, green, blue, _ = image.cmap(image.norm(value))
            # The luminance of the cell: white digits where it is dark, also in a grey print.
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.6
            axes.text(
                x,
                y,
                # Turns -0.0 into 0.0, which is written without a sign.
                number.format(value + 0.0),
                ha="center",
                va="center",
                fontsize=size,
                color=DARK_CELL if dark else LIGHT_CELL,
            )


def _ticks(axes: Axes, down: Sequence[str], across: Sequence[str], rotation: int) -> None:
    axes.set_yticks(range(len(down)), [plain(name) for name in down])
    axes.set_xticks(
        range(len(across)),
        [plain(name) for name in across],
        rotation=rotation,
        ha="right" if rotation == 45 else "center",
        rotation_mode="anchor" if rotation == 45 else "default",
    )
    axes.tick_params(colors=INK, labelsize=8.5, length=0)
    axes.spines[:].set_visible(False)
