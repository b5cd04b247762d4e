"""Checkpoints: files that are either complete or absent, written to a temporary name, moved into
place, and named by a digest of their content.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kdkit.files import write_atomically

NAME = re.compile(r"(?P<kind>[a-z0-9_]+)-(?P<number>\d{8,})-(?P<digest>[0-9a-f]{16})\.pt")


class Checkpoints:
    """A folder of training states: tensors and plain values, loaded without running code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, kind: str, number: int, state: Any, *, keep: int = 2) -> Path:
        """Save a state under its kind and number; keep the newest `keep` of that kind, this one
        included.
        """
        # In memory first: the file's name is a digest of its content.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        path = self.folder / f"{kind}-{number:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
        write_atomically(path, content)
        before = [p for p in self._newest_first(kind) if p != path and _number(p) <= number]
        # later states must be damaged, otherwise this one would not be saved again
        for other in set(self._newest_first(kind)) - {path, *before[: keep - 1]}:
            other.unlink()
        for part in self.folder.glob(".*.part"):  # what a killed process left behind
            part.unlink()
        return path

    def load_newest(self, kind: str, run: str | None = None) -> tuple[Any, dict[Path, str]]:
        """Load the newest state that is intact, or None; also return what is wrong with newer
        files.

        Args:
            kind: of the states.
            run: fingerprint that a state must store under `run`; states of an older kdkit have
                none.
        """
        wrong: dict[Path, str] = {}
        for path in self._newest_first(kind):
            state = _read(path)
            if state is None:
                wrong[path] = "is damaged"
            # States of an older kdkit do not say whose they are.
            elif run is not None and isinstance(state, dict) and state.get("run", run) != run:
                wrong[path] = "is of another recipe's run"
            else:
                return state, wrong
        return None, wrong

    def discard(self, kind: str) -> None:
        """Remove every state of a kind."""
        for path in list(self._newest_first(kind)):
            path.unlink()

    def _newest_first(self, kind: str) -> Iterator[Path]:
        found = [
            p
            for p in self.folder.glob("*.pt")
            if (m := NAME.fullmatch(p.name)) and m["kind"] == kind
        ]
        # By time where numbers are equal: a state saved again under its number may have another
        # digest, and is another file.
        return iter(
            sorted(found, key=lambda path: (_number(path), path.stat().st_mtime_ns), reverse=True)
        )


def _number(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _read(path: Path) -> Any:
    content = path.read_bytes()
    # Before torch reads it: a damaged file is never unpickled.
    if hashlib.sha256(content).hexdigest()[:16] != path.stem.rsplit("-", 1)[1]:
        return None
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # torch raises errors of any type if the file is no checkpoint; no code in it was run
    except Exception:
        return None
