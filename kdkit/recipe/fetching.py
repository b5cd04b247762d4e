"""Downloads for a recipe: announced first, to a folder that the user expects, and never during a
check.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from kdkit.contracts.dataset_source import DatasetSource
from kdkit.errors import DataError
from kdkit.recipe.loading import Recipe

DATA_FOLDER = "KDKIT_DATA"  # environment variable
_nothing: ContextVar[bool] = ContextVar("nothing is fetched", default=False)


def fetch(recipe: Recipe, source: DatasetSource, say: Callable[[str], None]) -> None:
    """Fetch the missing files of the recipe's dataset, if its options allow it. Other processes of
    this machine wait meanwhile.

    Args:
        recipe: names the dataset.
        source: the dataset.
        say: called with source and destination, before anything is fetched.

    Raises:
        DataError: the folder is not one that a recipe may fill; it cannot be fetched.
    """
    lacking = source.lacks()
    if lacking is None:
        return
    if lacking.folder is None:
        say(f"fetches {lacking}")
        source.fetch()
        return
    refuse_elsewhere(recipe, lacking.folder)
    with _alone(lacking.folder):
        if source.lacks() is not None:  # another process may have fetched it while this one waited
            say(f"fetches {lacking}")
            source.fetch()


def refuse_elsewhere(recipe: Recipe, folder: Path) -> None:
    """Refuse folders outside the recipe's folder, the current one and that of KDKIT_DATA, and
    hidden folders.

    Raises:
        DataError: this folder is another one.
    """
    place, own = folder.resolve(), recipe.source.path.resolve().parent
    bases = [own, Path.cwd(), *([Path(data)] if (data := os.environ.get(DATA_FOLDER)) else [])]
    for base in (one.expanduser().resolve() for one in bases):
        if place.is_relative_to(base) and not any(
            part.startswith(".") for part in place.relative_to(base).parts
        ):
            return
    says = (
        f"would be fetched to {place}, which is neither below {own} nor below the current folder,"
        " or is hidden"
    )
    raise DataError(f"{says}; {DATA_FOLDER}={place} in the environment allows it")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make other processes wait that fetch into the same folder."""
    while not folder.is_dir():
        folder = folder.parent
    handle = os.open(folder, os.O_RDONLY)
    try:
        # a file system without locks: the last one to arrive finds the files there
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class NothingFetched(ConnectionError):
    """The error of a connection while fetching is forbidden."""


@contextlib.contextmanager
def nothing_fetched() -> Iterator[None]:
    """Refuse every connection to another machine from Python code of this thread; Hugging Face's
    libraries use only their caches.

    It keeps honest plugins and libraries from fetching. It is no protection against code outside
    Python or against malicious code.
    """
    _watch()
    token = _nothing.set(True)
    try:
        with _hub_offline():
            yield
    finally:
        _nothing.reset(token)


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    """Set the libraries' own offline switch, as they otherwise retry a refused connection several
    times, with pauses.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        # this module copies the switch on import, which may have just happened
        if "datasets.config" in sys.modules:
            sys.modules["datasets.config"].HF_HUB_OFFLINE = before  # type: ignore[attr-defined]


def wanted_to_fetch(error: BaseException | None) -> bool:
    """Check whether an error was caused by a refused download."""
    while error is not None:
        if isinstance(error, ConnectionError) or type(error).__name__ == "LocalEntryNotFoundError":
            return True
        error = error.__cause__ or error.__context__
    return False


_watching = False


def _watch() -> None:
    """Register the audit hook once: Python cannot remove one."""
    global _watching  # noqa: PLW0603 -- like the hook itself, it belongs to the process
    if not _watching:
        _watching = True
        sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not event.startswith("socket.") or not _nothing.get():
        return
    local = event == "socket.connect" and arguments[0].family == socket.AF_UNIX
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo") and not local:
        raise NothingFetched("a check connects to no other machine")
