"""Shared parts of the commands: consoles, arguments, and loading a recipe."""

from __future__ import annotations

import functools
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdkit import launching
from kdkit.errors import cause, one_line
from kdkit.terminal import Terminal

if TYPE_CHECKING:
    from kdkit.recipe import Recipe

# Not on a terminal, rich would take 80 columns: a fixed width keeps tables whole in a file or pipe.
out = Terminal(soft_wrap=True, width=None if sys.stdout.isatty() else 160)

# Defaults are told in the help text, where there is one to tell.
argument = functools.partial(typer.Argument, show_default=False)
option = functools.partial(typer.Option, show_default=False)

RecipeFile = Annotated[Path, argument(help="Recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    argument(
        metavar="KEY=VALUE",
        help="Values that replace the file's: key.path=value, such as train.epochs=3.",
    ),
]
Plugins = Annotated[
    list[Path] | None,
    option("--plugins", metavar="FILE", help="Further plugin file or folder; may be repeated."),
]
Processes = Annotated[
    int | None,
    option("--processes", min=1, metavar="N", help="Train in so many processes of this machine."),
]

NoPlugins = Annotated[
    bool,
    typer.Option(
        "--no-plugins", help="Run no Python file that a recipe names, only those of --plugins."
    ),
]
RunPlugins = Annotated[
    list[Path] | None,
    option(
        "--plugins",
        metavar="FILE",
        help="Python file or folder of the run that may run; may be repeated.",
    ),
]

DEBUG = "KDKIT_DEBUG"
"""Environment variable that lets tracebacks through."""
UNEXPECTED = 70
"""Exit code of a fault in kdkit or in a plugin."""


def start_processes(wanted: int | None) -> None:
    """Run the command in `processes` processes if it is not in one of them yet, and exit."""
    if wanted is not None and launching.must_launch(wanted):
        # The started processes run the same command line, and find that they are in a launch.
        raise typer.Exit(launching.launch(wanted, sys.argv[1:]))


def load(path: Path, overrides: list[str] | None, plugins: list[Path] | None) -> Recipe:
    """Load the recipe that a command line names."""
    from kdkit import recipe
    from kdkit.recipe import yaml_source

    return recipe.load(path, yaml_source.parse_overrides(overrides or []), absolute(plugins))


def watch(plugins: list[Path] | None, no_plugins: bool) -> None:
    """From here on announce, on stderr, each Python file that a recipe runs; or let none run but
    those of --plugins.
    """
    from kdkit.launching import is_first
    from kdkit.recipe import consent

    # Once a launch: all its processes load the same recipe.
    def say(text: str) -> None:
        if is_first():
            print(one_line(text), file=sys.stderr)

    consent.watch(say, absolute(plugins) if no_plugins else None)


def absolute(plugins: list[Path] | None) -> tuple[Path, ...]:
    """Make the paths of plugin files independent of the working directory."""
    return tuple(path.expanduser().resolve() for path in plugins or [])


def unexpected(error: Exception) -> tuple[str, int]:
    """Format an unexpected error as one line, and choose the exit code; its traceback is written to
    a file.

    Running out of memory is no fault of kdkit's, and torch reports it in several ways.
    """
    if (
        isinstance(error, MemoryError)
        # By name: the command line does without importing torch.
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    ):
        return (
            one_line(
                "not enough memory; smaller images, batches or networks need less"
                f" ({' '.join(str(error).split())})"
            ),
            2,
        )
    frames = traceback.extract_tb(error.__traceback__)
    modules = [
        str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    own = [
        (module, frame)
        for module, frame in zip(modules, frames, strict=True)
        if module.partition(".")[0].startswith("kdkit")
    ]
    # The deepest frame of kdkit's or a plugin's own: those below it are a library's.
    module, last = own[-1] if own else ("kdkit", frames[-1])
    # a plugin file; the standard plugins are in the package `kdkit_plugins`
    is_plugin = module.startswith("kdkit_plugin_")
    whose = (
        "a fault of this plugin"
        if is_plugin
        else "a fault of kdkit, not of what it was given: please report it"
    )
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="kdkit-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write("".join(traceback.format_exception(error)))
        where = f"traceback in {file.name}, or here with {DEBUG}=1"
    # no temporary folder, or a full disk: the message must appear all the same
    except OSError:
        where = f"traceback with {DEBUG}=1"
    says = f"{last.filename}:{last.lineno}: {cause(error)}; {whose} ({where})"
    return one_line(says), UNEXPECTED
