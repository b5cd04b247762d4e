"""Decides which Python files a recipe may run, and announces them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from kdkit.errors import RecipeError


class Unasked(RecipeError):
    """Python files that may not run; `says` leaves out where they are named."""

    def __init__(self, place: str, says: str) -> None:
        super().__init__(f"{place}: {says}")
        self.says = says


@dataclass(frozen=True)
class _Watch:
    """The arguments of `watch`, and the announcements made so far."""

    say: Callable[[str], None]
    only: tuple[Path, ...] | None
    announced: set[str] = field(default_factory=set)


_watch: ContextVar[_Watch | None] = ContextVar("who is told of Python files that run", default=None)


def watch(say: Callable[[str], None], only: Sequence[Path] | None = None) -> None:
    """Announce each Python file that recipes run, once, from here on in this context.

    Args:
        say: called with the announcement, before the file runs.
        only: files and folders that may run although a recipe names them (None: all that recipes
            name).
    """
    _watch.set(_Watch(say, None if only is None else tuple(only)))


def meet(named: Mapping[Path, str], allowed: Sequence[Path] | None = None) -> None:
    """Check and announce Python files that a recipe names, before they run.

    Args:
        named: `file:line` of the recipe by the files and folders.
        allowed: for a recipe in a run folder, the files and folders that its user has named (None:
            any other recipe).

    Raises:
        Unasked: some of them may not run; it names all of these.
    """
    watch = _watch.get()
    if allowed is not None and (strange := _others(named, allowed)):
        options = shlex.join([word for path in strange for word in ("--plugins", str(path))])
        says = (
            f"Python of a run does not run unasked, and its recipe names {_listed(strange)}; if you"
            f" trust it, add {options}"
        )
        raise Unasked(named[strange[0]], says)
    # a user who has named the files of a run needs no announcement
    if watch is None or allowed is not None:
        return
    if watch.only is not None and (strange := _others(named, watch.only)):
        raise Unasked(
            named[strange[0]], f"names {_listed(strange)}, which --no-plugins does not let run"
        )
    for path, place in named.items():
        if (text := f"runs {path}, which {place} names") not in watch.announced:
            watch.announced.add(text)
            watch.say(text)


def moved(named: Mapping[str, Path], files: Sequence[Path]) -> dict[str, Path]:
    """Map key paths of files that are elsewhere now to the user's files of the same name."""
    # a run that was moved, or came from another machine, names files where they were then
    own = {path.name: path for path in files}
    return {
        key: own[path.name]
        for key, path in named.items()
        if _others([path], files) and path.name in own
    }


def _others(named: Sequence[Path] | Mapping[Path, str], allowed: Sequence[Path]) -> list[Path]:
    return [path for path in named if not any(path.is_relative_to(free) for free in allowed)]


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))
