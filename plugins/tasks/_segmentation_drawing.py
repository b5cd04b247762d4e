"""What a report draws of segmentation: image, truth and answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch.nn.functional as F
from torch import Tensor

import kdkit

from ._segmentation import IGNORED

PANEL = 2.5  # inches
ACROSS = 3  # panels in a row, so that they can be read on a page
# none of them is a class's colour
GREY, BOTH_WRONG = (0.88,) * 3, (0.6,) * 3
RIGHT, WRONG = (0.0,) * 3, (1.0, 0.0, 0.9)


def draw(example: kdkit.Example, info: kdkit.DataInfo) -> Any:
    """Draw a panel for the image, the truth, each answer, and the difference of the last two."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colors = _colors(info.outputs)
    names = info.class_names or tuple(map(str, range(info.outputs)))
    size, target = example.image.shape[1:], example.target
    classes = {name: _classes(logits, size) for name, logits in example.answers.items()}
    panels = [("image", _visible(example.image))]
    panels += [] if target is None else [("truth", _colored(target, colors))]
    panels += [(name, _colored(mask, colors, target)) for name, mask in classes.items()]
    if len(classes) > 1 and target is not None:
        panels.append(_difference(classes, target))
    rows = -(-len(panels) // ACROSS)
    height = PANEL * size[0] / size[1]
    figure = Figure(figsize=(PANEL * ACROSS, (height + 0.3) * rows + 0.7), layout="constrained")
    places = figure.subplots(rows, ACROSS, squeeze=False).flatten()
    for axes in places:
        axes.axis("off")
    for axes, (title, pixels) in zip(places, panels, strict=False):
        axes.imshow(pixels, interpolation="nearest")
        axes.set_title(title.replace("$", r"\$"), fontsize=8.5, loc="left")
    masks = [*classes.values()] if target is None else [target]
    shown = [i for i in range(info.outputs) if any((mask == i).any() for mask in masks)]
    handles = [
        Patch(color=colors[index], label=names[index].replace("$", r"\$")) for index in shown
    ]
    handles += [] if target is None else [Patch(color=GREY, label="(does not count)")]
    figure.legend(handles=handles, loc="outside lower left", ncols=6, fontsize=8, frameon=False)
    return figure


def _colors(count: int) -> Any:
    """A colour for each class, (K, 3)."""
    few = matplotlib.colormaps["tab20"]
    if count <= few.N:
        return few(np.arange(count))[:, :3]
    return matplotlib.colormaps["hsv"](np.linspace(0, 0.95, count))[:, :3]


def _classes(logits: Tensor, size: Sequence[int]) -> Tensor:
    whole = F.interpolate(logits[None].float(), tuple(size), mode="bilinear", align_corners=False)
    return whole[0].argmax(0)


def _visible(image: Tensor) -> Any:
    """Pixels (H, W, 3) of an image of one or three channels."""
    return image[:3].expand(3, -1, -1).permute(1, 2, 0).numpy()


def _colored(mask: Tensor, colors: Any, target: Tensor | None = None) -> Any:
    """Pixels (H, W, 3) of a mask; grey where the target does not count."""
    counts = ((mask if target is None else target) != IGNORED).numpy()
    indices = mask.clamp(max=len(colors) - 1).numpy()
    return np.where(counts[..., None], colors[indices], GREY)


def _difference(classes: dict[str, Tensor], target: Tensor) -> tuple[str, Any]:
    """Where the last two answers differ: black where only the last is right, magenta where only the
    one before is, grey where neither.
    """
    (before, first), (after, second) = list(classes.items())[-2:]
    pixels = np.full((*target.shape, 3), 1.0)
    differ = ((first != second) & (target != IGNORED)).numpy()
    pixels[(target == IGNORED).numpy()] = GREY
    pixels[differ] = BOTH_WRONG
    pixels[differ & (second == target).numpy()] = RIGHT
    pixels[differ & (first == target).numpy()] = WRONG
    return f"right only: {after} (black), {before} (magenta)", pixels
