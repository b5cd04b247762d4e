"""Records the device's work of an optimizer step once, and repeats it: on a GPU, as a CUDA graph.

Small networks leave a GPU idle while Python launches one small kernel after the other. A recorded
step is launched as a whole. It repeats the same kernels on the same memory, so all that changes
from step to step must reach it through memory too:

- the batches are copied into the tensors that were recorded;
- learning rates, ramps and the decay of averages are numbers in tensors (`Numbers`);
- random numbers come from the device's generator, which is seeded before each step as always;
- answers from a cache, or from a teacher that several runs share, are asked for before the step
  (`kdkit.models.outside`).

The first steps of each shape run as they are, and the second is watched: whatever a recorded step
would freeze (a value that the host reads, random numbers of the host, a plain attribute that
changes) keeps the stage from being recorded, and the reason is told.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdkit.contracts.records import MASK, Batch, Inputs, Outputs, tensors
from kdkit.contracts.schedule import Moment
from kdkit.engine.graphs import Device, NotRecordable, Recorder
from kdkit.engine.objective import Value
from kdkit.engine.watch import Asked, SeenMoment, Watch, place_of, within
from kdkit.models import outside

PLAIN_STEPS = 2
"""Steps of each shape that run before one is recorded: optimizers, libraries and plugins set
themselves up in the first; the second is watched.
"""
NEVER = 1 << 62  # calls
MOST_RECORDS = 16
"""Shapes of a batch that are recorded: texts may have many, and each record holds memory."""


@dataclass
class Numbers:
    """The numbers of a step that change from one step to the next.

    Attributes:
        ramps: for each objective, the ramped options by (loss, option).
        rates: for each updater, the learning rate of each group of parameters.
        decays: for each average of weights, its decay (None: it has no warm-up).
    """

    ramps: Sequence[Mapping[tuple[str, str], Any]]
    rates: Sequence[Sequence[Any]]
    decays: Sequence[Any]

    def map(self, change: Callable[[float], Any]) -> Numbers:
        """Return the same numbers with a function applied to each."""
        return Numbers(
            [{key: change(value) for key, value in ramps.items()} for ramps in self.ramps],
            [[change(rate) for rate in rates] for rates in self.rates],
            [None if decay is None else change(decay) for decay in self.decays],
        )

    def listed(self) -> list[Any]:
        """Return all numbers in one order."""
        found: list[Any] = []
        self.map(found.append)
        return found


class Learn(Protocol):
    """The device's work of a step: gradients, update, averages."""

    def __call__(
        self, batches: Sequence[Batch], moment: Moment, numbers: Numbers, /
    ) -> list[Value]: ...


Take = Callable[[Learn, Sequence[Batch], Moment, Numbers], list[Value]]
"""Takes a step: as it is, or by repeating a recorded one."""


Key = tuple[Hashable, int | None]
"""The shapes of a step's batches and, where the schedule reads it, the epoch."""


class Plain:
    """Takes every step as it is."""

    def __call__(
        self, learn: Learn, batches: Sequence[Batch], moment: Moment, numbers: Numbers
    ) -> list[Value]:
        return learn(batches, moment, numbers)


@dataclass
class Record:
    """A recorded step: the tensors that it reads, and those that it leaves."""

    recorder: Recorder
    batches: list[Batch]
    numbers: Numbers
    asked: list[Asked]
    written: list[float]
    values: list[Value] = field(default_factory=list)
    terms: Tensor | None = None
    _next: int = 0

    def ask(self, answer: outside.Answer, inputs: Inputs) -> Outputs:
        if place_of(inputs, self.batches) is None:
            return within(answer, inputs)
        held = self.asked[self._next].held
        self._next += 1
        assert held is not None
        return _masked(held, inputs)

    def record(self, learn: Learn, moment: Moment) -> list[Value]:
        """Take the step that the tensors hold."""

        def work() -> tuple[list[Value], Tensor]:
            values = learn(self.batches, moment, self.numbers)
            return values, torch.stack(_terms(values))

        with outside.recording(self):
            self.values, self.terms = self.recorder.record(work)
        return self._result()

    def repeat(self, batches: Sequence[Batch], numbers: Numbers) -> list[Value]:
        """Take a step with these batches and numbers."""
        for held, batch in zip(self.batches, batches, strict=True):
            _copy(tensors(held), tensors(batch))
        for asked in self.asked:
            assert asked.held is not None
            _copy(tensors(asked.held), tensors(asked.now(batches)))
        given = numbers.listed()
        for tensor, value, old in zip(self.numbers.listed(), given, self.written, strict=True):
            # most learning rates stay the same for many steps
            if value != old:
                tensor.fill_(value)
        self.written = given
        self.recorder.replay()
        return self._result()

    def _result(self) -> list[Value]:
        """Return the values of the last step, in memory that the next one does not overwrite."""
        assert self.terms is not None
        terms = iter(self.terms.clone().unbind())
        return [
            Value(
                next(terms),
                {name: next(terms) for name in value.terms},
                {name: next(terms) for name in value.weighted},
                value.samples,
            )
            for value in self.values
        ]


class Captured:
    """Takes the first steps of a stage as they are, then records one and repeats it.

    Args:
        device: the kind of device.
        holders: all that may hold state between steps: modules, functions, schedules.
        say: called with the reason if the stage cannot be recorded.
    """

    def __init__(
        self, device: Device, holders: Sequence[object], say: Callable[[str], None]
    ) -> None:
        self.reason: str | None = None
        self.records: dict[Key, Record] = {}
        self._device = device
        self._holders = holders
        self._say = say
        self._steps: dict[Hashable, int] = {}  # by shape
        self._asked: dict[Hashable, list[Asked]] = {}  # by shape
        self._reads_epoch = False

    def __call__(
        self, learn: Learn, batches: Sequence[Batch], moment: Moment, numbers: Numbers
    ) -> list[Value]:
        if self.reason is not None:
            return learn(batches, moment, numbers)
        shape = tuple((tuple(x.shape), x.dtype) for batch in batches for x in tensors(batch))
        key = (shape, moment.epoch if self._reads_epoch else None)
        if key in self.records:
            return self.records[key].repeat(batches, numbers)
        steps = self._steps[shape] = self._steps.get(shape, 0) + 1
        if steps == PLAIN_STEPS:
            return self._watched(shape, learn, batches, moment, numbers)
        if self._reads_epoch and steps > PLAIN_STEPS:
            # those of earlier epochs do not come again
            self.records = {known: one for known, one in self.records.items() if known[1] == key[1]}
        if steps < PLAIN_STEPS or len(self.records) >= MOST_RECORDS:
            return learn(batches, moment, numbers)
        return self._recorded(key, learn, batches, moment, numbers)

    def _watched(
        self,
        shape: Hashable,
        learn: Learn,
        batches: Sequence[Batch],
        moment: Moment,
        numbers: Numbers,
    ) -> list[Value]:
        watch, seen = Watch(self._device, self._holders, batches), SeenMoment(moment)
        values = watch.look(lambda: learn(batches, seen, numbers))
        if "step" in seen.read:
            watch.reasons.append("the schedule reads the number of the step")
        self._reads_epoch |= "epoch" in seen.read
        self._asked[shape] = watch.asked
        if watch.reasons:
            self._refuse(watch.reasons[0])
        return values

    def _recorded(
        self,
        key: Key,
        learn: Learn,
        batches: Sequence[Batch],
        moment: Moment,
        numbers: Numbers,
    ) -> list[Value]:
        device = batches[0].labels.device
        asked = [
            replace(one, held=one.now(batches).map(torch.clone)) for one in self._asked[key[0]]
        ]
        record = Record(
            self._device.recorder(),
            [batch.map(torch.clone) for batch in batches],
            numbers.map(lambda value: torch.tensor(value, dtype=torch.float32, device=device)),
            asked,
            numbers.listed(),
        )
        try:
            values = record.record(learn, moment)
        except NotRecordable as error:
            self._refuse(str(error))
            for holder in self._holders:
                if isinstance(holder, nn.Module):
                    # gradients of the capture hold no values
                    holder.zero_grad(set_to_none=True)
            return learn(batches, moment, numbers)
        self.records[key] = record
        return values

    def _refuse(self, reason: str) -> None:
        self.reason = reason
        self.records.clear()
        self._say(f"each step is launched kernel by kernel (train.capture): {reason}")


def holders(trainer: Any) -> list[object]:
    """Return all that may hold state between the steps of a stage."""
    return [trainer.learner, trainer.stage.step]


class Repeated:
    """A frozen network's answer, recorded for each shape of its inputs and repeated."""

    def __init__(self, answer: outside.Answer, device: Device) -> None:
        self.plain = answer
        self._device = device
        self._calls: dict[Hashable, int] = {}
        self._records: dict[Hashable, tuple[Recorder, list[Tensor], Outputs]] = {}

    def __call__(self, inputs: Inputs) -> Outputs:
        given = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
        shape = tuple((tuple(x.shape), x.dtype) for x in given)
        if shape in self._records:
            recorder, held, answer = self._records[shape]
            _copy(held, given)
            recorder.replay()
            # several batches of a step, and of other runs, are answered before any is read
            return _masked(answer.map(torch.clone), inputs)
        calls = self._calls[shape] = self._calls.get(shape, 0) + 1
        if calls <= PLAIN_STEPS or len(self._records) >= MOST_RECORDS:
            return self.plain(inputs)
        held = [x.clone() for x in given]
        shown = held[0] if isinstance(inputs, Tensor) else dict(zip(inputs, held, strict=True))
        recorder = self._device.recorder()
        try:
            answer = recorder.record(lambda: self.plain(shown))
        except NotRecordable:
            self._calls[shape] = -NEVER
            return self.plain(inputs)
        self._records[shape] = recorder, held, answer
        return _masked(answer.map(torch.clone), inputs)


def _masked(answer: Outputs, inputs: Inputs) -> Outputs:
    """Return a recorded answer with the mask of these inputs: it belongs to the batch."""
    if isinstance(inputs, Mapping) and MASK in inputs:
        return answer.masked(inputs[MASK].bool())
    return answer


def _copy(held: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    for tensor, value in zip(held, given, strict=True):
        tensor.copy_(value, non_blocking=True)


def _terms(values: Sequence[Value]) -> list[Tensor]:
    return [
        term.float()
        for value in values
        for term in (value.total, *value.terms.values(), *value.weighted.values())
    ]
