"""The recipes that come with kdkit, copied for a user to run and change."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from kdkit.errors import RecipeError, suggest
from kdkit.start.writing import write_new

PACKAGE = "kdkit_recipes"
COPIED = (".yaml", ".py")


def benchmarks() -> dict[str, Traversable]:
    """Return the folders of recipes by name, one for each benchmark.

    Raises:
        RecipeError: the recipes are not installed.
    """
    try:
        folder = resources.files(PACKAGE)
    except ModuleNotFoundError:
        raise RecipeError("the recipes are not installed; install kdkit again") from None
    return {
        item.name: item
        for item in sorted(folder.iterdir(), key=lambda item: item.name)
        if item.is_dir() and item.name[0] not in "._"
    }


def write(name: str, folder: Path) -> list[Path]:
    """Copy the recipes of a benchmark to `folder`/recipes/`name`; none of the files may exist.

    Raises:
        RecipeError: there is no such benchmark.
        OSError: a file exists, or cannot be written.
    """
    known = benchmarks()
    if name not in known:
        raise RecipeError(f"no example is called '{name}'; {suggest(name, known)}")
    files = dict(_files(known[name], folder / "recipes" / name))
    write_new(files)
    return [*files]


def count(source: Traversable) -> int:
    """Return how many files a benchmark has."""
    return len(_files(source, Path()))


def _files(source: Traversable, folder: Path) -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    for item in sorted(source.iterdir(), key=lambda item: item.name):
        if item.is_dir():
            found += _files(item, folder / item.name)
        elif item.name.endswith(COPIED):
            found.append((folder / item.name, item.read_text(encoding="utf-8")))
    return found
