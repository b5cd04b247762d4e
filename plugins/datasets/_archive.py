"""A folder of images that comes as a zip archive: fetched, unpacked beside its place, and moved
there whole.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath

import kdkit

PATIENCE = 60  # seconds without an answer
CHUNK = 1 << 20  # bytes
MOST_FILES = 2_000_000
SCHEMES = ("https://", "http://")


def fetch(
    url: str, folder: Path, kinds: tuple[str, ...], most: float, sha256: str | None = None
) -> None:
    """Make a folder of the zip archive at `url`: of its only top folder, or of all that is in
    it. Nothing is left behind on failure.

    Args:
        url: where it is, by http or https.
        folder: is made; its parents too.
        kinds: endings of the files that are unpacked, such as `.jpg`. Others, links among them,
            stay in the archive.
        most: bytes that the archive, and what is unpacked of it, may have.
        sha256: of the archive, in hexadecimal (None: any).

    Raises:
        DataError: it cannot be fetched, is no zip archive or another one, is too large, or would
            write outside of the folder.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # on the disk of the folder itself, so that the move at the end is one step
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as draft:
            archive, content = Path(draft) / "archive.zip", Path(draft) / "content"
            _download(url, archive, most, sha256)
            _unpack(url, archive, content, kinds, most)
            inside = list(content.iterdir())
            # many archives have one folder around everything
            only = inside[0] if len(inside) == 1 and inside[0].is_dir() else content
            only.replace(folder)
    except kdkit.DataError:
        raise
    # no network, no such page, cut short, no archive, no room: each raises something else
    except Exception as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the page that says so
        reason = kdkit.cause(error)
        raise kdkit.DataError(f"{folder} cannot be fetched from {url} ({reason})") from error


def _download(url: str, file: Path, most: float, sha256: str | None) -> None:
    digest, count = hashlib.sha256(), 0
    with _web().open(url, timeout=PATIENCE) as answer, file.open("wb") as written:
        while block := answer.read(CHUNK):
            count += len(block)
            # while it is read: a server need not say how much it sends
            _refuse_larger(url, count, most)
            digest.update(block)
            written.write(block)
    # before it is unpacked
    if sha256 is not None and digest.hexdigest() != sha256.lower():
        raise kdkit.DataError(
            f"{url}: is another archive: its SHA-256 is {digest.hexdigest()}, not {sha256}"
        )


def _web() -> urllib.request.OpenerDirector:
    """Reads http and https, and follows them nowhere else: urllib's own opener also reads files
    of this machine.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _unpack(url: str, file: Path, content: Path, kinds: tuple[str, ...], most: float) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        for entry in entries:
            if _leads_outside(entry.filename):
                raise kdkit.DataError(
                    f"{url}: '{entry.filename}' would be written outside of the folder; nothing was"
                    " unpacked"
                )
        wanted = [
            entry
            for entry in entries
            # macOS puts a file beside each image that has its ending and is none
            if entry.filename.lower().endswith(kinds) and "__MACOSX" not in entry.filename
        ]
        if not wanted:
            raise kdkit.DataError(f"{url}: the archive has no images ({', '.join(kinds)})")
        if len(wanted) > MOST_FILES:
            raise kdkit.DataError(f"{url}: has {len(wanted):,} images, more than {MOST_FILES:,}")
        # no entry gives more than it says
        _refuse_larger(url, sum(entry.file_size for entry in wanted), most)
        for entry in wanted:
            target = content / entry.filename.replace("\\", "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            # a plain file, whatever the entry says that it is
            # x: an entry that comes twice must not replace the first
            with archive.open(entry) as packed, target.open("xb") as written:
                shutil.copyfileobj(packed, written, CHUNK)


def _refuse_larger(url: str, count: int, most: float) -> None:
    if count > most:
        raise kdkit.DataError(
            f"{url}: has more than {most / 1e9:g} GB, packed or unpacked; `max_gb` allows more"
        )


def _leads_outside(name: str) -> bool:
    # some archives of Windows have its separators
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts
