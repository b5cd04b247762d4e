"""Finds what a recorded step would freeze, by watching steps that are taken as they are.

A step can be repeated if the next one sends the same operations to the device, with the same plain
numbers, on the same memory. So two steps are traced and compared.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdkit.contracts.inputs import first_tensor
from kdkit.contracts.records import Batch, Inputs, Outputs, tensors
from kdkit.contracts.schedule import Moment
from kdkit.engine.graphs import Device
from kdkit.models import outside

T = TypeVar("T")

PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device)  # arguments that are compared


@dataclass
class Asked:
    """An answer from outside that a step reads.

    Attributes:
        answer: gives it.
        place: of its inputs among those of the batches.
        held: the tensors that the recorded step reads.
    """

    answer: outside.Answer
    place: int
    held: Outputs | None = None

    def now(self, batches: Sequence[Batch]) -> Outputs:
        """Return the answer to these batches."""
        return self.answer(inputs_of(batches)[self.place])


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operations of a step, in order: each with its plain arguments, and with the memory that
    it finds when the step begins.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, ...]] = []
        self._names: dict[int, str] = {}  # of memory that is another one in each step
        self._made: set[int] = set()  # memory that the step has made
        self._kept: list[Tensor] = []  # so that no address is used again before the comparison

    def name(self, values: Sequence[Tensor], name: str) -> None:
        """Give a name to tensors that a recorded step would find in the same place."""
        self._kept += values
        self._names |= {_address(value): f"{name}.{i}" for i, value in enumerate(values)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") == "profiler":
            return func(*args, **(kwargs or {}))
        given = tree_leaves((args, kwargs or {}))
        call = (str(func), *(self._seen(value) for value in given))
        result = func(*args, **(kwargs or {}))
        addresses = {_address(value) for value in given if isinstance(value, Tensor)}
        for value in tree_leaves(result):
            # a view, or a result in place, lies in memory that was there
            if isinstance(value, Tensor) and _address(value) not in addresses:
                self._made.add(_address(value))
        self._calls.append(call)
        return result

    def _seen(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return repr(value) if isinstance(value, PLAIN) else type(value).__name__
        address = _address(value)
        if address in self._names:
            return self._names[address]
        if address in self._made:
            return tuple(value.shape)
        self._kept.append(value)
        return address

    def difference(self, other: Trace) -> str | None:
        """Describe the first operation that differs; None if all are equal."""
        for one, two in itertools.zip_longest(self._calls, other._calls, fillvalue=("nothing",)):
            if one != two:
                return _difference(one, two)
        return None


def _difference(one: tuple[Any, ...], two: tuple[Any, ...]) -> str:
    if one[0] != two[0] or len(one) != len(two):
        return f"one step does {one[0]} where the next does {two[0]}"
    first, second = next((a, b) for a, b in zip(one, two, strict=True) if a != b)
    if isinstance(first, int) and isinstance(second, int):
        return f"{one[0]} reads a tensor that is replaced from step to step"
    return f"{one[0]} gets {first} in one step and {second} in the next"


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    # sparse tensors, and some subclasses, have no storage of their own
    except (NotImplementedError, RuntimeError):
        return id(tensor)


class Watch:
    """Takes a step as it is, and traces it.

    Attributes:
        asked: the answers from outside that the step reads.
        reasons: what keeps such a step from being recorded.
        trace: its operations.

    Args:
        device: the kind of device.
        batches: of the step.
    """

    def __init__(self, device: Device, batches: Sequence[Batch]) -> None:
        self.asked: list[Asked] = []
        self.reasons: list[str] = []
        self.trace = Trace()
        self._device = device
        self._batches = batches
        for number, batch in enumerate(batches):
            self.trace.name(tensors(batch), f"batch {number}")

    def ask(self, answer: outside.Answer, inputs: Inputs) -> Outputs:
        place = place_of(inputs, self._batches)
        if place is None:
            return within(answer, inputs)
        # what it asks in turn comes from outside as well
        with outside.recording(None), self._device.unwatched():
            found = answer(inputs)
        self.asked.append(Asked(answer, place))
        self.trace.name(tensors(found), f"answer {len(self.asked)}")
        return found

    def look(self, step: Callable[[], T]) -> T:
        """Take the step, and note the reasons against recording it."""
        drawn = _drawn()
        with outside.recording(self), self._device.watching(self.reasons), self.trace:
            result = step()
        if _drawn() != drawn:
            self.reasons.append("a plugin draws random numbers with `random` or numpy")
        return result


class SeenMoment(Moment):
    """A moment that notes which of its numbers are read."""

    read: set[str]

    def __init__(self, moment: Moment) -> None:
        super().__init__(moment.epoch, moment.step)
        object.__setattr__(self, "read", set())

    def __getattribute__(self, name: str) -> Any:
        if name in ("epoch", "step"):
            object.__getattribute__(self, "read").add(name)
        return object.__getattribute__(self, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Moment) and (self.epoch, self.step) == (other.epoch, other.step)

    def __hash__(self) -> int:
        return hash((self.epoch, self.step))


def _drawn() -> tuple[Any, ...]:
    """Return the state of the host's generators other than torch's."""
    _, keys, *place = np.random.get_state(legacy=True)
    return random.getstate(), np.asarray(keys).tobytes(), place


def inputs_of(batches: Sequence[Batch]) -> list[Inputs]:
    """Return the inputs of the batches, each followed by its further views."""
    return [inputs for batch in batches for inputs in (batch.inputs, *batch.views)]


def place_of(inputs: Inputs, batches: Sequence[Batch]) -> int | None:
    """Return the place of inputs among those of the batches; None if they are none of them."""
    shown = first_tensor(inputs)
    places = (i for i, known in enumerate(inputs_of(batches)) if first_tensor(known) is shown)
    return next(places, None)


def within(answer: outside.Answer, inputs: Inputs) -> Outputs:
    """Answer inputs that the step has made itself, as a part of the step."""
    # a recorded answer cannot be repeated inside another record
    plain: outside.Answer = getattr(answer, "plain", answer)
    return plain(inputs)
