"""The commands for several runs: compare, search, report. Everything heavy is imported in the
command that needs it.
"""

from __future__ import annotations

import enum
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdkit.cli.console import (
    NoPlugins,
    Plugins,
    Processes,
    RunPlugins,
    absolute,
    out,
    start_processes,
    watch,
)
from kdkit.terminal import Terminal

if TYPE_CHECKING:
    from kdkit.study.findings import Findings
    from kdkit.study.variants import Study

app = typer.Typer()


class Form(enum.StrEnum):
    """The formats of `kdkit report --figures`."""

    pdf = "pdf"
    svg = "svg"
    png = "png"


@app.command()
def compare(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY|RECIPE|KEY=VALUE",
            help=(
                "A study file, or recipes (the first is the baseline); key.path=value replaces a"
                " value in all of them."
            ),
            show_default=False,
        ),
    ],
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Runs per variant, with the seeds 0, 1, 2... (default: the study's, or 3).",
            show_default=False,
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            metavar="KEY",
            help="Key in which variants may differ; may be repeated.",
            show_default=False,
        ),
    ] = None,
    max_parallel: Annotated[
        int | None,
        typer.Option(
            "--max-parallel",
            min=1,
            metavar="N",
            help="Runs in memory at once (default: all that share data and seed).",
        ),
    ] = None,
    spread: Annotated[
        bool,
        typer.Option(
            "--spread",
            help="Share the runs with every process that is started with the same command.",
        ),
    ] = False,
    dry: Annotated[
        bool,
        typer.Option(
            "--dry",
            help="Only list the variants, how long they train, and what is trained already.",
        ),
    ] = False,
    plugins: Plugins = None,
    processes: Processes = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Train the variants of a study with several seeds; compare them.

    Finished runs are reused.
    """
    from kdkit.recipe.yaml_source import parse_overrides
    from kdkit.study import loading

    watch(plugins, no_plugins)
    changes = [word for word in words if "=" in word and not Path(word).exists()]
    paths = [Path(word) for word in words if word not in changes]
    loaded = loading.load(
        paths, parse_overrides(changes), absolute(plugins), seeds=seeds, allow=allow or ()
    )
    from kdkit import launching
    from kdkit.study import comparison, table

    if dry:
        for one in table.planned(loaded, max_parallel):
            out.print(one)
        return
    start_processes(processes)
    telling = spread or launching.is_first()
    found = comparison.compare(
        loaded,
        max_parallel=max_parallel,
        spread=spread,
        say=lambda text: out.print(text, markup=False) if telling else None,
    )
    if found is not None:
        _tell(loaded, found)


@app.command()
def search(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY [KEY=VALUE]",
            help=("A study file with `vary:`; key.path=value replaces a value in all candidates."),
            show_default=False,
        ),
    ],
    confirm: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help=(
                "Fresh seeds with which winner and baseline are measured on test data (default: the"
                " study's `seeds`, or 3)."
            ),
            show_default=False,
        ),
    ] = None,
    max_parallel: Annotated[
        int | None,
        typer.Option(
            "--max-parallel",
            min=1,
            metavar="N",
            help="Runs in memory at once (default: all that share data and seed).",
        ),
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="Only list the candidates, the rungs, and their steps.")
    ] = False,
    plugins: Plugins = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Search what a study varies: train all a little, the best on validation data further.

    The winner is then measured on test data with fresh seeds.
    """
    from kdkit.errors import RecipeError
    from kdkit.recipe.yaml_source import parse_overrides
    from kdkit.study import search_plan

    watch(plugins, no_plugins)
    changes = [word for word in words if "=" in word and not Path(word).exists()]
    paths = [Path(word) for word in words if word not in changes]
    if len(paths) != 1:
        raise RecipeError(f"a search takes one study file, not {len(paths)}")
    wanted = search_plan.load(
        paths[0], parse_overrides(changes), absolute(plugins), confirm=confirm
    )
    from kdkit.study import comparison, search_table
    from kdkit.study import search as searching

    if dry:
        for one in search_table.planned(wanted):
            out.print(one)
        return
    say = functools.partial(out.print, markup=False)
    found = searching.search(wanted, max_parallel=max_parallel, say=say)
    out.print(search_table.table(found))
    for line in search_table.sentences(found):
        out.print(f"{line}.", style="dim", markup=False)
    out.print(f"Recipe: {wanted.path / searching.WINNER}", style="dim", markup=False)
    if wanted.confirm:
        final = wanted.final(found.winner)
        measured = comparison.compare(final, max_parallel=max_parallel, say=say)
        assert measured is not None  # a search is one process
        _tell(final, measured)


def _tell(study: Study, found: Findings) -> None:
    """Print the findings of a study; exit with code 1 if a run has failed."""
    from kdkit.study import comparison, table

    for one in table.tables(found, out.width, study.columns(found.scores)):
        out.print(one)
        out.print()
    for line in table.caption(found):
        out.print(line, style="dim", markup=False)
    out.print(f"Findings: {study.path / comparison.FINDINGS}", style="dim", markup=False)
    if any(variant.failures for variant in found.variants):
        raise typer.Exit(1)


@app.command()
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="STUDY|RUN", help="A study's folder, or run folders.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help="Folder of the files (default: the study's).", show_default=False
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="KEY=VALUE",
            help="Where the data lie: key=value, such as dataset.root=/images; may be repeated.",
            show_default=False,
        ),
    ] = None,
    figures: Annotated[
        Form | None,
        typer.Option(
            "--figures",
            help="Write every figure in this format too, for papers.",
            show_default=False,
        ),
    ] = None,
    plugins: RunPlugins = None,
) -> None:
    """Write the report of a study or of runs: a page, CSV, JSON and a LaTeX table."""
    from kdkit.recipe.yaml_source import parse_overrides
    from kdkit.study.report import output as reports

    overrides = parse_overrides(f"data.{word.removeprefix('data.')}" for word in data or [])
    with Terminal(stderr=True).status("reads the runs") as status:  # shown on a terminal only
        written = reports.write(
            paths,
            output,
            overrides,
            absolute(plugins),
            say=lambda text: status.update(text),
            figures=figures.value if figures else None,
        )
    for what in written.missing:
        out.print(f"left out: {what}", markup=False)
    out.print(str(written.page), markup=False)
