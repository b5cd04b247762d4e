"""Finds what a recorded step would freeze, by watching a step that is taken as it is."""

from __future__ import annotations

import random
import types
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from kdkit.contracts.records import Batch, Inputs, Outputs
from kdkit.contracts.schedule import Moment, Schedule
from kdkit.engine.graphs import Device
from kdkit.models import outside

T = TypeVar("T")

OF_TORCH = {"_parameters", "_buffers", "_modules"}  # dictionaries of an `nn.Module`


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


class Watch:
    """Looks for what a recorded step would freeze, while a step is taken as it is.

    Args:
        device: the kind of device.
        holders: all that may hold state: modules, functions, schedules.
        batches: of the step.
    """

    def __init__(self, device: Device, holders: Sequence[object], batches: Sequence[Batch]) -> None:
        self.asked: list[Asked] = []
        self.reasons: list[str] = []
        self._device = device
        self._holders = holders
        self._batches = batches

    def ask(self, answer: outside.Answer, inputs: Inputs) -> Outputs:
        place = place_of(inputs, self._batches)
        if place is None:
            return within(answer, inputs)
        self.asked.append(Asked(answer, place))
        # what it asks in turn comes from outside as well
        with outside.recording(None), self._device.unwatched():
            return answer(inputs)

    def look(self, step: Callable[[], T]) -> T:
        """Take a step, and note the reasons against recording it."""
        before, drawn = held_by(self._holders), _drawn()
        with outside.recording(self), self._device.watching(self.reasons):
            result = step()
        if _drawn() != drawn:
            self.reasons.append("a plugin draws random numbers with `random` or numpy")
        after = held_by(self._holders)
        self.reasons += [
            f"{name} changes from step to step"
            for (name, _), value in after.items()
            if before.get((name, _), value) != value
        ]
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


def held_by(holders: Iterable[object]) -> dict[tuple[str, int], Hashable]:
    """Return all plain values that the host holds, and where tensors lie, by name and holder."""
    found: dict[tuple[str, int], Hashable] = {}
    for holder in holders:
        _note(holder, found, set())
    return found


def _note(holder: object, found: dict[tuple[str, int], Hashable], known: set[int]) -> None:
    if id(holder) in known:
        return
    known.add(id(holder))
    if isinstance(holder, types.FunctionType):
        name = holder.__qualname__.replace(".<locals>", "")
        values = dict(zip(holder.__code__.co_freevars, _cells(holder), strict=True))
    elif isinstance(holder, (nn.Module, Schedule)):
        name = type(holder).__name__
        own = {key: value for key, value in vars(holder).items() if key not in OF_TORCH}
        values = {**own, **vars(holder).get("_buffers", {})}
    else:
        return
    for key, value in values.items():
        if (plain := _plain(value)) is not None:
            found[f"{name}.{key}", id(holder)] = plain
        _note(value, found, known)
    if isinstance(holder, nn.Module):
        for part in holder.children():
            _note(part, found, known)


def _cells(function: types.FunctionType) -> list[object]:
    """Return the values of the variables that a function takes from where it was defined."""
    values = []
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            values.append(None)
    return values


def _plain(value: object) -> Hashable:
    """Return a value that changes if what the host holds changes; None for other objects."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, (bool, int, float, str)) or value is None:
        return repr(value)
    if isinstance(value, dict):
        return tuple((str(key), _plain(one)) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_plain(one) for one in value)
    return None


def _drawn() -> tuple[Any, ...]:
    """Return the state of the host's generators other than torch's."""
    _, keys, *place = np.random.get_state(legacy=True)
    return random.getstate(), np.asarray(keys).tobytes(), place


def inputs_of(batches: Sequence[Batch]) -> list[Inputs]:
    """Return the inputs of the batches, each followed by its further views."""
    return [inputs for batch in batches for inputs in (batch.inputs, *batch.views)]


def place_of(inputs: Inputs, batches: Sequence[Batch]) -> int | None:
    """Return the place of inputs among those of the batches; None if they are none of them."""
    places = (i for i, known in enumerate(inputs_of(batches)) if known is inputs)
    return next(places, None)


def within(answer: outside.Answer, inputs: Inputs) -> Outputs:
    """Answer inputs that the step has made itself, as a part of the step."""
    # a recorded answer cannot be repeated inside another record
    plain: outside.Answer = getattr(answer, "plain", answer)
    return plain(inputs)
