"""Makes the processes of a launch agree before they act: if one of them refuses, all do."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed
from torch.distributed.rendezvous import rendezvous

from kdkit.errors import BusyError, Interrupted, KdkitError, RunError
from kdkit.launching import of_launch
from kdkit.recipe.fairness import differences

# for the first meeting: one may have ended before it, and nobody can tell
TO_START = timedelta(minutes=10)
LONGEST = timedelta(days=365)
# interval of checks for a dead process, as no launcher may watch
BETWEEN_LOOKS = timedelta(seconds=2)
GONE = "another process of this launch has ended, so this one ends too; the same command goes on"
PROCESS = "agreement process "  # beginning of the keys under which processes say who they are

_said: list[Any] = []  # messages of this process to the others


@contextlib.contextmanager
def agreed(what: str = "recipe") -> Iterator[dict[str, Any]]:
    """Run the block in all processes of a launch; continue only if none of them raises, and all
    have the same request.

    Nothing inside may wait for another process. Yields a mapping in which the block records this
    process's request, in plain values.

    Args:
        what: name of the request, for messages.

    Raises:
        KdkitError: the error of this process, or else of the first that has one; or the requests
            differ.
    """
    asked: dict[str, Any] = {}
    try:
        yield asked
    except Interrupted:
        raise
    except KdkitError as error:
        _tell(_refusal(error))
        raise
    told = _tell({"asked": asked})
    for one in told:
        if "refused" in one:
            raise (BusyError if one["busy"] else RunError)(one["refused"])
    for rank, one in enumerate(told):
        if keys := [key for key, *_ in differences(told[0]["asked"], one["asked"])]:
            raise RunError(
                f"process {rank + 1} of {len(told)} (rank {rank}) was given another {what} than"
                f" process 1 (different: {', '.join(keys)}); start all with the same command and"
                " the same files"
            )


def refuse(error: KdkitError) -> None:
    """Report to the other processes, which wait for this one's first message, that it has
    refused.
    """
    if not _said:
        _tell(_refusal(error))


def _refusal(error: KdkitError) -> dict[str, Any]:
    return {"refused": str(error), "busy": isinstance(error, BusyError)}


def _tell(mine: Mapping[str, Any]) -> list[Any]:
    """Gather every process's message, by rank. The first process, which may host the store, waits
    until all have read it.
    """
    rank, world = of_launch()
    if world == 1:
        return [mine]
    key, everyone = f"agreement {len(_said)}", range(world)
    _said.append(mine)
    store = _launch_store(rank)
    try:
        store.set(f"{key} told {rank}", json.dumps(mine))
        told = [json.loads(_wait(store, f"{key} told ", other)) for other in everyone]
        store.set(f"{key} read {rank}", "")
        for other in everyone if rank == 0 else ():
            _wait(store, f"{key} read ", other)
    except torch.distributed.DistError:
        # the process that hosts the store is gone
        raise RunError(GONE) from None
    return told


@functools.cache
def _launch_store(rank: int) -> Any:
    """Return the store that all processes of this launch can write to and read from.

    Raises:
        RunError: not all of them have come.
    """
    try:
        store, *_ = next(rendezvous("env://", timeout=TO_START))
    except torch.distributed.DistError:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(
            f"the {os.environ.get('WORLD_SIZE')} processes of this launch have not all met at"
            f" {place} within {TO_START.seconds // 60} minutes; start all of them together"
        ) from None
    store.set_timeout(LONGEST)
    myself = [_machine(), os.getpid(), psutil.Process().create_time()]
    store.set(f"{PROCESS}{rank}", json.dumps(myself))
    return store


def _wait(store: Any, key: str, rank: int) -> Any:
    """Wait for the value that process `rank` writes under `key` and its number; fail if that
    process has ended without writing, as far as this machine can tell.
    """
    while True:
        ended = _has_ended(store, rank)  # checked before the last read: it may write and then end
        try:
            store.wait([f"{key}{rank}"], BETWEEN_LOOKS)
        except torch.distributed.DistStoreError:
            if ended:
                raise RunError(GONE) from None
        else:
            return store.get(f"{key}{rank}")


def _has_ended(store: Any, rank: int) -> bool:
    if not store.check([f"{PROCESS}{rank}"]):
        return False  # the key is not there yet
    machine, pid, born = json.loads(store.get(f"{PROCESS}{rank}"))
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
