"""Shapes of network inputs, and inputs of such a shape to try a network with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdkit.contracts.options import SIDE
from kdkit.contracts.records import MASK, Inputs
from kdkit.errors import ModelError, shown

Shape = tuple[int, ...]
"""Shape of one sample: (C, H, W) of an image; a `TextShape` of a text."""


# a type of its own: the length of a tuple does not tell a text from another kind of sample
class TextShape(tuple[int, ...]):
    """The shape (N,) of texts of at most N tokens, as the task reports it."""

    __slots__ = ()


TOKENS = "input_ids"
COMMON = 8  # token ids below this exist in any vocabulary


def is_text(shape: Shape) -> bool:
    """Check whether samples of that shape are texts, not images."""
    return isinstance(shape, TextShape)


def kind_of(shape: Shape) -> str:
    """Name the kind of samples: `images` or `texts`."""
    return "texts" if is_text(shape) else "images"


def random_inputs(
    shape: Shape, count: int, device: torch.device | str | None = None, seed: int = 0
) -> Inputs:
    """Make images in [0, 1], or texts of full length, that depend on the seed alone.

    On the meta device texts have no mask: networks read its values, and meta tensors have none.
    """
    # on the CPU for every device, so that the numbers are the same on each
    stream = torch.Generator().manual_seed(seed)
    if not is_text(shape):
        return torch.rand((count, *shape), generator=stream).to(device)
    # not 0, which most vocabularies use for padding
    ids = torch.randint(1, COMMON, (count, *shape), generator=stream).to(device)
    return {TOKENS: ids} if ids.device.type == "meta" else {TOKENS: ids, MASK: torch.ones_like(ids)}


def answered(module: nn.Module, inputs: Inputs) -> Any:
    """Call a network with images, or with the items of a mapping as keyword arguments."""
    return module(**inputs) if isinstance(inputs, Mapping) else module(inputs)


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """Move the inputs to another device."""
    return _mapped(inputs, lambda value: value.to(device))


def rows(inputs: Inputs, index: Tensor) -> Inputs:
    """Select some of the samples, in the given order."""
    return _mapped(inputs, lambda value: value[index])


def _mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: change(value) for name, value in inputs.items()}
    return change(inputs)


def first_tensor(inputs: Inputs) -> Tensor:
    """Return the images, or one tensor of a mapping, for its device and number of samples."""
    return next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs


def as_image(shape: Shape, channels: int = 3) -> Shape:
    """Return (C, H, W) as it is, and a side (N,) as the shape of square images."""
    return (channels, *shape, *shape) if is_text(shape) else shape


def parse_shape(size: str) -> Shape:
    """Parse "C,H,W" as (C, H, W), and "N" as (N,): tokens of a text, or the side of images.

    Raises:
        ModelError: it is not of that form.
    """
    # text that is no number is reported by the error below
    with contextlib.suppress(ValueError):
        shape = tuple(int(side) for side in size.split(","))
        if len(shape) in (1, 3) and min(shape) > 0 and max(shape) <= SIDE:
            return TextShape(shape) if len(shape) == 1 else shape
    raise ModelError(
        f"--size: {shown(size)} is not of the form C,H,W, such as 3,224,224, nor a whole number,"
        f" the side of square images or tokens of a text; each is {SIDE} at most"
    )
