"""Images made from a seed: a smooth pattern per class, shifted, in noise. For tests, trials and
timing without any file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional as F

import kdkit

COARSE = 4  # pixels a side of a class's pattern before it is smoothed to the image size


class SyntheticOptions(kdkit.DatasetOptions):
    """How many images of what kind."""

    num_classes: int = Field(
        default=10,
        ge=2,
        le=100_000,
        description="Classes; the images are shared out equally among them.",
    )
    image_size: int = Field(default=32, ge=4, le=4096, description="Side of the square images.")
    channels: int = Field(default=3, ge=1, le=64, description="Channels.")
    train: int = Field(default=2000, gt=0, le=10_000_000, description="Training images.")
    test: int = Field(default=500, gt=0, le=10_000_000, description="Test images.")
    noise: float = Field(
        default=0.25, ge=0, description="Standard deviation of the noise, of pixels in [0, 1]."
    )
    seed: int = Field(default=0, ge=0, description="Gives the patterns and the images.")


class Synthetic(kdkit.DatasetSource):
    """Random images that can be learned: a pattern per class, shifted by up to an eighth of the
    side, with noise.
    """

    name = "synthetic"
    # `split` makes all images
    split_at_check = False
    Options = SyntheticOptions
    options: SyntheticOptions

    def info(self) -> kdkit.DataInfo:
        o = self.options
        return kdkit.DataInfo(
            (o.channels, o.image_size, o.image_size),
            outputs=o.num_classes,
            num_train=o.train,
            num_test=o.test,
        )

    def split(self, part: Literal["train", "test"]) -> kdkit.InMemory:
        o = self.options
        coarse = torch.rand(
            (o.num_classes, o.channels, COARSE, COARSE),
            generator=torch.Generator().manual_seed(3 * o.seed),
        )
        patterns = F.interpolate(coarse, size=(o.image_size, o.image_size), mode="bilinear")
        # 3 seed, 3 seed + 1 and 3 seed + 2: no two seeds share patterns or images
        random = torch.Generator().manual_seed(3 * o.seed + (1 if part == "train" else 2))
        count = o.train if part == "train" else o.test
        # a permutation, not draws, so that classes have equally many images
        labels = (torch.arange(count) % o.num_classes)[torch.randperm(count, generator=random)]
        farthest = o.image_size // 8
        images = torch.empty((count, o.channels, o.image_size, o.image_size), dtype=torch.uint8)
        for i, label in enumerate(labels.tolist()):
            down, right = torch.randint(-farthest, farthest + 1, (2,), generator=random).tolist()
            noise = torch.randn(patterns.shape[1:], generator=random) * o.noise
            pixels = patterns[label].roll((down, right), (1, 2)) + noise
            images[i] = pixels.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
        return kdkit.InMemory(images, labels)


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [Synthetic]
