"""Segmentation: kdkit's loader of images with masks against torchvision's reference pipeline, and a
step against one written by hand.

    python benchmarks/segmentation.py [--images 64] [--steps 20]

Images and masks are files of 240 x 320 pixels. Both loaders scale image and mask by 0.5 to 2, crop
them to the images' size, mirror them or not, in two worker processes that are kept between epochs.
torchvision's side is its reference for segmentation with transforms v2 on tensors, which also
normalises in the workers; kdkit's normalises in the step. Both steps train one network by
cross-entropy and a KL divergence to a teacher, over the pixels that count.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sides
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from kdkit.data import loaders
from kdkit.data.loaders import TrainLoader
from kdkit.engine.accelerator import build_accelerator
from kdkit.engine.loop import optimize
from kdkit.models.normalization import NormalizationAdapter
from kdkit.runs import training
from kdkit.runs.networks import ModelFactory

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEIGHT, WIDTH, CLASSES, IGNORED = 240, 320, 11, 255
SCALE = (0.5, 2.0)
SMALL = {"encoder": "resnet10t", "args": {"channels": [8, 16, 32, 64], "stem_width": 8}}
LARGE = {"encoder": "resnet10t", "args": {"channels": [16, 32, 64, 128], "stem_width": 16}}


def lay_out(folder: Path, images: int) -> None:
    """Write smooth random images, and masks of blocks."""
    dice = np.random.default_rng(0)
    for part, count in (("train", images), ("test", 1)):
        for name in ("images", "masks"):
            (folder / part / name).mkdir(parents=True)
        for number in range(count):
            coarse = Image.fromarray(dice.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            coarse.resize((WIDTH, HEIGHT)).save(folder / part / "images" / f"{number:04}.jpg")
            blocks = dice.integers(0, CLASSES + 1, (6, 8), dtype=np.uint8)
            blocks[blocks == CLASSES] = IGNORED
            large = Image.fromarray(blocks).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
            large.save(folder / part / "masks" / f"{number:04}.png")


def recipe_of(folder: Path, options: argparse.Namespace) -> Any:
    return sides.read(
        {
            "data": {
                "dataset": {
                    "use": "mask_folder",
                    "root": str(folder),
                    "classes": [str(number) for number in range(CLASSES)],
                },
                "batch_size": options.batch_size,
                "joint_augment": {"scale": list(SCALE), "flip": 0.5},
                "workers": options.workers,
            },
            "student": {"model": "smp/unet", **SMALL},
            "teacher": {"model": "smp/unet", **LARGE},
            "schedule": {"use": "offline"},
            "losses": [{"use": "cross_entropy"}, {"use": "logit_kl", "temperature": 1}],
            "train": {"epochs": 1, "optimizer": {"name": "momentum", "lr": 1e-3}},
        }
    )


class Pairs(Dataset[Any]):
    """Images and masks as torchvision's VOCSegmentation hands them out."""

    def __init__(self, folder: Path, transform: Any) -> None:
        self.images = sorted((folder / "train" / "images").iterdir())
        self.masks = sorted((folder / "train" / "masks").iterdir())
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        from torchvision import tv_tensors

        image = Image.open(self.images[index]).convert("RGB")
        mask = tv_tensors.Mask(np.array(Image.open(self.masks[index])))
        return self.transform(image, mask)


def by_torchvision(folder: Path, options: argparse.Namespace) -> sides.Side:
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResize(int(SCALE[0] * HEIGHT), int(SCALE[1] * HEIGHT), antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomCrop(
                (HEIGHT, WIDTH),
                pad_if_needed=True,
                fill={tv_tensors.Mask: IGNORED, "others": 0},
            ),
            v2.ToDtype({torch.Tensor: torch.float, tv_tensors.Mask: torch.int64}, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    loader: DataLoader[Any] = DataLoader(
        Pairs(folder, transform),
        options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    return lambda: sum(len(masks) for _, masks in loader)


def by_kdkit(loader: TrainLoader) -> sides.Side:
    normalise, epochs = NormalizationAdapter(0.0, 1.0, MEAN, STD), iter(range(1_000_000))

    def epoch() -> int:
        return sum(len(normalise(batch.inputs)) for batch in loader.epoch(next(epochs)))

    return epoch


def steps(loaded: Any, prepared: loaders.Data) -> dict[str, sides.Side]:
    """A step of each side on one batch."""
    accelerator = build_accelerator(loaded.spec.train)
    factory = ModelFactory(loaded, prepared.info, {}, device=accelerator.device)
    stage = next(iter(loaded.plugins.schedules["offline"](loaded.spec.schedule).stages(factory)))
    trainer = training.build_trainer(loaded, prepared, factory, accelerator, 0, stage)
    trainer.learner.train()
    batch = next(iter(prepared.train.epoch(0)))
    other = ModelFactory(loaded, prepared.info, {}, device=accelerator.device)
    student, teacher = other.student().module.train(), other.teacher().module
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)

    def by_hand() -> int:
        optimizer.zero_grad()
        with torch.no_grad():
            z_t = teacher(batch.inputs)
        z_s = student(batch.inputs)
        labels = F.cross_entropy(z_s, batch.labels, ignore_index=IGNORED)
        p, q = z_s.log_softmax(1), z_t.log_softmax(1)
        divergence = F.kl_div(p, q, reduction="none", log_target=True).sum(1)
        counts = batch.labels != IGNORED
        (labels + (divergence * counts).sum() / counts.sum()).backward()
        optimizer.step()
        return 1

    return {"by hand": by_hand, "kdkit": lambda: len(optimize(trainer, [batch]))}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each loader")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each side")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch; CPU time is steadiest with one"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder, options.images)
        loaded = recipe_of(folder, options)
        prepared = loaders.prepare(
            loaded.spec.data, loaded.dataset(), loaded.task, seed=0, device=torch.device("cpu")
        )
        by_name = {
            "loader": (
                {
                    "by hand": by_torchvision(folder, options),
                    "kdkit": by_kdkit(prepared.train),
                },
                options.rounds,
            ),
            "step": (functools.partial(steps, loaded, prepared)(), options.steps),
        }
        table = sides.table(
            "what", "by hand, ms", "kdkit, ms", "ratio of wall time", "ratio of CPU time"
        )
        for what, (turns, rounds) in by_name.items():
            found = sides.in_turns(turns, rounds)
            hand, kdkit = sides.median(found["by hand"]), sides.median(found["kdkit"])
            ratio = sides.ratio(found["kdkit"], found["by hand"])
            table.add_row(
                what,
                f"{1000 * hand.wall:.1f}",
                f"{1000 * kdkit.wall:.1f}",
                f"{ratio.wall:.3f}",
                f"{ratio.cpu:.3f}",
            )
        sides.show(table)


if __name__ == "__main__":
    main()
