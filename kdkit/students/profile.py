"""The costs of a network: parameters, multiply-accumulates, file size, and inference time."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from kdkit.contracts.inputs import Shape, first_tensor, kind_of, random_inputs
from kdkit.contracts.records import Inputs
from kdkit.contracts.schedule import Model
from kdkit.errors import ModelError
from kdkit.models.compressing import parameters_of
from kdkit.models.devices import device_of
from kdkit.models.freezing import in_eval_mode
from kdkit.runs.scoring import weights

WARM_UP = 5  # calls before any is counted
RUNS = 100
SECONDS = 5.0  # time limit per model and batch size, after which MIN_RUNS are enough
MIN_RUNS = 10


@dataclass(frozen=True)
class Latency:
    """Durations of single answers, ascending, in seconds."""

    batch: int
    seconds: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Return the time in seconds within which that share was done, by nearest rank."""
        rank = -(-len(self.seconds) * percent // 100)
        return self.seconds[max(0, int(rank) - 1)]

    @property
    def throughput(self) -> float:
        """Return the images per second at the median."""
        return self.batch / statistics.median(self.seconds)


@dataclass(frozen=True)
class Profile:
    """The costs of one network.

    Attributes:
        parameters: learnable numbers.
        macs: multiply-accumulates per image, of convolutions, matrix products and attention.
        bytes: size of its weights as a safetensors file.
        latencies: one for each batch size.
    """

    parameters: int
    macs: int
    bytes: int
    latencies: tuple[Latency, ...]


def measure(
    model: Model,
    shape: Shape,
    batch_sizes: Sequence[int] = (1,),
    *,
    runs: int = RUNS,
    seconds: float = SECONDS,
) -> Profile:
    """Measure the costs of a model for samples of a shape, on its device, by its own call.

    Raises:
        ModelError: it cannot take such images.
    """
    return measure_together([(model, shape)], batch_sizes, runs=runs, seconds=seconds)[0]


def measure_together(
    models: Sequence[tuple[Model, Shape]],
    batch_sizes: Sequence[int] = (1,),
    *,
    runs: int = RUNS,
    seconds: float = SECONDS,
) -> list[Profile]:
    """Measure the costs of several models, timed in turns, so that other load hits all.

    Args:
        models: each with the shape of its inputs.
        batch_sizes: images per answer.
        runs: answers that are timed, of each model and batch size.
        seconds: time limit for each model and batch size; at least `MIN_RUNS` answers are timed.

    Raises:
        ModelError: a model cannot take such images.
    """
    with in_eval_mode(*(model.module for model, _ in models)), torch.no_grad():
        costs = [_count(model, shape) for model, shape in models]
        # the limit of all models together, as they are timed in turns
        latencies = [_time(models, batch, runs, seconds * len(models)) for batch in batch_sizes]
        return [
            Profile(*cost, latencies=tuple(by_batch[i] for by_batch in latencies))
            for i, cost in enumerate(costs)
        ]


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Limit torch to that number of CPU threads inside the block (None: unchanged)."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _count(model: Model, shape: Shape) -> tuple[int, int, int]:
    """Count parameters, multiply-accumulates and bytes."""
    images = _images(model, shape, 1)
    try:
        with FlopCounterMode(display=False) as counter:
            model(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ModelError(
            f"{type(model.module).__name__} cannot take {kind_of(shape)} {shape}:"
            f" {' '.join(str(error).split())}"
        ) from error
    return (
        parameters_of(model.module),
        counter.get_total_flops() // 2,  # a multiply-accumulate is two operations
        len(weights(model)),
    )


def _time(
    models: Sequence[tuple[Model, Shape]], batch: int, runs: int, seconds: float
) -> list[Latency]:
    inputs = [_images(model, shape, batch) for model, shape in models]
    durations: list[list[float]] = [[] for _ in models]
    began = 0.0
    # the first calls allocate memory and choose kernels
    for turn in range(-WARM_UP, runs):
        began = time.perf_counter() if turn == 0 else began
        if turn >= min(MIN_RUNS, runs) and time.perf_counter() - began > seconds:
            break
        # the order rotates, so that no model always follows the same one
        order = range(len(models)) if turn % 2 else range(len(models) - 1, -1, -1)
        for i in order:
            duration = _timed(models[i][0], inputs[i])
            if turn >= 0:
                durations[i].append(duration)
    return [Latency(batch, tuple(sorted(row))) for row in durations]


def _timed(model: Model, images: Inputs) -> float:
    device = first_tensor(images).device
    # a GPU works through its queue after the call has returned
    _wait(device)
    began = time.perf_counter()
    model(images)
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _images(model: Model, shape: Shape, batch: int) -> Inputs:
    return random_inputs(shape, batch, device_of(model.module))
