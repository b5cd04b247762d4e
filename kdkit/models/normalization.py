"""Adapts images to one network's input: values per channel, number of channels, size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdkit.contracts.records import Inputs
from kdkit.errors import ModelError

Values = float | Sequence[float]
Interpolation = Literal["bilinear", "bicubic", "nearest", "area"]

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in PIL's mode L


class NormalizationAdapter(nn.Module):
    """Maps images normalised one way to images normalised another way, in one multiply-add.

    Images in [0, 1] have mean 0 and std 1. A number stands for every channel, however many there
    are; a sequence has one value per channel. Grey images are repeated to the required channels;
    colour images become luminance for a network of one channel.

    Args:
        mean_original: mean that was subtracted from the images it gets, of values in [0, 1].
        std_original: standard deviation that they were divided by.
        mean_required: mean that the network expects to have been subtracted.
        std_required: standard deviation that it expects them to be divided by.

    Raises:
        ModelError: a standard deviation is not above 0, or the numbers of channels do not go
            together.
    """

    scale: Tensor
    shift: Tensor
    mix: Tensor | None

    def __init__(
        self,
        mean_original: Values,
        std_original: Values,
        mean_required: Values,
        std_required: Values,
    ) -> None:
        super().__init__()
        self._from = _channels(mean_original, std_original)
        self._to = _channels(mean_required, std_required)
        sizes = {n for n in (self._from, self._to) if n not in (None, 1)}
        if len(sizes) > 1:
            raise ModelError(f"images of {self._from} channels cannot become images of {self._to}")
        mean_o, std_o, mean_r, std_r = (
            _column(v) for v in (mean_original, std_original, mean_required, std_required)
        )
        if not (bool((std_o > 0).all()) and bool((std_r > 0).all())):
            raise ModelError("a standard deviation must be above 0")
        channels = max(self._from or 1, self._to or 1)
        scale, shift = (
            value.expand(1, channels, 1, 1) for value in (std_o / std_r, (mean_o - mean_r) / std_r)
        )
        # Buffers, so that they follow the device; not persistent, so that a checkpoint is the
        # network's alone.
        self.register_buffer("scale", scale.float().contiguous(), persistent=False)
        self.register_buffer("shift", shift.float().contiguous(), persistent=False)
        mix = torch.tensor(LUMINANCE, device="cpu").view(1, 3, 1, 1) if self._to == 1 else None
        self.register_buffer("mix", mix, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images (B, C, H, W) as required, in floating point; uint8 is value / 255.

        Raises:
            ModelError: the images' shape or type is not the expected one.
        """
        grey = self._check(images)
        scale, shift = self.scale, self.shift
        # / 255 in the factor, which saves a pass over the images
        if images.dtype == torch.uint8:
            images, scale = images.to(scale.dtype), scale / 255
        scale, shift = scale.to(images.dtype), shift.to(images.dtype)
        normalised = torch.addcmul(shift, images, scale)
        if not grey or self.mix is None:
            return normalised
        # last: the images' own normalisation, which is undone first, is by colour channel
        return (normalised * self.mix.to(images.dtype)).sum(1, keepdim=True)

    def _check(self, images: Tensor) -> bool:
        """Check the images, and return whether colour images must be converted to grey."""
        if images.ndim != 4:
            raise ModelError(f"images have the shape (B, C, H, W), got {tuple(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ModelError(f"images are floating or uint8, got {images.dtype}")
        channels = images.shape[1]
        if self._from not in (None, 1, channels):
            raise ModelError(f"images have {channels} channels where {self._from} were announced")
        if self._to in (None, channels) or channels == 1:
            return False
        if self._to == 1 and channels == 3:
            return True
        raise ModelError(f"images have {channels} channels, the network takes {self._to}")


class InputAdapter(nn.Module):
    """All that is done to a batch for one network; mappings (text) pass unchanged.

    Args:
        normalization: converts values and channels to the network's form.
        size: side of the network's square images (None: not resized).
        interpolation: the method of resizing; bilinear and bicubic are antialiased when shrinking.
    """

    def __init__(
        self,
        normalization: nn.Module,
        size: int | None = None,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        super().__init__()
        self.normalization = normalization
        self.size = size
        self.interpolation = interpolation

    def forward(self, inputs: Inputs) -> Inputs:
        """Convert images (B, C, H, W) to the network's input."""
        if isinstance(inputs, Mapping):
            return inputs
        # Resizing is a weighted mean, so it may as well come after the normalisation.
        return resized_to(self.size, self.normalization(inputs), self.interpolation)


def resized_to(size: int | None, images: Tensor, interpolation: Interpolation) -> Tensor:
    """Resize images (B, C, H, W) to squares of that side; None: not at all."""
    if size is None or images.shape[2:] == (size, size):
        return images
    smooth = interpolation in ("bilinear", "bicubic")
    shrinks = min(images.shape[2:]) > size
    return F.interpolate(images, (size, size), mode=interpolation, antialias=smooth and shrinks)


def _channels(mean: Values, std: Values) -> int | None:
    """Return the number of channels of a mean and deviation; None if they fit any number."""
    sizes = {len(values) for values in (mean, std) if isinstance(values, Sequence)}
    if len(sizes) > 1:
        raise ModelError(
            f"mean and standard deviation have different numbers of channels: {mean} and {std}"
        )
    return next(iter(sizes), None)


def _column(values: Values) -> Tensor:
    """Return values as (1, C, 1, 1), in double precision until the arithmetic is done."""
    listed = list(values) if isinstance(values, Sequence) else [values]
    return torch.tensor(listed, dtype=torch.float64, device="cpu").view(1, -1, 1, 1)
