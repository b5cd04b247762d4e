"""Answers that come from outside of a recorded step: from a cache on disk, or from a teacher that
several runs share.

A recorded step repeats the work of the device alone. What the host decides or reads is asked for
before each repetition, and the step finds it in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

from kdkit.contracts.records import Inputs, Outputs

Answer = Callable[[Inputs], Outputs]


class Recording(Protocol):
    """A step that is being watched or recorded."""

    def ask(self, answer: Answer, inputs: Inputs) -> Outputs:
        """Return the answer to inputs of the step's batches, or call `answer` within the step."""


_recordings: list[Recording | None] = []


@contextlib.contextmanager
def recording(step: Recording | None) -> Iterator[None]:
    """Ask `step` for answers from outside inside the block; None: ask nobody."""
    _recordings.append(step)
    try:
        yield
    finally:
        _recordings.pop()


def ask(answer: Answer, inputs: Inputs) -> Outputs:
    """Return an answer from outside; the step that is being recorded is asked first."""
    step = _recordings[-1] if _recordings else None
    return answer(inputs) if step is None else step.ask(answer, inputs)
