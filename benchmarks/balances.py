"""What each balance costs: CPU time and peak memory of a training step with it over those of the
same step without one.

    python benchmarks/balances.py [--rounds 9]

A step has three losses: cross-entropy, `logit_kl` and `hint`, whose adapter is learnt too. All
sides train equal networks on equal made-up images, with plain SGD, which `dot` requires; they take
turns, an epoch each. Peak memory is what one step allocates beyond what was there before,
activations and gradients included; a balance's own buffers are there before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import sides
import torch

from kdkit.engine.loop import train_epoch
from kdkit.recipe import registry
from kdkit.study.step_memory import peak_memory

STEPS = 2  # of an epoch
NONE = "none"
OPTIONS: dict[str, dict[str, Any]] = {
    "gradient_share": {"shares": {"logit_kl": 0.5, "hint": 0.2}},
    "dot": {"weight_decay": 5e-4},
}
RECIPE: dict[str, Any] = {
    "schedule": {"use": "offline"},
    "losses": [
        {"use": "cross_entropy"},
        {"use": "logit_kl"},
        {"use": "hint", "layers": [{"student": "stage3", "teacher": "stage3"}]},
    ],
    "train": {
        "epochs": 1000,
        "device": "cpu",
        "optimizer": {"name": "momentum", "lr": 1e-3, "momentum": 0, "weight_decay": 0},
    },
}


def content(balance: str, options: argparse.Namespace) -> dict[str, Any]:
    size, samples = options.image_size, STEPS * options.batch_size
    images = {"use": "synthetic", "train": samples, "image_size": size, "num_classes": 100}
    return {
        **RECIPE,
        "data": {"dataset": {**images, "test": 16}, "batch_size": options.batch_size},
        **{role: {"model": getattr(options, role)} for role in ("teacher", "student")},
        "balance": None if balance == NONE else {"use": balance, **OPTIONS.get(balance, {})},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {"rounds": 9, "batch-size": 64, "image-size": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--teacher", default="cifar/resnet56")
    parser.add_argument("--student", default="cifar/resnet20")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = [NONE, *sorted(registry.load().balances)]
    opened = {name: sides.opened(content(name, options)) for name in names}
    found = sides.in_turns({name: one.epoch for name, one in opened.items()}, options.rounds)
    peaks = {}
    for name, one in opened.items():
        steps = train_epoch(one.trainer)
        peaks[name] = peak_memory(lambda steps=steps: next(steps), warm_up=True)
    print("| balance | CPU, ms a step | / none | quartiles | peak memory, MiB | / none |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, costs in found.items():
        print(
            f"| {name} | {1000 * sides.median(costs).cpu / STEPS:.0f}"
            f" | {sides.ratio(costs, found[NONE]).cpu:.2f} | {sides.quartiles(costs, found[NONE])}"
            f" | {peaks[name] / 2**20:.1f} | {peaks[name] / peaks[NONE]:.2f} |"
        )
    sides.show(f"{options.teacher} teaches {options.student}, batches of {options.batch_size}")


if __name__ == "__main__":
    main()
