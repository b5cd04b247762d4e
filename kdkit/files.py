"""Reads and writes the files of runs, studies, caches and exported students, and notices damage.

JSON that kdkit writes contains a SHA-256 of its own content under the key `sha256` (the seal), a
line of a log a CRC-32 under `crc`, a text file its SHA-256 in a first comment line. If a file
belongs to something, such as a run, its owner's name is part of the digest, so that another owner's
file is detected. Other files are compared with digests stored in such a file. Files of an older
kdkit without digests are read without the comparison. All damage is reported in one line: the file,
the error, the way out.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from kdkit.errors import DamagedFile, RunError, one_line, shorten
from kdkit.finite import to_json

SEAL, CRC = "sha256", "crc"
SEAL_LINE = "# sha256 of the lines below: "

T = TypeVar("T")
Line = dict[str, Any]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers, also after a crash, find either the old or the new version.

    Raises:
        OSError: it cannot be written; `filename` is the file's.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                # before the rename: after a power failure the new name must not point to missing
                # content
                os.fsync(stream.fileno())
            # mkstemp creates files that only their owner can read
            Path(name).chmod(0o644)
            os.replace(name, path)
        # BaseException: remove the temporary file on Ctrl-C too
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an OSError name this file: that of a full disk names none, others a temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def write_json(path: Path, content: Mapping[str, Any], owner: str = "") -> None:
    """Write a JSON file that carries its seal."""
    write_atomically(path, (json.dumps(sealed(content, owner), indent=1) + "\n").encode())


def sealed(content: Mapping[str, Any], owner: str = "") -> dict[str, Any]:
    """Return plain values in the form in which JSON returns them, together with their digest."""
    plain = json.loads(to_json(content))  # tuples become lists, keys text
    return {**plain, SEAL: _content_digest(plain, owner)}


def read_json(
    path: Path, kind: type[T] | TypeAdapter[T], way_out: str, owner: str | None = ""
) -> T:
    """Read a JSON file.

    Args:
        path: the file.
        kind: the type of its content, for pydantic.
        way_out: advice for the user if it is damaged.
        owner: what it belongs to (None: unknown, and its seal is not compared).

    Raises:
        DamagedFile: the file is damaged, or holds something else.
    """
    return fitting(
        path,
        unsealed(path, _parsed(path, read_text(path, way_out), way_out), way_out, owner),
        kind,
        way_out,
    )


def unsealed(path: Path, content: Any, way_out: str, owner: str | None = "") -> Any:
    """Return plain values without their seal, if any, after comparing it; see `read_json`.

    Raises:
        DamagedFile: it does not match.
    """
    if not isinstance(content, dict) or SEAL not in content:
        return content
    plain = {key: value for key, value in content.items() if key != SEAL}
    if owner is not None and content[SEAL] != _content_digest(plain, owner):
        raise DamagedFile(
            path, f"its content does not match its `{SEAL}`{_or_foreign(owner)}", way_out
        )
    return plain


def fitting(path: Path, content: Any, kind: type[T] | TypeAdapter[T], way_out: str) -> T:
    """Validate a file's content as the type that it must be; see `read_json`."""
    adapter: TypeAdapter[T] = kind if isinstance(kind, TypeAdapter) else _adapter(cast("Any", kind))
    try:
        return adapter.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        key, says = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise DamagedFile(path, f"{key}: {says}" if key else says, way_out) from None


def read_text(path: Path, way_out: str) -> str:
    """Read a text file that must not be empty.

    Raises:
        RunError: the file is missing, empty, or no UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DamagedFile(path, "it is not UTF-8 text", way_out) from None
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; {way_out}") from None
    if not text.strip():
        raise DamagedFile(path, "it is empty", way_out)
    return text


def write_sealed_text(path: Path, text: str, owner: str = "") -> None:
    """Write a YAML file with its digest in a comment in the first line."""
    # in a comment, so that the file stays the YAML that its reader expects
    digest = hashlib.sha256((owner + text).encode()).hexdigest()
    write_atomically(path, f"{SEAL_LINE}{digest}\n{text}".encode())


def read_sealed_text(path: Path, way_out: str, owner: str | None = "") -> str:
    """Read a YAML file, comparing the digest in its first line; `owner` as for `read_json`.

    Raises:
        RunError: the file is missing or damaged.
    """
    text = read_text(path, way_out)
    first, _, rest = text.partition("\n")
    digest = hashlib.sha256(((owner or "") + rest).encode()).hexdigest()
    # `sha256` anywhere in the line, not just SEAL_LINE: the mark itself may be damaged
    if owner is not None and "sha256" in first and first != SEAL_LINE + digest:
        hint = f"{way_out}; if you have changed it yourself, delete its first line"
        raise DamagedFile(
            path,
            f"its content does not match the digest in its first line{_or_foreign(owner)}",
            hint,
        )
    return text


def read_yaml(
    path: Path, kind: type[T] | TypeAdapter[T], way_out: str, owner: str | None = ""
) -> T:
    """Read a YAML file that kdkit has written; see `read_json`.

    Raises:
        DamagedFile: the file is damaged, or holds something else.
    """
    text = read_sealed_text(path, way_out, owner)
    try:
        content = yaml.safe_load(text)
    # PyYAML raises ValueError for a date that does not exist
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DamagedFile(
            path, f"it is not YAML ({shorten(one_line(str(error)), 200)})", way_out
        ) from None
    return fitting(path, content, kind, way_out)


def log_line(content: Mapping[str, Any], owner: str = "") -> str:
    """Format one line of a log, with its check sum."""
    plain = json.loads(to_json(content))
    return json.dumps({**plain, CRC: _crc(plain, owner)}) + "\n"


def read_log(
    path: Path, kind: TypeAdapter[Line], way_out: str, owner: str | None = ""
) -> Iterator[Line | RunError]:
    """Read a log line by line; for a damaged line, yield the error that reports it.

    A last line without its end is left out: the process was killed while it wrote it.
    """
    if not path.exists():
        return
    *lines, rest = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, rest] if rest else lines, 1):
        try:
            yield _log_content(Path(f"{path}:{number}"), line, kind, way_out, owner)
        except RunError as error:
            if number <= len(lines):
                yield error


def _log_content(
    place: Path, line: bytes, kind: TypeAdapter[Line], way_out: str, owner: str | None
) -> Line:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise DamagedFile(place, "it is not UTF-8 text", way_out) from None
    content = _parsed(place, text, way_out)
    check = content.pop(CRC, None) if isinstance(content, dict) else None
    if owner is not None and check not in (None, _crc(content, owner)):
        raise DamagedFile(
            place, f"its content does not match its `{CRC}`{_or_foreign(owner)}", way_out
        )
    return fitting(place, content, kind, way_out)


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file; cached in this process as long as the file does not change."""
    about = path.stat()
    # the inode changes when a file is replaced by one of the same size and time
    return _file_digest(path, about.st_ino, about.st_size, about.st_mtime_ns)


def refuse_other(path: Path, digest: str | None, record: Path, way_out: str) -> None:
    """Check that a file has the recorded digest (None: an older kdkit recorded none).

    Raises:
        DamagedFile: it is another, or damaged.
    """
    if digest is None:
        return
    try:
        is_same = file_digest(path) == digest
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; {way_out}") from None
    if not is_same:
        is_empty = path.stat().st_size == 0
        what = "it is empty" if is_empty else f"its SHA-256 is not the one in {record.name}"
        raise DamagedFile(path, what, way_out)


def _parsed(path: Path, text: str, way_out: str) -> Any:
    try:
        return json.loads(text)
    # deeply nested damaged content raises RecursionError
    except (ValueError, RecursionError) as error:
        raise DamagedFile(
            path, f"it is not JSON ({shorten(one_line(str(error)), 200)})", way_out
        ) from None


def _content_digest(plain: Mapping[str, Any], owner: str) -> str:
    return hashlib.sha256(_canonical(plain, owner)).hexdigest()


def _crc(plain: Mapping[str, Any], owner: str) -> str:
    return f"{zlib.crc32(_canonical(plain, owner)):08x}"


def _canonical(plain: Mapping[str, Any], owner: str) -> bytes:
    # independent of the order of keys, which another program may change
    return owner.encode() + json.dumps(plain, sort_keys=True).encode()


def _or_foreign(owner: str) -> str:
    return ", or it is another's" if owner else ""


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@functools.lru_cache(maxsize=20_000)
def _file_digest(path: Path, inode: int, size: int, modified: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
