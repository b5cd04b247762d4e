"""Write CIFAR-10's test images as pictures in folders of classes, for the recipes beside this file.

    python recipes/cifar10/folders.py data

Reads `data/cifar-10-batches-py` and writes `data/cifar10_folders`: `train/CLASS/` with 800 images
of each class and `val/CLASS/` with the other 200. The networks of these recipes are published ones,
which have seen the training images: so they are tuned on images that are new to them, and measured
on others.
"""

import sys
from collections import Counter
from pathlib import Path

from torchvision.datasets import CIFAR10

TRAINING = 800  # images of a class


class TestImages(CIFAR10):
    """The file of the test images alone, whose digest torchvision would ask for."""

    train_list, test_list = [], [["test_batch", None]]


def main() -> None:
    root = Path(sys.argv[1])
    images = TestImages(root, train=False)
    seen: Counter[int] = Counter()
    for number, (image, label) in enumerate(images):
        part = "train" if seen[label] < TRAINING else "val"
        seen[label] += 1
        folder = root / "cifar10_folders" / part / images.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:04}.png")
    print(f"{len(images):,} pictures in {root / 'cifar10_folders'}")


if __name__ == "__main__":
    main()
