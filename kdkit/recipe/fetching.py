"""What a recipe may bring onto this machine: announced first, to where its user can expect it,
and never while it is only checked.
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
    """Bring what the recipe's dataset lacks, once its options allow it. Other processes of this
    machine wait meanwhile.

    Args:
        recipe: names the dataset.
        source: the dataset.
        say: told from where to where, before anything is fetched.

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
        if source.lacks() is not None:  # nobody has brought it meanwhile
            say(f"fetches {lacking}")
            source.fetch()


def refuse_elsewhere(recipe: Recipe, folder: Path) -> None:
    """Files are brought only below the folder of the recipe, the current one or that of
    KDKIT_DATA, and into no hidden folder.

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
    """Keep other processes waiting that want to fetch something into the same folder."""
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
    """What Python says of a connection while nothing may be fetched."""


@contextlib.contextmanager
def nothing_fetched() -> Iterator[None]:
    """Refuse every connection to another machine that this thread's Python wants; Hugging Face's
    libraries look into their caches only.

    It keeps honest plugins and libraries from fetching. It holds nothing back that is not Python,
    or does not want to be held back.
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
    """By their own switch, for otherwise they try a refused connection several times, with
    pauses.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        # it copies the switch when it is imported, which may have been just now
        if "datasets.config" in sys.modules:
            sys.modules["datasets.config"].HF_HUB_OFFLINE = before  # type: ignore[attr-defined]


def wanted_to_fetch(error: BaseException | None) -> bool:
    """Whether an error goes back to something that was not fetched."""
    while error is not None:
        if isinstance(error, ConnectionError) or type(error).__name__ == "LocalEntryNotFoundError":
            return True
        error = error.__cause__ or error.__context__
    return False


_watching = False


def _watch() -> None:
    """Ask for Python's audit events, once: who has asked cannot take it back."""
    global _watching  # noqa: PLW0603 -- as the hook itself, it is the process's
    if not _watching:
        _watching = True
        sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not event.startswith("socket.") or not _nothing.get():
        return
    local = event == "socket.connect" and arguments[0].family == socket.AF_UNIX
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo") and not local:
        raise NothingFetched("a check connects to no other machine")
