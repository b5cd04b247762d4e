"""A folder that comes as a zip archive: fetched, unpacked beside its place, and moved there whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import kdkit

PATIENCE = 60  # seconds without an answer
JUNK = ("__MACOSX", ".DS_Store")  # what one system's archives have beside their content


def fetch(url: str, folder: Path) -> None:
    """Make a folder of the zip archive at `url`: of its only top folder, or of all that is in it. One that is there stays as it is.

    Other processes of this machine wait meanwhile. Whatever fails or stops it, nothing is left behind.

    Raises:
        DataError: it cannot be fetched, is no zip archive, or would write outside of the folder.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.parent):
            if not folder.exists():
                _make(url, folder)
    except kdkit.DataError:
        raise
    except Exception as error:  # no network, no such page, cut short, no archive, no room: each raises something else
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise kdkit.DataError(f"{folder} cannot be fetched from {url} ({reason})") from error


def _make(url: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as draft:
        file, content = Path(draft) / "archive.zip", Path(draft) / "content"
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer, file.open("wb") as written:
            shutil.copyfileobj(answer, written)
        content.mkdir()
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if _leads_outside(name):
                    raise kdkit.DataError(f"{url}: '{name}' would be written outside of {folder}; nothing was unpacked")
            archive.extractall(content)
        inside = [path for path in content.iterdir() if path.name not in JUNK]
        if not inside:
            raise kdkit.DataError(f"{url}: the archive is empty")
        only = inside[0] if len(inside) == 1 and inside[0].is_dir() else content
        only.replace(folder)


def _leads_outside(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes waiting that want to fetch something into the same folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: the last one to arrive finds the folder there
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
