"""Converts PIL images to uint8 tensors: the size, the channels, timm's augmentations."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdkit.contracts.inputs import Shape
from kdkit.data.augment import sample_seed
from kdkit.errors import DataError
from kdkit.randomness import restored
from kdkit.recipe.data_section import DataSpec, TimmAugment

Transform = Callable[[tuple[Any, Any], int, int], Tensor | tuple[Tensor, Tensor]]
"""((PIL image, target), view, sample index) -> uint8 (C, H, W); with the target, if it moves with
the image.
"""

MODES = {1: "L", 3: "RGB"}
# PIL's modes of more than 8 bits, which `convert` would clip
WIDE = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators of Python, NumPy and torch by 64 bits inside the block."""
    with restored():
        random.seed(seed)
        # NumPy takes words of 32 bits
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
        # torch.manual_seed would also seed the accelerators, which a worker process must not touch
        torch.default_generator.manual_seed(seed)
        yield


class Plain:
    """Centre crop of an image whose shorter side was resized, if a size is asked for."""

    def __init__(self, spec: DataSpec, shape: Shape, crop_pct: float) -> None:
        from timm.data.transforms_factory import create_transform

        self.shape = shape
        self.resizes = spec.size is not None
        self.resize = create_transform(
            (shape[1], shape[2]),
            crop_pct=crop_pct,
            interpolation=spec.interpolation,
            normalize=False,
        )

    def __call__(self, sample: tuple[Any, Any], view: int, index: int) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor

        image = with_channels(sample[0], self.shape[0])
        if self.resizes:
            cropped: Tensor = self.resize(image)
            return cropped
        if (image.height, image.width) != self.shape[1:]:
            raise DataError(
                f"an image is {image.height} x {image.width}, others {self.shape[1]} x"
                f" {self.shape[2]}: set data.image_size"
            )
        tensor: Tensor = pil_to_tensor(image)
        return tensor


class Augmented:
    """timm's training transform, drawn only from (seed, view, sample index)."""

    def __init__(self, options: TimmAugment, shape: Shape, seed: int) -> None:
        from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        from timm.data.transforms_factory import create_transform

        self.channels, self.seed = shape[0], seed
        self.mean = torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
        self.std = torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]
        try:
            self.transform = create_transform(
                (shape[1], shape[2]),
                is_training=True,
                scale=options.scale,
                ratio=options.ratio,
                hflip=options.flip,
                vflip=options.vertical_flip,
                color_jitter=options.color_jitter or 0.0,
                auto_augment=options.auto_augment,
                interpolation=options.interpolation,
                re_prob=options.random_erasing,
                re_mode=options.erasing_mode,
                mean=IMAGENET_DEFAULT_MEAN,
                std=IMAGENET_DEFAULT_STD,
            )
        # errors of timm's policy parser
        except (AssertionError, KeyError, ValueError, IndexError) as error:
            raise DataError(
                f"data.timm_augment: timm does not accept {options.auto_augment!r}"
                f" ({type(error).__name__}: {error})"
            ) from error

    def __call__(self, sample: tuple[Any, Any], view: int, index: int) -> Tensor:
        with seeded(sample_seed(self.seed, view, index)):
            # timm's policies fill with three channels
            normalised: Tensor = self.transform(with_channels(sample[0], 3))
        # undo timm's normalisation: batches are in [0, 1]
        # rounded: normalising and undoing it leaves numbers that are whole but for an error
        pixels = (normalised * self.std + self.mean).mul_(255).round_().clamp_(0, 255)
        return pixels.to(torch.uint8)[: self.channels]


def with_channels(image: Any, channels: int) -> Any:
    """Convert the PIL image to grey (1 channel) or RGB (3)."""
    if channels not in MODES:
        raise DataError(f"PIL images have 1 or 3 channels, the dataset says {channels}")
    if image.mode in WIDE:
        raise DataError(
            f"its pixels are not of 8 bits (PIL's mode {image.mode}), and would be cut off at 255;"
            " scale them to 0 to 255 first"
        )
    return image.convert(MODES[channels])


def for_training(spec: DataSpec, shape: Shape, seed: int) -> Transform:
    """Return the transform of training images read singly; `data.augment` follows by batch."""
    if spec.timm_augment:
        return Augmented(spec.timm_augment, shape, seed)
    return Plain(spec, shape, crop_pct=1.0)


def for_measuring(spec: DataSpec, shape: Shape) -> Transform:
    """Return the transform of each validation and test image that is read individually."""
    return Plain(spec, shape, spec.crop_pct)


def resized(images: Tensor, size: tuple[int, int] | None, interpolation: str) -> Tensor:
    """Resize uint8 images (N, C, H, W) until they cover `size`, and crop the centre."""
    if size is None or images.shape[-2:] == size:
        return images
    height, width = images.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    target = [max(size[0], round(height * scale)), max(size[1], round(width * scale))]
    # in chunks: as floats, all images take four times the memory
    chunks = [
        F.interpolate(chunk.float(), target, mode=interpolation, antialias=True)
        for chunk in torch.split(images, 1024)
    ]
    top, left = (target[0] - size[0]) // 2, (target[1] - size[1]) // 2
    # antialiased interpolation overshoots at edges, hence the clamp
    whole = torch.cat([chunk.round_().clamp_(0, 255).to(torch.uint8) for chunk in chunks])
    return whole[..., top : top + size[0], left : left + size[1]].contiguous()
