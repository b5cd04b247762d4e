"""Images per second of kdkit's batched crop, flip and normalisation, against torchvision's
loader of PIL images.

    python benchmarks/loader.py [--images 10000] [--batch-size 128]

Both sides give epochs of CIFAR-10's shape in another order each, every image cropped at its own
place after padding by 4, mirrored or not, and normalised for the network. kdkit holds the images as
one tensor: its loader, then the model's normalisation, contiguous as the other side's are. The
other side is what is usually written: a dataset of arrays that become PIL images, `RandomCrop(32,
4)`, `RandomHorizontalFlip`, `ToTensor`, `Normalize`, in a `DataLoader`. Its workers are kept
between epochs, and one epoch goes before, so that their start does not count.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy
import sides
import torch
from torch.utils.data import DataLoader, Dataset

from kdkit.data import loaders
from kdkit.data.loaders import TrainLoader
from kdkit.models.normalization import NormalizationAdapter

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Pictures(Dataset[Any]):
    """As torchvision's CIFAR10 hands them out."""

    def __init__(self, pixels: numpy.ndarray[Any, Any], labels: list[int], transform: Any) -> None:
        self.pixels = pixels
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def by_torchvision(
    images: torch.Tensor, labels: torch.Tensor, options: argparse.Namespace, workers: int
) -> sides.Side:
    from torchvision import transforms as T

    transform = T.Compose(
        [
            T.RandomCrop(32, padding=4),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )
    pictures = Pictures(images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist(), transform)
    loader: DataLoader[Any] = DataLoader(
        pictures,
        options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: sum(len(labels) for _, labels in loader)


def by_kdkit(loader: TrainLoader) -> sides.Side:
    normalise, epochs = NormalizationAdapter(0.0, 1.0, MEAN, STD), iter(range(1_000_000))

    def epoch() -> int:
        return sum(len(normalise(batch.inputs)) for batch in loader.epoch(next(epochs)))

    return epoch


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2], help="of the PIL loader")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch; CPU time is steadiest with one"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    loaded = sides.read(
        {
            "data": {
                "dataset": {
                    "use": "synthetic",
                    "train": options.images,
                    "test": 16,
                    "image_size": 32,
                },
                "batch_size": options.batch_size,
                "augment": {"crop_padding": 4, "flip": 0.5},
            },
            "student": {"model": "resnet18"},
            "schedule": {"use": "supervised"},
            "losses": [{"use": "cross_entropy"}],
            "train": {"epochs": 1, "optimizer": {"lr": 0.1}},
        }
    )
    source = loaded.plugins.datasets["synthetic"](loaded.spec.data.dataset)
    held = source.split("train")
    prepared = loaders.prepare(
        loaded.spec.data, source, loaded.task, seed=0, device=torch.device("cpu")
    )
    turns = {
        f"PIL, {workers or 'no'} workers": by_torchvision(
            held.images, held.labels, options, workers
        )
        for workers in options.workers
    }
    found = sides.in_turns({**turns, "kdkit": by_kdkit(prepared.train)}, options.rounds)
    seen = len(prepared.train) * options.batch_size
    table = sides.table(
        "loader",
        "images/s of wall time",
        "images/s of CPU time",
        "kdkit: times as many, wall",
        "CPU",
    )
    for name, costs in found.items():
        cost, ratio = sides.median(costs), sides.ratio(costs, found["kdkit"])
        table.add_row(
            name,
            f"{seen / cost.wall:,.0f}",
            f"{seen / cost.cpu:,.0f}",
            f"{ratio.wall:.1f}",
            f"{ratio.cpu:.1f}",
        )
    sides.show(table)


if __name__ == "__main__":
    main()
