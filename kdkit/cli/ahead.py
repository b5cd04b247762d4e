"""The commands that prepare what students learn from: cache, serve, distill-data. Everything heavy
is imported in the command that needs it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer

from kdkit.cli.console import (
    NoPlugins,
    Overrides,
    Plugins,
    RecipeFile,
    load,
    out,
    watch,
)
from kdkit.errors import RecipeError, RunError

app = typer.Typer()


@app.command("distill-data")
def distill_data(
    recipe: RecipeFile,
    overrides: Overrides = None,
    plugins: Plugins = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Make a few images that stand for a recipe's dataset; write them to a file.

    `data.distilled=FILE` trains a recipe on them. An interrupted run starts over.
    """
    watch(plugins, no_plugins=False)
    loaded = load(recipe, overrides, plugins)
    from kdkit.runs.distilling import distill

    distill(loaded, quiet=quiet)


@app.command()
def cache(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE|NAME]",
            help="Recipe file; a cache's name for --list, --clear.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    plugins: Plugins = None,
    listed: Annotated[
        bool,
        typer.Option("--list", help="List the caches that there are, or the one of that name."),
    ] = False,
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove all caches, or the one of that name.")
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export",
            metavar="FOLDER",
            help="Write the filled cache as a folder of answers, for `answers/logits`.",
            show_default=False,
        ),
    ] = None,
    spread: Annotated[
        bool,
        typer.Option(
            "--spread",
            help="Share the work with other processes of this command, on all machines that see"
            " the folder.",
        ),
    ] = False,
    folder: Annotated[
        Path, typer.Option("--dir", help="Where caches are listed or removed.")
    ] = Path("runs/teacher-cache"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Fill the teacher caches of a recipe; write one out; list or remove caches."""
    if clear + listed + spread + (export is not None) > 1:
        raise RecipeError("give --list, --clear, --export or --spread, not several")
    watch(plugins, no_plugins=False)
    wanted = None if clear or listed or recipe is None else load(Path(recipe), overrides, plugins)
    from kdkit.cache import folder as store_folder

    # after the recipe, so that its errors appear before the slow import
    from kdkit.runs import fill_caches
    from kdkit.units import gigabytes

    if clear:
        for gone in store_folder.clear(folder, recipe):
            out.print(f"removed {gone.path} ({gigabytes(gone.bytes)})", markup=False)
    elif listed:
        out.print(
            fill_caches.table(
                [
                    found
                    for found in store_folder.stores(folder)
                    if recipe in (None, found.path.name)
                ]
            )
        )
    elif wanted is None:
        raise RecipeError(
            "name a recipe whose teacher caches are to be filled, or give --list or --clear"
        )
    elif export is not None:
        index = fill_caches.write_out(wanted, export, quiet=quiet)
        out.print(f"{export}: {index.rows:,} answers of {index.teacher}", markup=False)
    else:
        for made in fill_caches.fill(wanted, quiet=quiet, spread=spread):
            out.print(
                f"{made.path}: {made.filled:,} answers, {gigabytes(made.bytes)}", markup=False
            )


@app.command()
def serve(
    recipe: RecipeFile,
    overrides: Overrides = None,
    plugins: Plugins = None,
    host: Annotated[
        str, typer.Option("--host", metavar="NAME", help="Address of this machine to listen at.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="N", help="0: any that is free.")
    ] = 7070,
    no_plugins: NoPlugins = False,
) -> None:
    """Let a recipe's teachers answer runs in other processes, which name it by `at`.

    The environment variable KDKIT_TOKEN of both sides holds a secret of your own.
    """
    watch(plugins, no_plugins)
    token = os.environ.get("KDKIT_TOKEN", "")
    if not token:
        raise RunError("KDKIT_TOKEN is not set; choose a secret, and set it for both sides")
    loaded = load(recipe, overrides, plugins)
    from kdkit.runs import serving

    if at := serving.here(loaded):
        loaded = load(recipe, [*(overrides or []), *at], plugins)
    with serving.Server(serving.Teachers.of(loaded), host, port, token) as server:
        names = ", ".join(server.teachers.models)
        out.print(f"{names}: served at {server.address} until Ctrl-C", markup=False)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
