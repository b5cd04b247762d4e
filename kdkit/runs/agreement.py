"""Makes the processes of a launch agree before they act: if one of them refuses, all do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from kdkit.errors import BusyError, Interrupted, KdkitError, RunError
from kdkit.launching import of_launch
from kdkit.recipe.fairness import differences
from kdkit.runs.spreading import Crew, launch_store

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
    """Gather every process's message, by rank."""
    rank, world = of_launch()
    if world == 1:
        return [mine]
    _said.append(mine)
    return _crew(rank, world).gather(mine)


@functools.cache
def _crew(rank: int, world: int) -> Crew:
    return Crew(rank, world, launch_store(), "agreement")
