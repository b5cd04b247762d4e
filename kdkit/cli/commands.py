"""The command line. Everything heavy is imported in the command that needs it."""

from __future__ import annotations

import io
import os
import platform
import sys
from contextvars import copy_context
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kdkit import __version__, launching
from kdkit.cli import ahead, starting, studies, usage
from kdkit.cli.console import (
    DEBUG,
    NoPlugins,
    Overrides,
    Plugins,
    Processes,
    RecipeFile,
    RunPlugins,
    absolute,
    argument,
    load,
    option,
    out,
    start_processes,
    unexpected,
    watch,
)
from kdkit.errors import Interrupted, KdkitError, RunError, one_line

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    # `main` tells an error on one line.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # typer's rich help shows flags as if they took a value
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Knowledge distillation from recipes: any loss plugin under any schedule plugin.",
)
app.add_typer(studies.app)
app.add_typer(ahead.app)
app.add_typer(starting.app)
RunPath = Annotated[Path, argument(help="Run folder.")]
Best = Annotated[
    bool, typer.Option("--best", help="The epoch that is best on validation, not the last.")
]


Device = Annotated[
    str | None, option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps...")
]


class ExportFormat(StrEnum):
    """The formats of `kdkit export`."""

    timm = "timm"
    onnx = "onnx"


def _versions(wanted: bool) -> None:
    if wanted:
        libraries = ", ".join(
            f"{name} {version(name)}" for name in ("torch", "torchvision", "timm")
        )
        out.print(f"kdkit {__version__} (Python {platform.python_version()}, {libraries})")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def kdkit(
    context: typer.Context,
    versions: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the versions of kdkit and its libraries.", callback=_versions
        ),
    ] = False,
) -> None:
    """Knowledge distillation from recipes: any loss plugin under any schedule plugin."""
    if context.invoked_subcommand is None:
        out.print(context.get_help(), markup=False)
        # Without a command, help is an answer to a mistake.
        raise typer.Exit(2)


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    plugins: Plugins = None,
    run: Annotated[
        Path | None, option("--run", help="Run folder (default: run.folder/name).")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away the run that is there, and begin anew.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings only.")] = False,
    processes: Processes = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Train a recipe; an interrupted run resumes."""
    watch(plugins, no_plugins)
    loaded = load(recipe, overrides, plugins)
    start_processes(processes)
    # after the recipe, so that its errors appear before the slow import
    from kdkit.runs import training

    training.train(loaded, run, restart=restart, quiet=quiet)


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    plugins: Plugins = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Show what a recipe would do, without data, weights or training."""
    watch(plugins, no_plugins)
    loaded = load(recipe, overrides, plugins)
    from kdkit.runs import checks

    out.print(str(checks.make(loaded)), markup=False)


@app.command()
def evaluate(
    run: RunPath,
    overrides: Annotated[
        list[str] | None,
        argument(
            metavar="KEY=VALUE",
            help="Other data: data.key=value, such as data.dataset.root=/images.",
        ),
    ] = None,
    best: Best = False,
    device: Device = None,
    plugins: RunPlugins = None,
) -> None:
    """Measure a run's student again, beside its teacher."""
    from kdkit.engine.accelerator import build_accelerator
    from kdkit.engine.evaluate import Judge
    from kdkit.recipe.yaml_source import parse_overrides
    from kdkit.students import loaded
    from kdkit.students.show import score_table

    opened = loaded.LoadedRun(run, parse_overrides(overrides or []), absolute(plugins))
    train = opened.recipe.spec.train
    accelerator = build_accelerator(
        train.model_copy(update={"device": device}) if device else train
    )
    judge = Judge.of(opened.recipe, opened.info)
    rows = (
        (f"{one.role}, {one.part}", one.metrics)
        for one in loaded.evaluate(opened, best=best, device=accelerator.device)
    )
    out.print(score_table(rows, (*judge.scores, *judge.agreement)))


def _device(name: str | None) -> torch.device:
    """Return the device of that name, or the accelerator, or the CPU if there is none."""
    import torch

    from kdkit.models import devices

    there = torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator() if there else None
    return devices.chosen(name or "auto") or accelerator or torch.device("cpu")


@app.command()
def predict(
    student: Annotated[Path, argument(metavar="RUN", help="Run folder, or an exported one.")],
    images: Annotated[
        list[Path], argument(help="Image files, and folders of them.", metavar="IMAGES...")
    ],
    output: Annotated[
        Path | None,
        option("--output", help="File to write, .csv or .json (default: print a CSV table)."),
    ] = None,
    pictures: Annotated[
        Path | None, option("--pictures", help="Folder for pictures of the images with answers.")
    ] = None,
    masks: Annotated[
        Path | None, option("--masks", help="Folder to write the masks of a segmentation to.")
    ] = None,
    threshold: Annotated[
        float | None,
        option("--threshold", help="Least score of boxes (default: the task's `shown`)."),
    ] = None,
    best: Best = False,
    device: Device = None,
    plugins: RunPlugins = None,
) -> None:
    """Write what a student answers to image files: a table or JSON, and pictures."""
    from kdkit.files import write_atomically
    from kdkit.students import prediction_files, predictions

    if output is not None and output.suffix not in (".csv", ".json"):
        raise RunError(f"--output: {output}: write a file .csv or .json")
    files = predictions.find_images(images)
    where = _device(device)
    predictor = predictions.Predictor.of(
        student, best=best, device=where, plugins=absolute(plugins), threshold=threshold
    )
    seen = prediction_files.Watch()
    writer = prediction_files.Writer(
        prediction_files.Pictures(masks, "--masks", files) if masks else None,
        prediction_files.Pictures(pictures, "--pictures", files) if pictures else None,
        predictor.task,
        predictor.info,
    )
    rows = writer.told(seen.watching(predictor(files, where)))
    is_json = output is not None and output.suffix == ".json"
    text = prediction_files.as_json(rows) if is_json else prediction_files.as_csv(rows)
    # not on stdout, which may be the table
    for note in seen.notes(predictor.task):
        print(f"note: {note}", file=sys.stderr)
    if output is None:
        # Not through rich, which would wrap rows of a CSV file in a pipe.
        sys.stdout.write(text)
        return
    write_atomically(output, text.encode())
    out.print(f"{len(files):,} images: {output}", markup=False)


@app.command()
def show(
    run: RunPath,
    png: Annotated[
        Path | None,
        option("--png", help="Picture of the curves (default: curves.png in the run folder)."),
    ] = None,
) -> None:
    """Show a run, finished or not: its recipe, result and curves."""
    from kdkit.students.show import Story

    story = Story(run)
    out.print(story.report(), markup=False)
    if says := story.picture(png):
        out.print(f"\n{says}", markup=False)


@app.command()
def export(
    run: RunPath,
    form: Annotated[
        ExportFormat,
        typer.Option("--format", help="timm: weights and config.json; onnx: one network."),
    ] = ExportFormat.timm,
    output: Annotated[
        Path | None, option("--output", help="Folder (default: export in the run folder).")
    ] = None,
    best: Best = False,
    plugins: RunPlugins = None,
) -> None:
    """Write a run's student so that timm or ONNX Runtime loads it."""
    from kdkit.students import loaded
    from kdkit.students.export import export as write

    made = write(
        loaded.LoadedRun(run, plugins=absolute(plugins)),
        "onnx" if form is ExportFormat.onnx else "timm",
        output,
        best=best,
    )
    for file in made.files:
        out.print(f"{file} ({file.stat().st_size:,} bytes)", markup=False)
    for note in made.notes:
        out.print(note, markup=False)


@app.command()
def profile(
    models: Annotated[
        list[str],
        argument(
            metavar="RUN|MODEL", help="Run folders (teacher and student), and names of models."
        ),
    ],
    batch: Annotated[
        int,
        typer.Option(
            "--batch", min=1, max=65_536, metavar="N", help="Images per answer, beside single ones."
        ),
    ] = 32,
    size: Annotated[
        str | None,
        option(
            "--size",
            help=(
                "Image shape C,H,W or side (224: 3,224,224), or tokens of a text (default: the"
                " run's, or 224)."
            ),
        ),
    ] = None,
    classes: Annotated[
        int | None,
        option(
            "--classes",
            min=1,
            max=1_000_000,
            metavar="N",
            help="Logits of named models (default: the run's, or 1000).",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        option(
            "--threads", min=1, max=1024, metavar="N", help="Processor threads (default: torch's)."
        ),
    ] = None,
    device: Device = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="The same as --device cpu.")] = False,
    runs: Annotated[
        int,
        typer.Option(
            "--runs",
            min=1,
            max=1_000_000,
            metavar="N",
            help="Answers timed of each model and batch size, within five seconds.",
        ),
    ] = 100,
    plugins: Plugins = None,
) -> None:
    """Measure what models cost: parameters, operations, bytes, time.

    From the second model on, each number is also shown as a multiple of the first model's.
    """
    import torch

    from kdkit.contracts.inputs import kind_of
    from kdkit.students import cost_table
    from kdkit.students import profile as profiling

    where = _device("cpu" if cpu else device)
    with profiling.threads(threads):
        found = cost_table.subjects(models, size, classes, where, absolute(plugins))
        measured = profiling.measure_together(
            [(s.model, s.shape) for s in found], sorted({1, batch}), runs=runs
        )
        shapes = " or ".join(dict.fromkeys(f"({', '.join(map(str, s.shape))})" for s in found))
        out.print(
            f"{kind_of(found[0].shape)} {shapes}, on {where}, {torch.get_num_threads()} threads",
            markup=False,
        )
    out.print(cost_table.table([s.name for s in found], measured))


@app.command()
def layers(
    model: Annotated[str, typer.Argument(help="SOURCE/NAME; a bare NAME is timm's.")],
    options: Annotated[
        list[str] | None,
        argument(metavar="KEY=VALUE", help="Options of the model: key=value, such as stem=small."),
    ] = None,
    classes: Annotated[
        int, typer.Option(min=1, max=1_000_000, metavar="N", help="Number of classes.")
    ] = 10,
    size: Annotated[
        str,
        typer.Option(
            help=(
                "Image shape C,H,W or side (224: 3,224,224); for networks that read texts, N"
                " tokens."
            )
        ),
    ] = "3,224,224",
    stages: Annotated[
        bool, typer.Option("--stages", help="Only the layers that have an alias.")
    ] = False,
    plugins: Plugins = None,
) -> None:
    """List the layers of a model that a recipe can name, with shapes."""
    from kdkit.cli import listing

    rows = listing.layers(model, options or [], classes, size, absolute(plugins))
    table = Table("layer", "type", "output", "alias", box=None, pad_edge=False)
    for row in (row for row in rows if row.aliases or not stages):
        table.add_row(
            row.name or "(the network)",
            row.type,
            f"(B, {', '.join(map(str, row.shape[1:]))})",
            ", ".join(row.aliases),
        )
    out.print(table)


@app.command()
def plugins(
    name: Annotated[
        str | None, argument(help="Show this one's options, formula and paper.")
    ] = None,
    task: Annotated[
        str | None,
        option("--for", metavar="TASK", help="List only what fits this task, such as detection."),
    ] = None,
    plugins: Plugins = None,
) -> None:
    """List the plugins found, or show one."""
    from kdkit.cli import listing
    from kdkit.recipe import registry

    loaded = registry.load(absolute(plugins))
    if name is None:
        listing.tell_all(loaded, task)
    else:
        listing.tell_one(loaded, name, task)


@app.command()
def schema(
    plugins: Plugins = None,
    study: Annotated[
        bool, typer.Option("--study", help="That of study files, as `kdkit compare` reads them.")
    ] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from kdkit.recipe import registry, types
    from kdkit.study import spec as study_schema

    # As it is, so that `kdkit schema > FILE` gives a valid file.
    sys.stdout.write((study_schema if study else types).schema(registry.load(absolute(plugins))))


def main() -> None:
    """Run the command line. Exit codes: 2 for a mistake of the user's, reported in one line; 128
    plus its number for a stop by a signal; 70 for a fault.
    """
    _escape_unknown_signs()
    # Typer prints a traceback where it finds no shell.
    if {"--install-completion", "--show-completion"} & set(sys.argv) and not _in_a_shell():
        sys.exit(
            "kdkit: completion is for bash, zsh, fish and PowerShell; this process was started by"
            " none of them"
        )
    try:
        # a copied context, so that what a command sets with `consent.watch` ends with the command
        code = copy_context().run(app, prog_name="kdkit", standalone_mode=False)
    except typer.Abort:
        # A Ctrl-C outside training, where no run has to be saved: what is finished is reused.
        print("stopped; the same command goes on", file=sys.stderr)
        # 128 + SIGINT
        sys.exit(130)
    except Interrupted as error:
        print(error, file=sys.stderr)
        # As a shell tells of a process that a signal has ended.
        sys.exit(128 + error.signal)
    except KdkitError as error:
        print(error, file=sys.stderr)
        _tell_others(error)
        sys.exit(2)
    except OSError as error:  # a folder that cannot be made, a disk that is full
        says = one_line(f"{error.filename or 'kdkit'}: {error.strerror or error}")
        print(says, file=sys.stderr)
        # The others of the launch would wait for this one.
        _tell_others(RunError(says))
        sys.exit(2)
    except Exception as error:
        if lost := launching.told_of_another(error):
            print(lost, file=sys.stderr)
            # Another process of the launch has told why it ended, and has its own exit code.
            sys.exit(2 if lost == launching.WORKER_ENDED else launching.ENDED_WITH_ANOTHER)
        # typer's errors have it; their base class depends on its version
        if hasattr(error, "format_message"):
            print(usage.told(error, sys.argv[1:]), file=sys.stderr)
            sys.exit(2)
        if os.environ.get(DEBUG):
            raise
        says, code = unexpected(error)
        print(says, file=sys.stderr)
        sys.exit(code)
    sys.exit(code or 0)


def _tell_others(error: KdkitError) -> None:
    """Report to the other processes of the launch, which may be waiting, that this one leaves."""
    if launching.of_launch()[1] > 1:
        from kdkit.runs import agreement

        agreement.refuse(error)


def _escape_unknown_signs() -> None:
    """Print signs that the output's encoding lacks as escapes: no table fails for an arrow."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _in_a_shell() -> bool:
    import shellingham  # installed with typer

    try:
        shellingham.detect_shell()
    except shellingham.ShellDetectionFailure:
        return False
    return True
