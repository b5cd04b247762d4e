"""Distribute independent runs over the processes of a launch."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed
from accelerate.state import PartialState
from torch.distributed.rendezvous import rendezvous

from kdkit.errors import RunError
from kdkit.launching import of_launch

T = TypeVar("T")

LONGEST = timedelta(days=365)
# interval of checks for a dead process, as no launcher may watch
BETWEEN_LOOKS = timedelta(seconds=2)
GONE = "another process of this launch has ended, so this one ends too; the same command goes on"
OF_A_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def part() -> None:
    """Leave the process group: from here on, torch and Accelerate see a single process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # Accelerate caches the group and its environment for the whole process
    PartialState._reset_state()
    for name in OF_A_LAUNCH:
        os.environ.pop(name, None)


def launch_store() -> Any:
    """Return the store that all processes of this launch can write to and read from."""
    store, *_ = next(rendezvous("env://", timeout=LONGEST))
    return store


class Crew:
    """This process among those that the launcher has started, each of which works on its own runs.

    Args:
        rank: its number.
        world: the number of processes.
        store: the store through which they exchange messages.
        name: prefix of their keys; other crews may use the store too.
    """

    def __init__(self, rank: int, world: int, store: Any, name: str = "crew") -> None:
        self.rank = rank
        self.world = world
        self._store = store
        self._times = (f"{name} {number}" for number in itertools.count())
        self._process = f"{name} process "
        store.set(
            f"{self._process}{rank}",
            json.dumps([_machine(), os.getpid(), psutil.Process().create_time()]),
        )

    @classmethod
    def of_launch(cls) -> Crew | None:
        """Read the launcher's environment and clear it; None for a process that was started
        alone.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) < 2:
            return None
        store, (rank, world) = launch_store(), of_launch()
        # select the device before the launcher's variables are removed
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
        part()
        return cls(rank, world, store)

    def share(self, work: Sequence[T]) -> list[T]:
        """Return this process's part."""
        return list(work[self.rank :: self.world])

    def in_turn(self, do: Callable[[], T]) -> T:
        """Run something in one process after the other, in the order of their ranks."""
        time = next(self._times)
        if self.rank:
            with _others_there():
                self._wait(f"{time} over ", self.rank - 1)
        try:
            return do()
        finally:
            self._store.set(f"{time} over {self.rank}", "")

    def gather(self, mine: Any) -> list[Any]:
        """Gather every process's message, by rank, in plain values. The first process, which hosts
        the store, waits until all have read it.
        """
        time, everyone = next(self._times), range(self.world)
        with _others_there():
            self._store.set(f"{time} told {self.rank}", json.dumps(mine))
            found = [json.loads(self._wait(f"{time} told ", rank)) for rank in everyone]
            self._store.set(f"{time} read {self.rank}", "")
            if self.rank == 0:
                for rank in everyone:
                    self._wait(f"{time} read ", rank)
        return found

    def _wait(self, key: str, rank: int) -> Any:
        """Wait for the value that process `rank` writes under `key` and its number; fail if that
        process has ended without writing, as far as this machine can tell.
        """
        while True:
            ended = self._has_ended(rank)  # checked before the last read: it may write and then end
            try:
                self._store.wait([f"{key}{rank}"], BETWEEN_LOOKS)
            except torch.distributed.DistStoreError:
                if ended:
                    raise RunError(GONE) from None
            else:
                return self._store.get(f"{key}{rank}")

    def _has_ended(self, rank: int) -> bool:
        if not self._store.check([f"{self._process}{rank}"]):
            return False  # the key is not there yet
        machine, pid, born = json.loads(self._store.get(f"{self._process}{rank}"))
        if machine != _machine():
            return False  # process ids of another machine mean nothing here
        try:
            process = psutil.Process(pid)
            return bool(process.create_time() != born or process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True


def _machine() -> list[Any]:
    """Return a value that is equal for processes that can see each other's process ids: one boot,
    and one container.
    """
    namespace = Path("/proc/self/ns/pid")
    container = os.readlink(namespace) if namespace.is_symlink() else ""
    return [socket.gethostname(), psutil.boot_time(), container]


@contextlib.contextmanager
def _others_there() -> Iterator[None]:
    """Turn torch's error about a store whose host process is gone into one line."""
    try:
        yield
    except torch.distributed.DistError:
        raise RunError(GONE) from None
