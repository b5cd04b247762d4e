"""Downloads for a recipe: announced, to a folder that the user expects, never in a check."""

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
# of the context, so that a check in one thread does not hold up a download in another
_nothing: ContextVar[bool] = ContextVar("nothing is fetched", default=False)


def fetch(recipe: Recipe, source: DatasetSource, say: Callable[[str], None]) -> None:
    """Fetch the dataset's missing files, if its options allow it; other processes wait.

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
    """Refuse hidden folders, and any outside of the recipe's, the current and KDKIT_DATA.

    Raises:
        DataError: this folder is another one.
    """
    # resolved, so that a link cannot lead outside
    target, own = folder.resolve(), recipe.source.path.resolve().parent
    bases = [own, Path.cwd(), *([Path(data)] if (data := os.environ.get(DATA_FOLDER)) else [])]
    for base in (base.expanduser().resolve() for base in bases):
        if target.is_relative_to(base) and not any(
            name.startswith(".") for name in target.relative_to(base).parts
        ):
            return
    says = (
        f"would be fetched to {target}, which is neither below {own} nor below the current folder,"
        " or is hidden"
    )
    raise DataError(f"{says}; {DATA_FOLDER}={target} in the environment allows it")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make other processes wait that fetch into the same folder."""
    # the lock is on the nearest folder that exists: a lock file of our own would stay there
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
    """Refuse connections from Python code of this thread; hub libraries use their caches.

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
    """Set the hub's offline switch: its libraries retry a refused connection, with pauses."""
    from huggingface_hub import constants

    # the environment variable is read only once, at import
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
    # libraries wrap the refusal in errors of their own; the hub's, of a file that is not in its
    # cache, is no ConnectionError
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
    # a socket of this machine, as between a process and its data loaders
    local = event == "socket.connect" and arguments[0].family == socket.AF_UNIX
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo") and not local:
        raise NothingFetched("a check connects to no other machine")
