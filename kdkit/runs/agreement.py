"""The processes of a launch agree on what they do before they do it: what one of them refuses,
all refuse.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from kdkit.errors import BusyError, Interrupted, KdkitError, RunError
from kdkit.launching import of_launch
from kdkit.recipe.fairness import differences
from kdkit.runs.spreading import Crew, launch_store

_said: list[Any] = []  # what this process has told the others


@contextlib.contextmanager
def agreed(what: str = "recipe") -> Iterator[dict[str, Any]]:
    """Do something in all processes of a launch; go on only if none of them refuses it, and all
    are asked for the same.

    Nothing inside may wait for another process. Gives a mapping that takes up what this process is
    asked for, in plain values.

    Args:
        what: how the thing asked for is called.

    Raises:
        KdkitError: the refusal of this process, or else of the first that has one; or they are
            asked for different things.
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
    """Tell the others, which wait for this process's first word, that it has refused."""
    if not _said:
        _tell(_refusal(error))


def _refusal(error: KdkitError) -> dict[str, Any]:
    return {"refused": str(error), "busy": isinstance(error, BusyError)}


def _tell(mine: Mapping[str, Any]) -> list[Any]:
    """What all processes have to tell each other, by rank."""
    rank, world = of_launch()
    if world == 1:
        return [mine]
    _said.append(mine)
    return _crew(rank, world).gather(mine)


@functools.cache
def _crew(rank: int, world: int) -> Crew:
    return Crew(rank, world, launch_store(), "agreement")
