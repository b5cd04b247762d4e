"""What a frozen teacher costs: its forward up to the deepest tap, and the whole step with its
batch normalisation folded.

    python benchmarks/teacher.py [--rounds 15]

stages: a resnet34 at 64 x 64 pixels, observed at one of its four stages by kdkit, which stops
behind it when no loss reads the logits; against the whole forward of the same network in plain
torch. Both sides are unfolded, so that nothing else differs.

step: a whole training step of kdkit (cross-entropy and `logit_kl`) at 32 x 32 pixels with
`teacher.fold_batchnorm: true`; against the same step of kdkit without it, and against the same step
in plain torch, unfolded. All sides train equal networks on one batch from memory with the same
optimizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import sides
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkit.engine.loop import optimize
from kdkit.models.tapped import TappedModel

STAGES = ["layer1", "layer2", "layer3", "layer4"]
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "small resnet18s": (
        {
            "model": "resnet18",
            "stem": "small",
            "args": {"layers": [2] * 4, "channels": [32, 64, 128, 256], "in_chans": 3},
        },
        {
            "model": "resnet18",
            "stem": "small",
            "args": {"layers": [1] * 4, "channels": [16, 32, 64, 128], "in_chans": 3},
        },
    ),
    "networks of make demo": (
        {
            "model": "resnet18",
            "stem": "small",
            "args": {"layers": [1] * 4, "channels": [16, 32, 64, 128], "in_chans": 3},
        },
        {
            "model": "resnet18",
            "stem": "small",
            "args": {"layers": [1] * 4, "channels": [4, 8, 16, 32], "in_chans": 3},
        },
    ),
    "resnet32x4, resnet8x4": ({"model": "cifar/resnet32x4"}, {"model": "cifar/resnet8x4"}),
}
MEAN, STD = (
    torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1),
    torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1),
)


def stages(options: argparse.Namespace) -> None:
    from timm import create_model

    torch.manual_seed(0)
    network = create_model("resnet34", num_classes=100).eval().requires_grad_(False)
    images = torch.rand(options.batch_size, 3, options.tap_size, options.tap_size)
    tapped = {name: TappedModel(network, [name], needs_logits=False) for name in STAGES}
    turns: dict[str, sides.Side] = {"whole": lambda: network(images)}
    turns |= {name: lambda model=model: model(images) for name, model in tapped.items()}
    with torch.no_grad():
        found = sides.in_turns(turns, options.rounds, warm_up=2)
    table = sides.table(
        f"resnet34, {options.tap_size} px", "CPU, ms", "of the whole", "wall", "quartiles (CPU)"
    )
    table.add_row(
        "whole, plain torch", f"{1000 * sides.median(found['whole']).cpu:.1f}", "1", "1", ""
    )
    for number, name in enumerate(STAGES, 1):
        ratio = sides.ratio(found[name], found["whole"])
        cpu = 1000 * sides.median(found[name]).cpu
        table.add_row(
            f"tap at stage {number} of 4",
            f"{cpu:.1f}",
            f"{ratio.cpu:.3f}",
            f"{ratio.wall:.3f}",
            sides.quartiles(found[name], found["whole"]),
        )
    sides.show(table)


def by_engine(pair: str, options: argparse.Namespace, *, folded: bool) -> sides.Opened:
    teacher, student = PAIRS[pair]
    size = options.image_size
    return sides.opened(
        {
            "data": {
                "dataset": {
                    "use": "synthetic",
                    "train": options.batch_size,
                    "test": 16,
                    "image_size": size,
                    "num_classes": 100,
                },
                "batch_size": options.batch_size,
            },
            "teacher": {**teacher, "fold_batchnorm": folded},
            "student": student,
            "schedule": {"use": "offline"},
            "losses": [
                {"use": "cross_entropy"},
                {"use": "logit_kl", "weight": 0.9, "temperature": 4},
            ],
            "train": {
                "epochs": 1,
                "optimizer": {
                    "name": "momentum",
                    "lr": 1e-3,
                    "weight_decay": 5e-4,
                    "decay_norm_and_bias": True,
                },
                "device": "cpu",
            },
        }
    )


def by_hand(images: Tensor, labels: Tensor, student: nn.Module, teacher: nn.Module) -> sides.Side:
    """The step in plain torch, with weights of its own."""
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        normalised = (images - MEAN) / STD
        with torch.no_grad():
            z_t = teacher(normalised)
        z_s = student(normalised)
        kl = F.kl_div(
            F.log_softmax(z_s / 4, 1),
            F.log_softmax(z_t / 4, 1),
            reduction="batchmean",
            log_target=True,
        )
        (F.cross_entropy(z_s, labels) + 0.9 * 16 * kl).backward()
        optimizer.step()

    return step


def step(options: argparse.Namespace) -> None:
    table = sides.table(
        "step",
        "torch, ms",
        "kdkit",
        "folded",
        "folded / kdkit",
        "folded / torch",
        "wall",
        "quartiles folded / kdkit",
    )
    for pair in options.pairs:
        plain, folded = (by_engine(pair, options, folded=yes) for yes in (False, True))
        spare = by_engine(pair, options, folded=False)
        batch = next(iter(plain.data.train.epoch(0)))
        turns: dict[str, sides.Side] = {
            "plain": lambda one=plain, batch=batch: len(optimize(one.trainer, [batch])),
            "folded": lambda one=folded, batch=batch: len(optimize(one.trainer, [batch])),
            "torch": by_hand(
                batch.inputs, batch.labels, spare.student.module, spare.factory.teacher().module
            ),
        }
        for one in (plain, folded):
            one.trainer.learner.train()
        found = sides.in_turns(turns, options.rounds, warm_up=2)
        first, second = (
            sides.ratio(found["folded"], found["plain"]),
            sides.ratio(found["folded"], found["torch"]),
        )
        shown = [
            f"{1000 * sides.median(found[name]).cpu:.1f}" for name in ("torch", "plain", "folded")
        ]
        ratios = [f"{first.cpu:.3f}", f"{second.cpu:.3f}", f"{first.wall:.3f} / {second.wall:.3f}"]
        table.add_row(pair, *shown, *ratios, sides.quartiles(found["folded"], found["plain"]))
    sides.show(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"stages": stages, "step": step}
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tap-size", type=int, default=64, help="side of the images of resnet34")
    parser.add_argument("--image-size", type=int, default=32, help="side of the images of the step")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch; CPU time is steadiest with one"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for part in options.only:
        parts[part](options)


if __name__ == "__main__":
    main()
