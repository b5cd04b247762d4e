"""Records the device's work of an optimizer step once, and repeats it: on a GPU, as a CUDA graph.

Small networks leave a GPU idle while Python launches one small kernel after the other. A recorded
step is launched as a whole. It repeats the same kernels on the same memory, so all that changes
from step to step must reach it through memory too:

- the batches are copied into the tensors that were recorded;
- learning rates, ramps and shares of averages are numbers in tensors (`Numbers`);
- random numbers come from the device's generator, which is seeded before each step as always;
- answers from a cache, or from a teacher that several runs share, are asked for before the step
  (`kdkit.models.outside`).

The first step of each shape runs as it is. The next two are watched: if they send the same
operations to the device, the following one is recorded, else none is, and the reason is told. Where
a stage has hooks of its own, one step of each epoch is compared again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdkit.contracts.records import MASK, Batch, Inputs, Outputs, tensors
from kdkit.contracts.schedule import Moment
from kdkit.engine.graphs import Device, NotRecordable, Recorder
from kdkit.engine.objective import Value
from kdkit.engine.watch import Asked, SeenMoment, Watch, place_of, within
from kdkit.models import outside

PLAIN_STEPS = 1
"""Steps of each shape that run unwatched: optimizers, libraries and plugins set themselves up."""
WATCHED_STEPS = 2
"""Steps that are traced after these."""
MOST_RECORDS = 16
"""Shapes of a batch that are recorded: texts may have many, and each record holds memory."""


@dataclass
class Numbers:
    """The numbers of a step that change from one step to the next.

    Attributes:
        ramps: for each objective, the ramped options by (loss, option).
        rates: for each updater, the learning rate of each group of parameters.
        shares: for each average of weights, the share of the new ones (None: it has no warm-up).
    """

    ramps: Sequence[Mapping[tuple[str, str], Any]]
    rates: Sequence[Sequence[Any]]
    shares: Sequence[Any]

    def map(self, change: Callable[[float], Any]) -> Numbers:
        """Return the same numbers with a function applied to each."""
        return Numbers(
            [{key: change(value) for key, value in ramps.items()} for ramps in self.ramps],
            [[change(rate) for rate in rates] for rates in self.rates],
            [None if share is None else change(share) for share in self.shares],
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


class Held:
    """The tensors from which recorded steps read the numbers that change."""

    def __init__(self, numbers: Numbers, device: torch.device) -> None:
        self.numbers = numbers.map(
            lambda value: torch.tensor(value, dtype=torch.float32, device=device)
        )
        self._written = numbers.listed()

    def write(self, numbers: Numbers) -> None:
        """Set the numbers of the next step."""
        given = numbers.listed()
        for tensor, value, old in zip(self.numbers.listed(), given, self._written, strict=True):
            # most learning rates stay the same for many steps
            if value != old:
                tensor.fill_(value)
        self._written = given


class Record:
    """A recorded step: the tensors that it reads, and those that it leaves.

    Args:
        recorder: records and repeats it.
        batches: those of the step that is recorded.
        asked: the answers from outside that it reads.
    """

    def __init__(
        self, recorder: Recorder, batches: Sequence[Batch], asked: Sequence[Asked]
    ) -> None:
        self._recorder = recorder
        self._batches = [batch.map(torch.clone) for batch in batches]
        self._asked = [replace(one, held=one.now(batches).map(torch.clone)) for one in asked]
        self._values: list[Value] = []
        self._terms: Tensor | None = None

    def ask(self, answer: outside.Answer, inputs: Inputs) -> Outputs:
        place = place_of(inputs, self._batches)
        if place is None:
            return within(answer, inputs)
        for one in self._asked:
            if one.place == place and one.answer == answer and one.held is not None:
                return _masked(one.held, inputs)
        raise NotRecordable("the step asks another teacher than the steps before it")

    def record(self, learn: Learn, moment: Moment, numbers: Numbers) -> list[Value]:
        """Take the step that the tensors hold.

        Raises:
            NotRecordable: it cannot be recorded, and was not taken.
        """

        def work() -> tuple[list[Value], Tensor]:
            values = learn(self._batches, moment, numbers)
            return values, torch.stack(_terms(values))

        with outside.recording(self):
            self._values, self._terms = self._recorder.record(work)
        return self._result()

    def repeat(self, batches: Sequence[Batch]) -> list[Value]:
        """Take a step with these batches."""
        for held, batch in zip(self._batches, batches, strict=True):
            _copy(tensors(held), tensors(batch))
        for one in self._asked:
            assert one.held is not None
            _copy(tensors(one.held), tensors(one.now(batches)))
        self._recorder.replay()
        return self._result()

    def _result(self) -> list[Value]:
        """Return the values of the last step, in memory that the next one does not overwrite."""
        assert self._terms is not None
        terms = iter(self._terms.clone().unbind())
        return [
            Value(
                next(terms),
                {name: next(terms) for name in value.terms},
                {name: next(terms) for name in value.weighted},
                value.samples,
            )
            for value in self._values
        ]


@dataclass
class Known:
    """What is known of the steps of one shape.

    Attributes:
        steps: how many were taken.
        epoch: in which the last one was watched.
        watch: the last one that was watched.
        record: the recorded one.
    """

    steps: int = 0
    epoch: int = 0
    watch: Watch | None = None
    record: Record | None = None


class Captured:
    """Takes the first steps of a stage as they are, then records one and repeats it.

    Args:
        device: the kind of device.
        say: called with the reason if the stage cannot be recorded.
        has_hooks: whether code of the stage runs between its steps or epochs.
        modules: hold the parameters.
    """

    def __init__(
        self,
        device: Device,
        say: Callable[[str], None],
        *,
        has_hooks: bool = True,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        self.reason: str | None = None
        self._device = device
        self._say = say
        self._has_hooks = has_hooks
        self._modules = modules
        self._held: Held | None = None
        self._known: dict[Key, Known] = {}
        self._reads_epoch = False

    @property
    def records(self) -> list[Record]:
        """The recorded steps."""
        return [known.record for known in self._known.values() if known.record is not None]

    def __call__(
        self, learn: Learn, batches: Sequence[Batch], moment: Moment, numbers: Numbers
    ) -> list[Value]:
        if self.reason is not None:
            return learn(batches, moment, numbers)
        known = self._known_of(batches, moment)
        known.steps += 1
        if known.steps <= PLAIN_STEPS:
            return learn(batches, moment, numbers)
        if self._held is None:
            self._held = Held(numbers, batches[0].labels.device)
        self._held.write(numbers)
        is_doubted = self._has_hooks and known.epoch != moment.epoch
        if known.steps <= PLAIN_STEPS + WATCHED_STEPS or (known.record and is_doubted):
            return self._watched(known, learn, batches, moment)
        if known.record is not None:
            return known.record.repeat(batches)
        if len(self.records) >= MOST_RECORDS:
            return learn(batches, moment, numbers)
        return self._recorded(known, learn, batches, moment, numbers)

    def _known_of(self, batches: Sequence[Batch], moment: Moment) -> Known:
        shape = tuple((tuple(x.shape), x.dtype) for batch in batches for x in tensors(batch))
        key = (shape, moment.epoch if self._reads_epoch else None)
        if key not in self._known and self._reads_epoch:
            # those of earlier epochs do not come again
            self._known = {one: known for one, known in self._known.items() if one[1] == key[1]}
        return self._known.setdefault(key, Known())

    def _watched(
        self, known: Known, learn: Learn, batches: Sequence[Batch], moment: Moment
    ) -> list[Value]:
        assert self._held is not None
        watch, seen = Watch(self._device, batches), SeenMoment(moment)
        numbers = self._held.numbers
        values = watch.look(lambda: learn(batches, seen, numbers))
        if "step" in seen.read:
            watch.reasons.append("the schedule reads the number of the step")
        self._reads_epoch |= "epoch" in seen.read
        difference = known.watch.trace.difference(watch.trace) if known.watch is not None else None
        known.watch, known.epoch = watch, moment.epoch
        if known.record is not None and difference is not None:
            # a hook has changed the stage: it is looked at again
            known.record, known.steps = None, PLAIN_STEPS + 1
        elif difference is not None:
            watch.reasons.append(difference)
        if watch.reasons:
            self._refuse(watch.reasons[0])
        return values

    def _recorded(
        self,
        known: Known,
        learn: Learn,
        batches: Sequence[Batch],
        moment: Moment,
        numbers: Numbers,
    ) -> list[Value]:
        assert known.watch is not None and self._held is not None
        record = Record(self._device.recorder(), batches, known.watch.asked)
        try:
            values = record.record(learn, moment, self._held.numbers)
        except NotRecordable as error:
            self._refuse(str(error))
            for module in self._modules:
                # gradients of the capture hold no values
                module.zero_grad(set_to_none=True)
            return learn(batches, moment, numbers)
        known.record = record
        return values

    def _refuse(self, reason: str) -> None:
        self.reason = reason
        self._known.clear()
        self._say(f"each step is launched kernel by kernel (train.capture): {reason}")


class Repeated:
    """A frozen network's answer, recorded for each shape of its inputs and repeated."""

    def __init__(self, answer: outside.Answer, device: Device) -> None:
        self.plain = answer
        self._device = device
        self._calls: dict[Hashable, int] = {}
        self._refused: set[Hashable] = set()
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
        if calls <= PLAIN_STEPS or shape in self._refused or len(self._records) >= MOST_RECORDS:
            return self.plain(inputs)
        held = [x.clone() for x in given]
        shown = held[0] if isinstance(inputs, Tensor) else dict(zip(inputs, held, strict=True))
        recorder = self._device.recorder()
        try:
            answer = recorder.record(lambda: self.plain(shown))
        except NotRecordable:
            self._refused.add(shape)
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
