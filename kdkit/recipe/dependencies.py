"""Digests of a run's dependencies besides its recipe: data, and Python files with modules.

A digest depends on the content of the files and on their names within their folder, never on the
folder's path or on modification times: a copy or a clone of the data gives the same run.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from kdkit.files import file_digest

# A small set is read whole. Of a larger one: all names, the sizes of MEASURED files and the
# beginnings of SAMPLED, evenly spread, so that a million images cost seconds, not minutes.
SMALL_FILES, SMALL_BYTES = 5_000, 64 << 20
MEASURED = 100_000
SAMPLED = 256
BEGINNING = 1 << 20

_of_large_sets: dict[tuple[Path, ...], str] = {}  # listed once in a process


def files_digest(paths: Sequence[Path]) -> str | None:
    """Compute the SHA-256 of data files; None if there are none.

    Args:
        paths: files, and folders with all that is below them.
    """
    if known := _of_large_sets.get(tuple(paths)):
        return known
    files = sorted(pair for path in paths for pair in _below(path))
    if not files:
        return None
    measured = _spread(files, MEASURED)
    sizes = {name: file.stat().st_size for name, file in measured}
    small = len(files) <= SMALL_FILES and sum(sizes.values()) <= SMALL_BYTES
    # names of files need not be UTF-8
    digest = hashlib.sha256("\0".join(name for name, _ in files).encode(errors="surrogateescape"))
    digest.update(str(list(sizes.values())).encode())
    for _, file in files if small else _spread(files, SAMPLED):
        digest.update(file_digest(file).encode() if small else _beginning(file))
    if not small:
        _of_large_sets[tuple(paths)] = digest.hexdigest()
    return digest.hexdigest()


def code_digest(file: Path) -> str:
    """Compute the SHA-256 of a Python file with the modules in its folder that it imports."""
    modules = local_modules(file)
    # the digest that an older kdkit, which did not look at modules, gave to such a file
    if not modules:
        return file_digest(file)
    digest = hashlib.sha256(file_digest(file).encode())
    for module in modules:
        digest.update(f"{os.path.relpath(module, file.parent)} {file_digest(module)}\n".encode())
    return digest.hexdigest()


def local_modules(file: Path) -> list[Path]:
    """List the files beside a Python file that it imports, directly or indirectly; sorted.

    What a program imports by other means, such as `importlib`, is not seen.
    """
    met = {file}
    waiting = [file]
    while waiting:
        new = set(_imports(waiting.pop(), file.parent)) - met
        met |= new
        waiting += sorted(new)
    return sorted(met - {file})


@contextlib.contextmanager
def beside(file: Path) -> Iterator[None]:
    """Let a Python file import the modules in its folder, inside the `with` block.

    Modules of the same names that were loaded from elsewhere are set aside and restored afterwards.
    """
    folder = file.parent
    names = {
        path.relative_to(folder).parts[0].removesuffix(".py")
        for path in local_modules(file)
        if path.is_relative_to(folder)
    }

    def known() -> dict[str, ModuleType]:
        return {
            name: module for name, module in sys.modules.items() if name.partition(".")[0] in names
        }

    def is_own(module: ModuleType) -> bool:
        return Path(getattr(module, "__file__", None) or "/").is_relative_to(folder)

    # a plugin's `utils.py` and that of another one have the same name in `sys.modules`
    others = {name: module for name, module in known().items() if not is_own(module)}
    for name in known():  # the file's own modules may come from an older version of it
        del sys.modules[name]
    # first, so that the file's own modules come before installed ones of the same name
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in known() if others else ():
            del sys.modules[name]
        sys.modules.update(others)


def _imports(file: Path, root: Path) -> Iterator[Path]:
    for level, steps in _imported_names(file_digest(file), file):
        # each further dot of a relative import is a folder up, as far as there is one
        folder = file.parents[min(level, len(file.parents)) - 1] if level else root
        yield from _modules(folder, steps)


@functools.lru_cache(maxsize=1000)
def _imported_names(digest: str, file: Path) -> list[tuple[int, list[str]]]:
    """Parse a file's imports: dots before a relative name, and the steps of the name."""
    try:
        tree = ast.parse(file.read_bytes())
    # importing the file reports the error
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    imported: list[tuple[int, list[str]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [(0, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            steps = node.module.split(".") if node.module else []
            # an imported name may be a module or a value; `_modules` keeps those that are files
            imported += [(node.level, [*steps, alias.name]) for alias in node.names]
    return imported


def _modules(folder: Path, steps: Sequence[str]) -> Iterator[Path]:
    """List the files that importing a dotted name runs."""
    for count in range(1, len(steps) + 1):
        path = folder.joinpath(*steps[:count])
        for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
            if file.is_file():
                yield file


def _below(path: Path) -> Iterator[tuple[str, Path]]:
    """List (name, file) of a file, or of all in a folder; names begin with the folder's own."""
    if path.is_file():
        yield path.name, path
    # folders that are linked into place are data too
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = os.path.join(path.name, os.path.relpath(folder, path))
        yield from (
            (os.path.join(relative, name), Path(folder, name))
            for name in names
            if not name.startswith(".")
        )


def _spread(files: Sequence[tuple[str, Path]], count: int) -> list[tuple[str, Path]]:
    """Select `count` of them, evenly spaced; all, if there are fewer."""
    if len(files) <= count:
        return list(files)
    return [files[round(number)] for number in np.linspace(0, len(files) - 1, count)]


def _beginning(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.sha256(stream.read(BEGINNING)).digest()
