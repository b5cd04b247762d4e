"""An epoch whose teacher answers from another process, against the slower of the two alone.

    OMP_NUM_THREADS=1 python benchmarks/served.py [--rounds 7]

`kdkit serve` runs on one core, the training on another; each with one thread. All sides train equal
students on the same batches, through kdkit's engine, and take turns. The first step of an epoch
waits for the teacher, which is part of the figures: real epochs have more steps.

    student  the losses on one answer that lies in memory: a step without a teacher
    teacher  the teacher's answers to the same batches, and nothing else
    here     the teacher answers in the training process
    served   it answers from the other process, asked ahead

CPU: the seconds that each process computes. With a core each, a served step takes as long as the
busier of the two processes; that, divided by the slower of student and teacher, is what serving
costs where the cores are free. Wall: by the clock, which counts waiting for the other process, and
for a core where other programs want it too.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import sides
import torch

from kdkit.cache import wire
from kdkit.cache.opening import open_answers
from kdkit.data.loaders import Data
from kdkit.recipe import Recipe
from kdkit.runs.networks import ModelFactory

MAPS = {
    "use": "at",
    "weight": 1000,
    "layers": [{"student": name, "teacher": name} for name in ("layer2", "layer3")],
}
PAIRS: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "resnet56, resnet20": ("resnet56", "resnet20", []),
    "resnet110, resnet20": ("resnet110", "resnet20", []),
    "resnet56, resnet20, two maps": ("resnet56", "resnet20", [MAPS]),
}


def content(pair: str, options: argparse.Namespace, at: str | None = None) -> dict[str, Any]:
    teacher, student, losses = PAIRS[pair]
    return {
        "data": {
            "dataset": {
                "use": "synthetic",
                "train": options.steps * options.batch_size,
                "test": 16,
                "image_size": options.image_size,
                "num_classes": 100,
            },
            "batch_size": options.batch_size,
            "augment": {"crop_padding": 4, "flip": 0.5},
        },
        "teacher": {"model": f"cifar/{teacher}", **({"at": at} if at else {})},
        "student": {"model": f"cifar/{student}"},
        "schedule": {"use": "offline"},
        "losses": [
            {"use": "cross_entropy"},
            {"use": "logit_kl", "weight": 0.9, "temperature": 4},
            *losses,
        ],
        "train": {"epochs": 1000, "optimizer": {"name": "momentum", "lr": 0.001}, "device": "cpu"},
    }


def served_epoch(pair: str, options: argparse.Namespace, at: str) -> sides.Side:
    def arrange(recipe: Recipe, data: Data, factory: ModelFactory) -> Data:
        teacher = factory.teacher()
        ahead = open_answers(recipe, "teacher", teacher, data.info, data.train)
        assert ahead is not None
        teacher.answers = functools.partial(ahead.answer, forward=teacher.forward)
        return replace(data, train=ahead.loader(data.train))

    return sides.opened(content(pair, options, at), arrange).epoch


def free_epoch(pair: str, options: argparse.Namespace) -> sides.Side:
    return sides.opened(content(pair, options), sides.one_answer).epoch


def asked_epoch(one: sides.Opened) -> sides.Side:
    """The batches and the teacher's answers to them."""
    teacher = one.factory.teacher()

    def epoch() -> None:
        with torch.no_grad():
            for batch in one.data.train.epoch(0):
                teacher(batch.inputs)

    return epoch


@contextlib.contextmanager
def serving(
    pair: str, options: argparse.Namespace, core: int | None
) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a server on a core of its own, and its process."""
    with tempfile.TemporaryDirectory() as folder:
        path = sides.write(content(pair, options), Path(folder))
        words = [sys.executable, "-Pu", "-m", "kdkit", "serve", str(path), "--port", "0"]
        with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
            try:
                if core is not None:
                    psutil.Process(server.pid).cpu_affinity([core])
                assert server.stdout is not None
                for line in server.stdout:
                    if found := re.search(r"served at (\S+)", line):
                        yield found[1], psutil.Process(server.pid)
                        return
                raise SystemExit("the server has ended before it served")
            finally:
                server.terminate()


def rows(pair: str, options: argparse.Namespace, core: int | None) -> Iterator[list[str]]:
    with serving(pair, options, core) as (at, server):
        here, asking = sides.opened(content(pair, options)), served_epoch(pair, options, at)
        answering: list[float] = []  # CPU seconds of the server in each epoch

        def served() -> None:
            before = sum(server.cpu_times()[:2])
            asking()
            answering.append(sum(server.cpu_times()[:2]) - before)

        turns = {
            "student": free_epoch(pair, options),
            "teacher": asked_epoch(here),
            "here": here.epoch,
            "served": served,
        }
        found = sides.in_turns(turns, options.rounds)
    # the server is a child of this process, and counts in its CPU time
    ours = [
        max(one.cpu - its, its)
        for one, its in zip(found["served"], answering[-options.rounds :], strict=True)
    ]
    for kind in ("CPU", "wall"):
        took = {
            name: [one.cpu if kind == "CPU" else one.wall for one in costs]
            for name, costs in found.items()
        }
        if kind == "CPU":
            took["served"] = ours
        slower = [max(pair) for pair in zip(took["student"], took["teacher"], strict=True)]
        ratios = [one / other for one, other in zip(took["served"], slower, strict=True)]
        middle = {name: statistics.median(costs) for name, costs in took.items()}
        yield [
            f"{pair}: {kind}",
            *(f"{1000 * seconds / options.steps:.1f}" for seconds in middle.values()),
            f"{middle['served'] / middle['here']:.2f}",
            f"{middle['served'] / max(middle['student'], middle['teacher']):.3f}",
            f"{min(ratios):.3f} - {max(ratios):.3f}",
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--steps", type=int, default=40, help="of an epoch")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    os.environ.setdefault(wire.TOKEN, secrets.token_hex())
    torch.set_num_threads(1)
    own = psutil.Process()
    cores = own.cpu_affinity()
    if len(cores) > 1:
        own.cpu_affinity(cores[-1:])
    table = sides.table(
        "ms a step", "student", "teacher", "here", "served", "/ here", "/ slower", "least, largest"
    )
    try:
        for pair in options.pairs:
            for row in rows(pair, options, cores[0] if len(cores) > 1 else None):
                table.add_row(*row)
    finally:
        own.cpu_affinity(cores)
    sides.show(table)


if __name__ == "__main__":
    main()
