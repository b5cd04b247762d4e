"""Cooperative scheduling: generators that yield before each batch, so that several runs can be
trained side by side.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")

Place = tuple[int, int, int]
"""Position of a run: finished epochs of its stage, part of the data (below 0: measuring, 0:
training), number of the next batch.
"""

BEGINNING: Place = (-1, 0, 0)

Turns = Generator[Place, None, T]


def finish(turns: Turns[T]) -> T:
    """Exhaust the generator of turns."""
    while True:
        try:
            next(turns)
        except StopIteration as stop:
            result: T = stop.value
            return result


class Stopwatch:
    """Measures wall and CPU seconds spent on one run. It stops while another run has its turn:
    enter it for a turn.
    """

    def __init__(self) -> None:
        self.set(0.0, 0.0)
        self._running = False

    def __enter__(self) -> Self:
        self.set(self._wall, self._cpu)
        self._running = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._wall = self.wall
        self._cpu = self.cpu
        self._running = False

    def set(self, wall: float, cpu: float) -> None:
        """Set the seconds spent so far."""
        self._wall, self._cpu = wall, cpu
        self._began = time.monotonic(), time.process_time()

    def add(self, wall: float, cpu: float) -> None:
        """Add time that another run's turn has spent for this run too."""
        self._wall, self._cpu = self._wall + wall, self._cpu + cpu

    @property
    def wall(self) -> float:
        return self._wall + (time.monotonic() - self._began[0] if self._running else 0.0)

    @property
    def cpu(self) -> float:
        """CPU seconds of all threads of this process, without its loader workers."""
        return self._cpu + (time.process_time() - self._began[1] if self._running else 0.0)
