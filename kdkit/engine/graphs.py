"""Work of a device that can be recorded and repeated: CUDA graphs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Recorder(Protocol):
    """Records work while doing it, and repeats it."""

    def record(self, work: Callable[[], T]) -> T:
        """Do the work and record it.

        Raises:
            NotRecordable: it cannot be recorded, and was not done.
        """

    def replay(self) -> None: ...


class Device(Protocol):
    """A kind of device that can repeat work."""

    def recorder(self) -> Recorder: ...

    def watching(self, reasons: list[str]) -> contextlib.AbstractContextManager[None]:
        """Add a reason for each operation inside the block that no recorded step can hold."""

    def unwatched(self) -> contextlib.AbstractContextManager[None]:
        """Lift the watch inside the block."""


class NotRecordable(Exception):
    """A reason why a step cannot be recorded."""


class CudaGraphs:
    """Records work as CUDA graphs, which share memory, as no two of them run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def recorder(self) -> CudaGraph:
        return CudaGraph(self._pool)

    @contextlib.contextmanager
    def watching(self, reasons: list[str]) -> Iterator[None]:
        drawn = torch.get_rng_state()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _set_sync_mode("warn")
            try:
                yield
            finally:
                _set_sync_mode("default")
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                place = "/".join(Path(warning.filename).parts[-2:])
                reasons.append(f"the host reads a value of the device in {place}:{warning.lineno}")
            else:
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        if not torch.equal(torch.get_rng_state(), drawn):
            reasons.append("a plugin draws random numbers on the CPU")

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        mode = torch.cuda.get_sync_debug_mode()
        _set_sync_mode("default")
        try:
            yield
        finally:
            _set_sync_mode(mode)


def _set_sync_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        # torch warns that the mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


class CudaGraph:
    """Records work as a CUDA graph."""

    def __init__(self, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def record(self, work: Callable[[], T]) -> T:
        try:
            # `thread_local`: loaders pin memory in threads of their own
            with torch.cuda.graph(self._graph, self._pool, capture_error_mode="thread_local"):
                result = work()
        # of any type: nothing has run, and the plain step that follows raises what is real
        except Exception as error:
            raise NotRecordable(" ".join(str(error).split())[:200]) from None
        # capturing launches nothing
        self._graph.replay()
        return result

    def replay(self) -> None:
        self._graph.replay()
