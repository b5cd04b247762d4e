"""What the speed benchmarks share: sides that are timed in turns in one process, and a recipe's
trainer without its run.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from rich.console import Console
from rich.table import Table

from kdkit import recipe
from kdkit.contracts.records import Inputs, Outputs
from kdkit.data.loaders import Data
from kdkit.engine.accelerator import build_accelerator
from kdkit.engine.loop import train_epoch
from kdkit.engine.trainer import Trainer
from kdkit.models.tapped import TappedModel
from kdkit.randomness import reseed
from kdkit.recipe import Recipe
from kdkit.runs import opening, training
from kdkit.runs.networks import ModelFactory


@dataclass(frozen=True)
class Cost:
    """Seconds, or a ratio of them.

    Attributes:
        cpu: of all threads and of all worker processes, also those that have ended.
        wall: by the clock.
    """

    cpu: float
    wall: float

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.cpu - other.cpu, self.wall - other.wall)


Side = Callable[[], object]


def spent() -> Cost:
    """Since whenever; differences count."""
    ended = os.times()
    living = 0.0
    for worker in psutil.Process().children(recursive=True):
        try:
            times = worker.cpu_times()
        except psutil.NoSuchProcess:
            continue
        living += times.user + times.system
    return Cost(
        time.process_time() + ended.children_user + ended.children_system + living,
        time.perf_counter(),
    )


def cost(side: Side) -> Cost:
    before = spent()
    side()
    return spent() - before


def in_turns(sides: Mapping[str, Side], rounds: int, *, warm_up: int = 1) -> dict[str, list[Cost]]:
    """What each side costs in each round; another side begins in every round."""
    names = list(sides)
    for name in names * warm_up:
        sides[name]()
    found: dict[str, list[Cost]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(cost(sides[name]))
    return found


def median(costs: Sequence[Cost]) -> Cost:
    return Cost(
        statistics.median(one.cpu for one in costs), statistics.median(one.wall for one in costs)
    )


def ratio(ours: Sequence[Cost], theirs: Sequence[Cost]) -> Cost:
    """Of the medians."""
    one, other = median(ours), median(theirs)
    return Cost(one.cpu / other.cpu, one.wall / other.wall)


def quartiles(ours: Sequence[Cost], theirs: Sequence[Cost]) -> str:
    """Of the rounds' ratios of CPU time; of few rounds, the least and the largest."""
    found = sorted(a.cpu / b.cpu for a, b in zip(ours, theirs, strict=True))
    low, high = (found[0], found[-1]) if len(found) < 4 else statistics.quantiles(found, n=4)[::2]
    return f"{low:.3f} - {high:.3f}"


def table(*columns: str, words: int = 1) -> Table:
    """A table whose first columns are words."""
    made = Table(*columns, box=None)
    for column in made.columns[words:]:
        column.justify = "right"
    return made


def show(*parts: Table | str) -> None:
    """Print tables and sentences, and how busy the machine was."""
    console = Console(width=130, highlight=False)
    for part in parts:
        console.print(part)
    console.print(
        f"{torch.get_num_threads()} thread(s) of torch; load of the machine"
        f" {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores\n"
    )


def write(content: Mapping[str, Any], folder: Path, name: str = "recipe") -> Path:
    """A recipe's file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, **content}, sort_keys=False))
    return path


@dataclass(frozen=True)
class Opened:
    """A recipe whose first stage can be trained: no run folder, no checkpoints, no measurements."""

    recipe: Recipe
    trainer: Trainer
    factory: ModelFactory
    data: Data

    @property
    def student(self) -> TappedModel:
        return self.trainer.stage.students[0]  # type: ignore[return-value]

    def epoch(self) -> None:
        for _ in train_epoch(self.trainer):
            pass


def read(content: Mapping[str, Any]) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        return recipe.load(write(content, Path(folder)))


def opened(
    content: Mapping[str, Any],
    arrange: Callable[[Recipe, Data, ModelFactory], Data] = lambda _, data, __: data,
) -> Opened:
    """The recipe, ready to train.

    Args:
        content: of the recipe.
        arrange: may change the data, and what the factory gives, before the losses are set up.
    """
    loaded = read(content)
    accelerator = build_accelerator(loaded.spec.train)
    factory_data = opening.open_data(loaded, accelerator)
    factory = ModelFactory(loaded, factory_data.info, {}, device=accelerator.device)
    data = arrange(loaded, factory_data, factory)
    reseed(loaded.spec.seed, "stage", 0)
    stage = next(
        iter(
            loaded.plugins.schedules[loaded.spec.schedule.use](loaded.spec.schedule).stages(factory)
        )
    )
    return Opened(
        loaded, training.build_trainer(loaded, data, factory, accelerator, 0, stage), factory, data
    )


def one_answer(recipe: Recipe, data: Data, factory: ModelFactory) -> Data:
    """For `opened`: the teacher gives its first answer again and again, which takes no time."""
    teacher = factory.teacher()
    known: list[Outputs] = []

    def answer(inputs: Inputs) -> Outputs:
        if not known:
            with torch.no_grad():
                known.append(teacher.forward(inputs))
        return known[0]

    teacher.answers = answer
    return data
