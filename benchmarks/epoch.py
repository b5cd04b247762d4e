"""A whole training epoch of kdkit against the script that is usually written by hand:
torchvision's loader, plain PyTorch.

    python benchmarks/epoch.py [--data ROOT] [--rounds 3]

Both sides distil the same networks (weights random) from the same images of CIFAR-100's shape, in
batches of 64, with crops after a padding of 4, flips, cross-entropy + 0.9 * `logit_kl` at T 4, and
SGD. With `--data ROOT`, as many images of CIFAR-100, in torchvision's layout; otherwise random
ones.

kdkit does what `kdkit train` does in an epoch, logs and the checkpoint at its end included, once by
the recipe's defaults and once with `fold_batchnorm: true` for the teacher. The script has
torchvision's transforms in a `DataLoader` with two workers, which are kept between epochs; it logs
and saves nothing. Start-up and one epoch go before on every side and do not count, nor does a
measurement on test data.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sides
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from kdkit.engine.evaluate import Judge
from kdkit.engine.turns import Stopwatch
from kdkit.runs.context import RunContext
from kdkit.runs.folder import RunFolder
from kdkit.runs.interrupts import StopRequest
from kdkit.runs.progress import Reporter
from kdkit.runs.shared import Alone
from kdkit.runs.stage import StageRun

# teacher, student: images of an epoch
PAIRS = {"resnet32x4-resnet8x4": 256, "resnet56-resnet20": 960}
BATCH = 64


def content(pair: str, options: argparse.Namespace, *, folded: bool) -> dict[str, Any]:
    teacher, student = pair.split("-")
    images = options.images or PAIRS[pair]
    synthetic = {
        "use": "synthetic",
        "train": images,
        "test": 16,
        "image_size": 32,
        "num_classes": 100,
    }
    dataset = {"use": "cifar100", "root": str(options.data)} if options.data else synthetic
    return {
        "data": {
            "dataset": dataset,
            "train_samples": images,
            "batch_size": BATCH,
            "augment": {"crop_padding": 4, "flip": 0.5},
        },
        "teacher": {"model": f"cifar/{teacher}", "fold_batchnorm": folded},
        "student": {"model": f"cifar/{student}"},
        "schedule": {"use": "offline"},
        "losses": [{"use": "cross_entropy"}, {"use": "logit_kl", "weight": 0.9, "temperature": 4}],
        "train": {
            "epochs": 1000,
            "evaluate_every": 1000,
            "optimizer": {
                "name": "momentum",
                "lr": 0.01,
                "weight_decay": 5e-4,
                "decay_norm_and_bias": True,
            },
            "device": "cpu",
        },
    }


def by_kdkit(one: sides.Opened, folder: Path) -> sides.Side:
    """An epoch of a run, with what belongs to it."""
    clock = Stopwatch()
    setting = RunContext(
        one.recipe,
        RunFolder(folder),
        Reporter(quiet=True),
        StopRequest(),
        one.trainer.accelerator,
        one.data,
        one.factory,
        clock,
        Alone(),
        Judge.of(one.recipe, one.data.info),
    )
    turns = StageRun(setting, 0, one.trainer).carry_out()
    next(turns)  # it gives way before the first batch

    def epoch() -> None:
        now = one.trainer.epoch
        with clock:
            next(place for place in turns if place[0] > now)

    return epoch


class Stand(Dataset[Any]):
    """In CIFAR-100's place where it is not there: the same kind of items."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: Any) -> None:
        self.pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def pictures(one: sides.Opened, images: int, options: argparse.Namespace) -> Dataset[Any]:
    """PIL images, augmented and normalised one by one."""
    from torchvision import datasets
    from torchvision import transforms as T

    spec = one.recipe.spec.student
    normalize = one.recipe.plugins.models["cifar"](spec, spec.model.split("/")[1]).normalization(
        one.student.module
    )
    transform = T.Compose(
        [
            T.RandomCrop(32, padding=4),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(normalize.mean, normalize.std),
        ]
    )
    if options.data:
        return Subset(
            datasets.CIFAR100(options.data, train=True, transform=transform), range(images)
        )
    held = one.recipe.plugins.datasets["synthetic"](one.recipe.spec.data.dataset).split("train")
    return Stand(held.images, held.labels, transform)


def by_hand(
    images: Dataset[Any], student: nn.Module, teacher: nn.Module, workers: int
) -> sides.Side:
    """The script."""
    student.train()
    teacher.eval()
    loader: DataLoader[Any] = DataLoader(
        images,
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def epoch() -> None:
        for inputs, labels in loader:
            with torch.no_grad():
                z_t = teacher(inputs)
            z_s = student(inputs)
            kl = F.kl_div(
                F.log_softmax(z_s / 4, 1),
                F.log_softmax(z_t / 4, 1),
                reduction="batchmean",
                log_target=True,
            )
            loss = F.cross_entropy(z_s, labels) + 0.9 * 16 * kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def rows(pair: str, options: argparse.Namespace, folder: Path) -> Iterator[list[str]]:
    plain, folded = (sides.opened(content(pair, options, folded=yes)) for yes in (False, True))
    spare = sides.opened(content(pair, options, folded=False))  # networks for the script
    images = options.images or PAIRS[pair]
    turns = {
        "by hand": by_hand(
            pictures(spare, images, options),
            spare.student.module,
            spare.factory.teacher().module,
            options.workers,
        ),
        "kdkit": by_kdkit(plain, folder / f"{pair}-plain"),
        "kdkit, folded teacher": by_kdkit(folded, folder / f"{pair}-folded"),
    }
    found = sides.in_turns(turns, options.rounds)
    seen = len(plain.data.train) * BATCH
    for name, costs in found.items():
        cost, ratio = sides.median(costs), sides.ratio(costs, found["by hand"])
        spread = sides.quartiles(costs, found["by hand"])
        yield [
            pair,
            name,
            f"{cost.cpu:.2f}",
            f"{cost.wall:.2f}",
            f"{seen / cost.wall:.0f}",
            f"{ratio.cpu:.3f}",
            f"{ratio.wall:.3f}",
            spread,
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with cifar-100-python")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--images", type=int, help="of an epoch (default: by pair)")
    parser.add_argument("--rounds", type=int, default=3, help="timed epochs of each side")
    parser.add_argument("--workers", type=int, default=2, help="of the script's loader")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch; CPU time is steadiest with one"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table = sides.table(
        "networks",
        "epoch",
        "CPU, s",
        "wall, s",
        "images/s",
        "CPU ratio",
        "wall ratio",
        "rounds (CPU)",
        words=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        for pair in options.pairs:
            for row in rows(pair, options, Path(folder)):
                table.add_row(*row)
    sides.show(table)


if __name__ == "__main__":
    main()
