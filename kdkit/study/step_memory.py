"""Measures the peak memory that a training step allocates."""

from __future__ import annotations

import gc
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from kdkit.engine.accelerator import build_accelerator
from kdkit.engine.loop import train_epoch
from kdkit.engine.setup import build_trainer
from kdkit.engine.trainer import Trainer
from kdkit.randomness import reseed
from kdkit.recipe import Recipe
from kdkit.runs import opening, training
from kdkit.runs.networks import ModelFactory

MEASURED = "kdkit: measured"  # label in the profiler's record


def step_memory(recipe: Recipe, folder: Path) -> int:
    """Measure the peak bytes that the second step of a recipe's first stage allocates, beyond those
    allocated before it.

    The first step creates the optimizer's state. It counts as allocated before, like weights and
    data; activations, gradients and temporary tensors count.

    Args:
        recipe: the recipe of the run.
        folder: its run folder; the runs of its teachers are next to it.
    """
    device = build_accelerator(recipe.spec.train).device
    steps: Iterator[object] | None = None

    def step() -> object:
        nonlocal steps
        # created inside the record: torch's profiler warns about freed blocks whose allocation it
        # did not see
        steps = steps or _steps(_trainer(recipe, folder))
        return next(steps)

    return peak_memory(step, device, warm_up=True)


def peak_memory(
    run: Callable[[], object], device: torch.device | None = None, *, warm_up: bool = False
) -> int:
    """Measure the peak bytes that a function allocates, beyond those allocated before.

    Args:
        run: the function to measure.
        device: the device to measure (default: the CPU).
        warm_up: call it once before measuring; what that leaves allocated is not counted.
    """
    return (
        _on_gpu(run, device, warm_up)
        if device is not None and device.type == "cuda"
        else _on_cpu(run, warm_up)
    )


def _on_gpu(run: Callable[[], object], device: torch.device, warm_up: bool) -> int:
    if warm_up:
        run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _on_cpu(run: Callable[[], object], warm_up: bool) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's own log
    gc.collect()  # or garbage of before is given back inside, which torch warns about
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        if warm_up:
            # recorded too: the profiler knows the size of a block that is given back only if it saw
            # it being taken
            run()
        with record_function(MEASURED):
            run()
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(str(Path(folder) / "trace.json"))
        # The trace is the only place where torch tells the time of each block: `key_averages` has
        # sums.
        events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    begins = next(event["ts"] for event in events if event["name"] == MEASURED)
    memory = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    before = sum(size for at, size in memory if at < begins)
    levels = itertools.accumulate((size for at, size in memory if at >= begins), initial=before)
    return int(max(levels) - before)


def _trainer(recipe: Recipe, folder: Path) -> Trainer:
    """Build the trainer of the first stage in the same way as a run."""
    accelerator = build_accelerator(recipe.spec.train)
    prepared = opening.open_data(recipe, accelerator)
    factory = ModelFactory(
        recipe,
        prepared.info,
        training.trained_teachers(recipe, folder, quiet=True),
        device=accelerator.device,
    )
    schedule = recipe.plugins.schedules[recipe.spec.schedule.use](recipe.spec.schedule)
    # As in a run: schedules draw the initial values of their own parts.
    reseed(recipe.spec.seed, "stage", 0)
    stage = next(iter(schedule.stages(factory)))
    return build_trainer(recipe, prepared, factory, accelerator, 0, stage)


def _steps(trainer: Trainer) -> Iterator[object]:
    """Yield one step after another, across epochs, as an epoch may have only one."""
    while True:
        yield from train_epoch(trainer)
