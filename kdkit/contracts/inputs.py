"""The shape of what a network is shown, and inputs of that shape to try it out with."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor

from kdkit.contracts.options import SIDE
from kdkit.contracts.records import MASK, Inputs
from kdkit.errors import ModelError, shown

Shape = tuple[int, ...]
"""Of one sample: (C, H, W) of an image; (N,) of a text of at most N tokens."""

TOKENS = "input_ids"
COMMON = 8  # token ids that any vocabulary has


def is_text(shape: Shape) -> bool:
    """Whether samples of that shape are texts, not images."""
    return len(shape) == 1


def kind_of(shape: Shape) -> str:
    """images or texts."""
    return "texts" if is_text(shape) else "images"


def random_inputs(
    shape: Shape, count: int, device: torch.device | str | None = None, seed: int = 0
) -> Inputs:
    """Images in [0, 1], or texts of full length; the same ones for a seed, whatever else is drawn.

    On the meta device texts have no mask: networks look what is in it, and there is nothing.
    """
    stream = torch.Generator().manual_seed(seed)
    if not is_text(shape):
        return torch.rand((count, *shape), generator=stream).to(device)
    ids = torch.randint(1, COMMON, (count, *shape), generator=stream).to(device)
    return {TOKENS: ids} if ids.device.type == "meta" else {TOKENS: ids, MASK: torch.ones_like(ids)}


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """The same inputs on another device."""
    return (
        inputs.to(device)
        if isinstance(inputs, Tensor)
        else {name: value.to(device) for name, value in inputs.items()}
    )


def rows(inputs: Inputs, index: Tensor) -> Inputs:
    """Some of the samples, in that order."""
    return (
        inputs[index]
        if isinstance(inputs, Tensor)
        else {name: value[index] for name, value in inputs.items()}
    )


def first_tensor(inputs: Inputs) -> Tensor:
    """The images, or one of the tensors of a mapping: it says on which device they are, and how
    many.
    """
    return next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs


def as_image(shape: Shape, channels: int = 3) -> Shape:
    """(C, H, W) as it is; a side (N,) as that of square images."""
    return (channels, *shape, *shape) if is_text(shape) else shape


def parse_shape(size: str) -> Shape:
    """(C, H, W) of "C,H,W", and (N,) of "N": tokens of a text, or the side of square images.

    Raises:
        ModelError: it is not of that form.
    """
    with contextlib.suppress(ValueError):
        shape = tuple(int(side) for side in size.split(","))
        if len(shape) in (1, 3) and min(shape) > 0 and max(shape) <= SIDE:
            return shape
    raise ModelError(
        f"--size: {shown(size)} is not of the form C,H,W, such as 3,224,224, nor a whole number,"
        f" the side of square images or tokens of a text; each is {SIDE} at most"
    )
