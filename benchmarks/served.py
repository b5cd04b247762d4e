"""An epoch whose teacher answers from another process, against the slower of the two alone.

    OMP_NUM_THREADS=1 python benchmarks/served.py [--rounds 7]

`kdkit serve` runs on one core, the training on another; each with one thread. All sides train equal
students on the same batches, through kdkit's engine, and take turns. The first step of an epoch
waits for the teacher, which is part of the figures: real epochs have more steps.

    student  the losses on one answer that lies in memory: a step without a teacher
    teacher  the teacher's answers to the same batches, and nothing else
    here     the teacher answers in the training process
    served   it answers from the other process, asked ahead

Each column is the wall time of a step; the last ones are served / here, and served / the slower of
student and teacher, with the quartiles of the rounds.
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
from kdkit.contracts.records import Inputs, Outputs
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
    known: list[Outputs] = []

    def arrange(recipe: Recipe, data: Data, factory: ModelFactory) -> Data:
        teacher = factory.teacher()

        def answer(inputs: Inputs) -> Outputs:
            if not known:
                with torch.no_grad():
                    known.append(teacher.forward(inputs))
            return known[0]

        teacher.answers = answer
        return data

    return sides.opened(content(pair, options), arrange).epoch


def asked_epoch(one: sides.Opened) -> sides.Side:
    """The batches and the teacher's answers to them."""
    teacher = one.factory.teacher()

    def epoch() -> None:
        with torch.no_grad():
            for batch in one.data.train.epoch(0):
                teacher(batch.inputs)

    return epoch


@contextlib.contextmanager
def serving(pair: str, options: argparse.Namespace, core: int | None) -> Iterator[str]:
    """The address of a server on a core of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = sides.write(content(pair, options), Path(folder))
        words = [sys.executable, "-Pu", "-m", "kdkit", "serve", str(path), "--port", "0"]
        server = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True)
        try:
            if core is not None:
                psutil.Process(server.pid).cpu_affinity([core])
            assert server.stdout is not None
            for line in server.stdout:
                if found := re.search(r"served at (\S+)", line):
                    yield found[1]
                    return
            raise SystemExit("the server has ended before it served")
        finally:
            server.terminate()
            server.wait()


def row(pair: str, options: argparse.Namespace, core: int | None) -> list[str]:
    with serving(pair, options, core) as at:
        here = sides.opened(content(pair, options))
        turns = {
            "student": free_epoch(pair, options),
            "teacher": asked_epoch(here),
            "here": here.epoch,
            "served": served_epoch(pair, options, at),
        }
        found = sides.in_turns(turns, options.rounds)
    took = {name: sides.median(costs).wall for name, costs in found.items()}
    slower = max(took["student"], took["teacher"])
    rounds = zip(found["student"], found["teacher"], found["served"], strict=True)
    ratios = [served.wall / max(one.wall, other.wall) for one, other, served in rounds]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return [
        pair,
        *(f"{1000 * seconds / options.steps:.1f}" for seconds in took.values()),
        f"{took['served'] / took['here']:.2f}",
        f"{took['served'] / slower:.3f}",
        f"{low:.3f} - {high:.3f}",
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
        "ms a step", "student", "teacher", "here", "served", "/ here", "/ slower", "quartiles"
    )
    try:
        for pair in options.pairs:
            table.add_row(*row(pair, options, cores[0] if len(cores) > 1 else None))
    finally:
        own.cpu_affinity(cores)
    sides.show(table)


if __name__ == "__main__":
    main()
