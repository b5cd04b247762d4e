"""What the commands share: where they print, arguments, and how a recipe is found."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from kdkit.recipe import Recipe

out = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160)

RecipeFile = Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values that replace the file's: key.path=value, such as train.epochs=3.", show_default=False),
]
Plugins = Annotated[
    list[Path] | None, typer.Option("--plugins", metavar="FILE", help="Further plugin file or folder; may be repeated.", show_default=False)
]


def load(path: Path, overrides: list[str] | None, plugins: list[Path] | None) -> Recipe:
    """The recipe that a command line means."""
    from kdkit import recipe, source

    return recipe.load(path, source.parse_overrides(overrides or []), absolute(plugins))


def absolute(plugins: list[Path] | None) -> tuple[Path, ...]:
    """Plugin files as paths that do not depend on the working directory."""
    return tuple(path.expanduser().resolve() for path in plugins or [])
