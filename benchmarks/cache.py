"""An epoch that reads the teacher's answers from a cache, against training the student without
any teacher.

    python benchmarks/cache.py [--rounds 3]

All sides train equal students on the same images with crops and flips, through kdkit's engine. The
figures are for whole epochs; start-up, logs and checkpoints are left out.

    alone    cross-entropy only, no teacher
    live     the teacher answers every batch
    written  the first epoch of a cache (`views: 1`): asks the teacher and keeps what it says; every
    timed one begins with an empty cache read     an epoch from a full cache free     the same
    losses on one answer that lies in memory: what they cost themselves; read / free is what reading
    costs

logits: cross-entropy + `logit_kl`. logits + maps: also `at` on two stages; the cache then keeps
both maps.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sides
import torch

from kdkit.cache.opening import open_cache
from kdkit.cache.teacher import TeacherCache
from kdkit.data.loaders import Data
from kdkit.recipe import Recipe
from kdkit.runs.networks import ModelFactory

KINDS: dict[str, list[dict[str, Any]]] = {
    "logits": [{"use": "logit_kl", "temperature": 4}],
    "logits + maps": [
        {"use": "logit_kl", "temperature": 4},
        {
            "use": "at",
            "weight": 1000,
            "layers": [{"student": name, "teacher": name} for name in ("layer2", "layer3")],
        },
    ],
}


def network(*channels: int, blocks: int) -> dict[str, Any]:
    return {
        "model": "resnet18",
        "stem": "small",
        "args": {"layers": [blocks] * 4, "channels": list(channels), "in_chans": 3},
    }


def content(
    kind: str | None, options: argparse.Namespace, cache: Path | None = None
) -> dict[str, Any]:
    """The recipe of the student alone, or with a teacher; with a cache where there is a folder
    for it.
    """
    teaches = {"teacher": network(32, 64, 128, 256, blocks=2), "schedule": {"use": "offline"}}
    if cache:
        teaches["teacher"]["cache"] = {"views": 1, "what": "taps", "dir": str(cache)}
    return {
        "data": {
            "dataset": {
                "use": "synthetic",
                "train": options.images,
                "test": 16,
                "image_size": options.image_size,
                "num_classes": 100,
            },
            "batch_size": options.batch_size,
            "augment": {"crop_padding": 4, "flip": 0.5},
        },
        "student": network(16, 32, 64, 128, blocks=1),
        **(teaches if kind else {"schedule": {"use": "supervised"}}),
        "losses": [{"use": "cross_entropy"}, *(KINDS[kind] if kind else [])],
        "train": {"epochs": 1000, "optimizer": {"name": "momentum", "lr": 0.001}, "device": "cpu"},
    }


def cached(
    kind: str, options: argparse.Namespace, folder: Path
) -> tuple[sides.Opened, TeacherCache]:
    """The recipe with its teacher's cache, empty."""
    found: list[TeacherCache] = []

    def arrange(recipe: Recipe, data: Data, factory: ModelFactory) -> Data:
        teacher = factory.teacher()
        cache = open_cache(recipe, "teacher", teacher, data.info, data.train)
        assert cache is not None
        teacher.answers = functools.partial(cache.answer, forward=teacher.forward)
        found.append(cache)
        return replace(data, train=cache.loader(data.train))

    return sides.opened(content(kind, options, folder), arrange), found[0]


def free(kind: str, options: argparse.Namespace) -> sides.Opened:
    """The recipe with a teacher that has one answer."""
    return sides.opened(content(kind, options), sides.one_answer)


def written(kind: str, options: argparse.Namespace, folder: Path, rounds: int) -> sides.Side:
    """First epochs, each with an empty cache; they are opened beforehand."""
    empty = iter([cached(kind, options, folder / f"empty{number}") for number in range(rounds)])

    def epoch() -> None:
        one, cache = next(empty)
        one.epoch()
        cache.store.close()

    return epoch


def rows(
    kind: str, options: argparse.Namespace, folder: Path
) -> tuple[list[str], list[str], list[str]]:
    read, cache = cached(kind, options, folder / "read")
    read.epoch()  # which fills it
    turns: dict[str, sides.Side] = {
        "alone": sides.opened(content(None, options)).epoch,
        "live": sides.opened(content(kind, options)).epoch,
        "written": written(kind, options, folder, options.rounds + 1),
        "read": read.epoch,
        "free": free(kind, options).epoch,
    }
    found = sides.in_turns(turns, options.rounds)
    cache.store.close()
    seconds = [f"{sides.median(found[name]).cpu:.2f}" for name in turns]
    cpu = [f"{sides.ratio(found[name], found['alone']).cpu:.3f}" for name in turns]
    wall = [f"{sides.ratio(found[name], found['alone']).wall:.3f}" for name in turns]
    reading = sides.ratio(found["read"], found["free"])
    return (
        [f"{kind}: CPU, s", *seconds, ""],
        ["  of alone, CPU", *cpu, f"{reading.cpu:.3f}"],
        ["  of alone, wall", *wall, f"{reading.wall:.3f}"],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch; CPU time is steadiest with one"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table = sides.table(
        "one epoch",
        "student alone",
        "teacher live",
        "cache written",
        "cache read",
        "answers free",
        "read / free",
    )
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(kind, options, Path(folder)):
                table.add_row(*row)
    sides.show(table)


if __name__ == "__main__":
    main()
