"""Pictures of two handwritten digits side by side; the labels are the digits that occur."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional as F

import kdkit

from ._digits import SIDE, digits


class TwoDigitsOptions(kdkit.DatasetOptions):
    """How many pictures."""

    train: int = Field(default=2000, gt=0, le=1_000_000, description="Training pictures.")
    test: int = Field(default=1000, gt=0, le=1_000_000, description="Test pictures.")
    seed: int = Field(default=0, ge=0, description="Draws the digits of each picture.")


class TwoDigits(kdkit.DatasetSource):
    """Two of scikit-learn's handwritten digits in one picture, 16 x 16, grey, with 10 labels: which
    digits occur. Needs no download.

    One digit is in the left half, one in the right, each at a height of its own; both may be the
    same one. Training and test pictures are made of different originals, those of the parts of
    `digits`.
    """

    name = "two_digits"
    task = "multilabel"
    # `split` loads scikit-learn
    split_at_check = False
    Options = TwoDigitsOptions
    options: TwoDigitsOptions

    def info(self) -> kdkit.DataInfo:
        o = self.options
        shape = (1, 2 * SIDE, 2 * SIDE)
        return kdkit.DataInfo(shape, 10, o.train, o.test, class_names=tuple("0123456789"))

    def split(self, part: Literal["train", "test"]) -> kdkit.InMemory:
        o = self.options
        count = o.train if part == "train" else o.test
        originals, classes = digits(part)
        draw = torch.Generator().manual_seed(2 * o.seed + (part == "test"))
        chosen = torch.randint(len(originals), (count, 2), generator=draw)
        tops = torch.randint(SIDE + 1, (count, 2), generator=draw)
        pictures = torch.zeros(count, 1, 2 * SIDE, 2 * SIDE, dtype=torch.uint8)
        picture, pixel = torch.arange(count)[:, None, None], torch.arange(SIDE)
        for place in range(2):
            rows = (tops[:, place, None] + pixel)[:, :, None]
            columns = place * SIDE + pixel
            pictures[picture, 0, rows, columns] = originals[chosen[:, place], 0]
        labels = F.one_hot(classes[chosen], 10).amax(1)
        return kdkit.InMemory(pictures, labels)


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [TwoDigits]
