"""The training loop of a stage, from its first batch to its last checkpoint.

All other parts are called from here. This module knows no algorithm, task or file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

from kdkit.contracts.records import Batch
from kdkit.contracts.schedule import Moment
from kdkit.engine.capture import Numbers
from kdkit.engine.objective import Value
from kdkit.engine.trainer import Trainer, batches
from kdkit.engine.turns import Place, Turns
from kdkit.models.freezing import rest
from kdkit.randomness import reseed


class Watcher(Protocol):
    """The work of a run besides the training steps of a stage: logging, measuring and saving."""

    @property
    def finished(self) -> bool:
        """True if no epoch is left, or if validation has not improved for long enough."""

    @property
    def place(self) -> Place:
        """The batch that the next step begins with."""

    def begin_epoch(self) -> None: ...

    def after_step(self, values: Sequence[Value]) -> None:
        """Log and save if due, and stop if a signal requests it."""

    def measure(self) -> Turns[None]:
        """Score the students if due, and keep the best ones so far."""

    def end_epoch(self) -> None:
        """Set the learning rate from the measured scores, log, save."""


def train_stage(trainer: Trainer, run: Watcher) -> Turns[None]:
    """Train a stage from its current place to its end.

    Yields the place before each step, and before each batch that is measured.
    """
    while not run.finished:
        run.begin_epoch()
        steps = train_epoch(trainer)
        while True:
            # Runs side by side share batches and teachers' answers: all take a step before one
            # takes the next.
            yield run.place
            if (values := next(steps, None)) is None:
                break
            run.after_step(values)
        yield from run.measure()
        # Last, so that resuming from the checkpoint repeats nothing.
        run.end_epoch()


def train_epoch(trainer: Trainer) -> Iterator[list[Value]]:
    """Train on the rest of the epoch; after each step, yield the losses of its batches."""
    trainer.learner.train()
    if trainer.stage.training.train is not None:
        # Frozen modules must not update their batch statistics either.
        for network in (*trainer.learner.students, *trainer.learner.objectives):
            rest(network)
    # Batches follow from (seed, epoch, number): an epoch that was interrupted begins in its middle.
    size = trainer.spec.accumulate
    coming = batches(trainer.loader, trainer.stage, trainer.epoch, start=trainer.step * size)
    while group := list(itertools.islice(coming, size)):
        yield optimize(trainer, group)
    trainer.epoch, trainer.step = trainer.epoch + 1, 0
    trainer.stage.after_epoch(trainer.moment)


def optimize(trainer: Trainer, group: Sequence[Batch]) -> list[Value]:
    """Do one optimizer step on the mean over the group's samples."""
    # All random numbers of a step follow from its place, so nothing before it can shift them.
    reseed(trainer.seed, trainer.stage.name, trainer.steps, trainer.accelerator.process_index)
    if trainer.stage.prepare is not None:
        group = [trainer.stage.prepare(batch, trainer.moment) for batch in group]
    # The work of the device: a GPU may repeat a step that it has recorded.
    values = trainer.take(partial(learn, trainer), group, trainer.moment, trainer.numbers)
    trainer.step += 1
    for updater in trainer.updaters:
        updater.advance(trainer.steps)
    if trainer.stage.buffers:
        # Copy equal buffers into frozen copies in all processes, as a checkpoint stores them.
        trainer.synchronise()
    trainer.stage.after_step(trainer.moment)
    return values


def learn(trainer: Trainer, group: Sequence[Batch], now: Moment, numbers: Numbers) -> list[Value]:
    """Do the device's work of a step; all that changes from step to step is an argument."""
    values: list[Value] = []
    samples = sum(len(batch.labels) for batch in group)
    for number, batch in enumerate(group, 1):
        # Gradients are averaged over the processes once a step, not once a batch.
        with trainer.averaging(last=number == len(group)):
            # One forward of one module does all that needs gradients: the schedule's step shows
            # the batch to students and teachers, and each lesson is valued by the losses.
            total, found = trainer.forward(batch, now, numbers.ramps)
            # A smaller last batch counts for the samples that it has.
            share = len(batch.labels) / samples
            values += trainer.backward(total, found, share)
    trainer.combine()
    # Each student has an optimizer of its own: clip, step, clear the gradients.
    for updater, rates in zip(trainer.updaters, numbers.rates, strict=True):
        updater.update(rates, trainer.scaler)
    if trainer.scaler is not None:
        trainer.scaler.update()
    trainer.move_averages(numbers.shares)
    return values
