"""Files that are whole or not there: written aside, moved into place, named by a digest of what is in them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

NAME = re.compile(r"(?P<kind>[a-z0-9_]+)-(?P<number>\d{8,})-(?P<digest>[0-9a-f]{16})\.pt")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


class Checkpoints:
    """A folder of training states: tensors and plain values, loaded without running code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, kind: str, number: int, state: Any, *, keep: int = 2) -> Path:
        """Save a state under its kind and number; of that kind, keep `keep`: this one and the newest before it."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        path = self.folder / f"{kind}-{number:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
        write_atomically(path, content)
        before = [p for p in self._newest_first(kind) if p != path and _number(p) <= number]
        for other in set(self._newest_first(kind)) - {path, *before[: keep - 1]}:  # later ones are damaged, or it would not be saved anew
            other.unlink()
        for part in self.folder.glob(".*.part"):  # what a killed process left behind
            part.unlink()
        return path

    def load_newest(self, kind: str) -> tuple[Any, list[Path]]:
        """The newest state that is whole, or None; and the broken files that are newer."""
        broken: list[Path] = []
        for path in self._newest_first(kind):
            if (state := _read(path)) is not None:
                return state, broken
            broken.append(path)
        return None, broken

    def discard(self, kind: str) -> None:
        """Remove every state of a kind."""
        for path in list(self._newest_first(kind)):
            path.unlink()

    def _newest_first(self, kind: str) -> Iterator[Path]:
        found = [p for p in self.folder.glob("*.pt") if (m := NAME.fullmatch(p.name)) and m["kind"] == kind]
        return iter(sorted(found, key=lambda path: (_number(path), path.stat().st_mtime_ns), reverse=True))


def _number(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _read(path: Path) -> Any:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest()[:16] != path.stem.rsplit("-", 1)[1]:
        return None
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # whatever a file that is no checkpoint makes torch raise; nothing in it has been run
        return None
