"""Ctrl-C and SIGTERM as a stop request, which training checks between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

STOPS = (signal.SIGINT, signal.SIGTERM)


# A KeyboardInterrupt, so that whatever cleans up after Ctrl-C does so after SIGTERM.
class Terminated(KeyboardInterrupt):
    """SIGTERM, where Ctrl-C would have raised its parent."""

    signal = signal.SIGTERM


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` while no `StopRequest` is active; by default it would end the
    process without a message.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    # elsewhere, Python allows no handlers
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopRequest:
    """Catches SIGINT and SIGTERM while it is active; a second one ends the process as usual."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # elsewhere, Python allows no handlers
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._take) for s in STOPS}
        return self

    def _take(self, number: int, frame: FrameType | None) -> None:
        # Only noted: training looks at it between two steps, when its state is whole.
        self.signal = signal.Signals(number)
        # restore the handlers at once, so that a second signal ends the process
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # `_restore` is called again on leaving, and must not undo handlers set in between.
        self._before = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
