"""scikit-learn's handwritten digits, which come with it: nothing to download.

Alpaydin, Kaynak: Optical recognition of handwritten digits (test part), UCI Machine Learning
Repository, 1998.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

import kdkit

TRAIN, TEST = 1000, 797
# not the run's seed: the split belongs to the dataset
SPLIT_SEED = 0


class Digits(kdkit.DatasetSource):
    """Handwritten digits, 8 x 8, grey, that need no download: 1,000 for training and 797 for the
    test.
    """

    name = "digits"
    # `split` loads scikit-learn
    split_at_check = False

    def info(self) -> kdkit.DataInfo:
        return kdkit.DataInfo(
            (1, 8, 8),
            outputs=10,
            num_train=TRAIN,
            num_test=TEST,
            class_names=tuple("0123456789"),
        )

    def split(self, part: Literal["train", "test"]) -> kdkit.InMemory:
        # here: scikit-learn takes long to load
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)  # pixels go from 0 to 16
        places = train_test_split(
            range(len(labels)),
            train_size=TRAIN,
            test_size=TEST,
            stratify=labels,
            random_state=SPLIT_SEED,
        )
        chosen = torch.tensor(sorted(places[part == "test"]))
        images = (torch.as_tensor(pixels) * (255 / 16)).round().to(torch.uint8).reshape(-1, 1, 8, 8)
        return kdkit.InMemory(images[chosen], torch.as_tensor(labels, dtype=torch.int64)[chosen])


@kdkit.hookimpl
def kdkit_datasets() -> Sequence[type[kdkit.DatasetSource]]:
    """The dataset of this file."""
    return [Digits]
