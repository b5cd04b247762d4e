"""Pictures of boxes for reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import kdkit

from . import _boxes as boxes

COLUMN = 3.2  # inches


def draw(example: kdkit.Example, info: kdkit.DataInfo, rule: boxes.Rule) -> Any:
    """Draw the image with the true boxes, and with what each network detects.

    Boxes that do not count are dashed; a detection is as opaque as its score is high.
    """
    from matplotlib.figure import Figure

    _, height, width = example.image.shape
    answers = {
        name: boxes.detect(answer[None].float(), rule, (height, width))[0]
        for name, answer in example.answers.items()
    }
    panels = dict(answers)
    if example.target is not None:
        panels = {"truth": next(boxes.unpadded(example.target[None])), **answers}
    figure = Figure(figsize=(COLUMN * len(panels), COLUMN * height / width + 0.6))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    pixels = example.image.permute(1, 2, 0).clamp(0, 1).numpy()
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        axis.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray")
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
        is_truth = name == "truth"
        for row in rows:
            _outline(axis, row, is_truth)
    _name_classes(figure, info, panels)
    figure.tight_layout()
    return figure


def _outline(axis: Any, row: Tensor, is_truth: bool) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = row[boxes.BOX].tolist()
    number = int(row[boxes.LABEL] if is_truth else row[boxes.CLASS])
    opacity = 1.0 if is_truth else float(row[boxes.SCORE].clamp(0.3, 1))
    style = "--" if is_truth and row[boxes.IGNORED] else "-"
    outline = Rectangle(
        (left, top),
        right - left,
        bottom - top,
        fill=False,
        edgecolor=_color(number),
        linewidth=1.2,
        linestyle=style,
        alpha=opacity,
    )
    axis.add_patch(outline)


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
