"""Pictures of boxes for reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import kdkit

from . import _boxes as boxes

COLUMN = 3.2  # inches
ROOM = 10  # pixels that a score needs above its box
FAINTEST = 0.6  # least opacity of an outline, at a score of 0


def draw(example: kdkit.Example, info: kdkit.DataInfo, rule: boxes.Rule) -> Any:
    """Draw the image without its padding, with the true boxes, and with what each network detects.

    Boxes that do not count are dashed. A detection has its score beside it, and is fainter for a
    low one.
    """
    from matplotlib.figure import Figure

    frame = _frame(example)
    left, top, right, bottom = frame.tolist()
    answers = {
        name: boxes.detect(answer[None].float(), rule, frame[None])[0]
        for name, answer in example.answers.items()
    }
    panels = dict(answers)
    if example.target is not None:
        panels = {"truth": next(boxes.unpadded(example.target[None])), **answers}
    height = COLUMN * (bottom - top) / (right - left)
    figure = Figure(figsize=(COLUMN * len(panels), height + 0.6))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    pixels = example.image.permute(1, 2, 0).clamp(0, 1).numpy()
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        axis.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray")
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
        is_truth = name == "truth"
        # the best last, on top of the others
        for row in rows.flip(0):
            _outline(axis, row, is_truth)
            if not is_truth:
                _score(axis, row, top)
        # pixels lie around whole numbers, boxes count from their edges
        axis.set_xlim(left - 0.5, right - 0.5)
        axis.set_ylim(bottom - 0.5, top - 0.5)
    _name_classes(figure, info, panels)
    figure.tight_layout()
    return figure


def _frame(example: kdkit.Example) -> Tensor:
    """Find the picture (4,) in a padded image: as the example says, or as its target does."""
    if example.frame is not None:
        return torch.tensor(example.frame, dtype=torch.float32)
    size = example.image.shape[1:]
    if example.target is None:
        return boxes.whole(example.image[None], size)[0]
    return boxes.frames(example.target[None].float(), size)[0]


def _outline(axis: Any, row: Tensor, is_truth: bool) -> None:
    from matplotlib import patheffects
    from matplotlib.patches import Rectangle

    left, top, right, bottom = (row[boxes.BOX] - 0.5).tolist()
    number = int(row[boxes.LABEL] if is_truth else row[boxes.CLASS])
    score = 1.0 if is_truth else float(row[boxes.SCORE])
    opacity = FAINTEST + (1 - FAINTEST) * score
    style = "--" if is_truth and row[boxes.IGNORED] else "-"
    outline = Rectangle(
        (left, top),
        right - left,
        bottom - top,
        fill=False,
        edgecolor=_color(number),
        linewidth=1.4,
        linestyle=style,
        alpha=opacity,
    )
    # on white, so that it is seen before any picture
    halo = patheffects.withStroke(linewidth=2.8, foreground="white", alpha=opacity)
    outline.set_path_effects([halo])
    axis.add_patch(outline)


def _score(axis: Any, row: Tensor, highest: float) -> None:
    """Write a score on top of its box, or into it below the edge of the picture."""
    from matplotlib import patheffects

    left, top, *_ = row[boxes.BOX].tolist()
    text = axis.annotate(
        f"{float(row[boxes.SCORE]):.2f}",
        (left, top),
        xytext=(1.5, -1.5 if top < highest + ROOM else 1.5),
        textcoords="offset points",
        va="top" if top < highest + ROOM else "bottom",
        fontsize=6.5,
        color=_color(int(row[boxes.CLASS])),
    )
    text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="white")])


def _name_classes(figure: Any, info: kdkit.DataInfo, panels: Mapping[str, Tensor]) -> None:
    """Put the names of the classes that occur under the panels."""
    from matplotlib.patches import Patch

    names = info.class_names or tuple(map(str, range(info.outputs)))
    columns = {"truth": boxes.LABEL}
    occur = [rows[:, columns.get(name, boxes.CLASS)] for name, rows in panels.items()]
    numbers = sorted({int(number) for number in torch.cat(occur).tolist()})
    patches = [Patch(color=_color(number), label=names[number]) for number in numbers]
    if patches:
        figure.legend(handles=patches, loc="lower center", ncols=min(len(patches), 6), fontsize=8)


def _color(number: int) -> Any:
    from matplotlib import colormaps

    # strong colours as long as there are enough of them
    return colormaps["tab10"](number) if number < 10 else colormaps["tab20"](number % 20)
