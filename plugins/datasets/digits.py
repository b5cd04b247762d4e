"""scikit-learn's handwritten digits, which come with it: nothing to download.

Alpaydin, Kaynak: Optical recognition of handwritten digits (test part), UCI Machine Learning
Repository, 1998.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import kdkit

from ._digits import SIDE, TEST, TRAIN, digits


class Digits(kdkit.DatasetSource):
    """Handwritten digits, 8 x 8, grey, that need no download: 1,000 for training and 797 for the
    test.
    """

    name = "digits"
    # `split` loads scikit-learn
    split_at_check = False

    def info(self) -> kdkit.DataInfo:
        return kdkit.DataInfo(
            (1, SIDE, SIDE),
            outputs=10,
            num_train=TRAIN,
            num_test=TEST,
            class_names=tuple("0123456789"),
        )

    def split(self, part: Literal["train", "test"]) -> kdkit.InMemory:
        return kdkit.InMemory(*digits(part))


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [Digits]
