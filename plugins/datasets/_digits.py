"""scikit-learn's handwritten digits, in the two parts that the datasets made of them share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

TRAIN, TEST = 1000, 797
SIDE = 8  # pixels
# not the run's seed: the split belongs to the dataset
SPLIT_SEED = 0


def digits(part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) uint8 and digits (N,) int64 of a part, in class shares."""
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
    images = (torch.as_tensor(pixels) * (255 / 16)).round().to(torch.uint8)
    images = images.reshape(-1, 1, SIDE, SIDE)
    return images[chosen], torch.as_tensor(labels, dtype=torch.int64)[chosen]
