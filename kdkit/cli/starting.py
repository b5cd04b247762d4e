"""The commands of a first day: `kdkit new` and `kdkit doctor`. Everything heavy is imported in the
command that needs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kdkit.cli.console import argument, option, out
from kdkit.errors import RecipeError
from kdkit.start import plugins, tasks

app = typer.Typer()
new = typer.Typer(help="Write a first recipe, study or plugin, with comments, for you to change.")
app.add_typer(new, name="new")

STUDY_SEEDS = 3


class Knowledge(StrEnum):
    """What a new loss compares."""

    response = "response"
    feature = "feature"
    relation = "relation"


KNOWLEDGE = Knowledge(plugins.KNOWLEDGE)

Name = Annotated[
    str | None, argument(metavar="NAME", help="What recipes say: small letters, digits and '_'.")
]
Folder = Annotated[
    Path, typer.Option("--folder", metavar="FOLDER", help="Where the files go.", show_default=False)
]
KnowledgeOption = Annotated[Knowledge, typer.Option("--knowledge", help="What the loss compares.")]
NewName = Annotated[
    str | None, option("--name", metavar="NAME", help="Name of the run (default: of the data).")
]
HERE = Path()
TASK_NAMES = ", ".join(tasks.TASKS)
USUAL, OF_TEXTS = tasks.TASKS[tasks.TASK], tasks.TASKS[tasks.TEXTS]


@new.command("recipe")
def new_recipe(
    images: Annotated[
        Path | None,
        option(
            "--images",
            metavar="FOLDER|TABLE",
            help="Your images: folders of classes, in a part each for training and test or not, or"
            " a CSV table.",
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        option(
            "--texts",
            metavar="FOLDER|TABLE",
            help="Your texts and labels, in their place: a CSV, JSON or Parquet table, or a folder"
            f" of two. The task is {tasks.TEXTS}.",
        ),
    ] = None,
    task: Annotated[
        str, typer.Option("--task", metavar="TASK", help=f"What is asked: {TASK_NAMES}.")
    ] = tasks.TASK,
    teacher: Annotated[
        str | None,
        option(
            "--teacher",
            metavar="MODEL|FILE",
            help="A model to train first, a file of weights, or a recipe that trains it (default:"
            f" {USUAL.teacher}; for texts {OF_TEXTS.teacher}).",
        ),
    ] = None,
    teacher_model: Annotated[
        str | None,
        option("--teacher-model", metavar="MODEL", help="The network of a file of weights."),
    ] = None,
    student: Annotated[
        str | None,
        option(
            "--student",
            metavar="MODEL",
            help="timm's name (of the backbone, for masks and boxes), or SOURCE/NAME (default:"
            f" {USUAL.student}; for texts {OF_TEXTS.student}).",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        option("--loss", help="What the teacher teaches by (default: the task's response loss)."),
    ] = None,
    classes: Annotated[
        str | None,
        option("--classes", metavar="A,B,...", help="Names of the classes of masks."),
    ] = None,
    columns: Annotated[
        str | None,
        option(
            "--columns",
            metavar="A,B,...",
            help="Columns of a table: the targets, or of texts TEXT,LABEL.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        option("--size", metavar="S|H,W", help="Side of the images (default: the task's)."),
    ] = None,
    batch: Annotated[
        int | None,
        option("--batch-size", min=1, metavar="N", help="Images of a step (default: the task's)."),
    ] = None,
    epochs: Annotated[
        int | None,
        option(
            "--epochs",
            min=1,
            max=100_000,
            metavar="N",
            help=f"Epochs to train (default: {USUAL.epochs}; for texts {OF_TEXTS.epochs}).",
        ),
    ] = None,
    scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Begin without public weights of the networks.")
    ] = False,
    name: NewName = None,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="File to write.")] = Path(
        "recipe.yaml"
    ),
) -> None:
    """Write a recipe for your images or texts, and one for its teacher; both pass `kdkit check`."""
    from kdkit.start import recipes

    if images is not None and texts is not None:
        raise RecipeError("--texts: takes the place of --images; name one of them")
    where = texts or asked(images, "--images", "Folder or table of your images")
    task = tasks.TEXTS if texts is not None else task
    words = asked(classes, "--classes", MASKS) if task == "segmentation" else classes
    wish = recipes.Wish(
        Path(where),
        output,
        task,
        teacher or "",
        teacher_model,
        student or "",
        loss,
        name,
        _parts(words),
        _parts(columns),
        _size(size),
        batch,
        epochs or 0,
        pretrained=not scratch,
    )
    written = recipes.write(wish)
    _tell(written, f"kdkit check {output}, then kdkit train {output}")


MASKS = "Names of the classes in the order of the masks' values, such as background,road,tree"


@new.command("study")
def new_study(
    recipe: Annotated[
        Path | None, option("--recipe", metavar="FILE", help="The recipe, which has a teacher.")
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, max=1000, metavar="N", help="Runs of each variant.")
    ] = STUDY_SEEDS,
    name: NewName = None,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="File to write.")] = Path(
        "study.yaml"
    ),
) -> None:
    """Write a study of a recipe: its student alone, and with each kind of knowledge."""
    from kdkit.start import studies

    base = asked(recipe, "--recipe", "Recipe file")
    written = studies.write(Path(base), output, seeds, name)
    _tell(written, f"kdkit compare {output} --dry, then kdkit compare {output}")


@new.command("example")
def new_example(
    name: Annotated[
        str | None, argument(metavar="NAME", help="Which recipes (default: list them).")
    ] = None,
    folder: Folder = HERE,
) -> None:
    """Copy recipes that come with kdkit to recipes/NAME, or list what there is."""
    from kdkit.start import examples

    if name is None:
        for known, source in examples.benchmarks().items():
            out.print(f"{known}  {examples.count(source)} files", markup=False)
        out.print("next: kdkit new example NAME", markup=False)
        return
    written = examples.write(name, folder)
    _tell(written, f"read the first lines of {os.fspath(written[0])}, and of the others")


@new.command("loss")
def new_loss(
    name: Name = None,
    knowledge: KnowledgeOption = KNOWLEDGE,
    folder: Folder = HERE,
) -> None:
    """Write a loss, and a test that checks its promises and its formula."""
    _write_plugin("loss", name, folder, knowledge)


@new.command("schedule")
def new_schedule(name: Name = None, folder: Folder = HERE) -> None:
    """Write a schedule, and a test that trains by it."""
    _write_plugin("schedule", name, folder)


@new.command("task")
def new_task(name: Name = None, folder: Folder = HERE) -> None:
    """Write a task, and a test that checks its promises."""
    _write_plugin("task", name, folder)


@new.command("dataset")
def new_dataset(name: Name = None, folder: Folder = HERE) -> None:
    """Write a dataset for images in a layout of your own, and a test that reads some."""
    _write_plugin("dataset", name, folder)


@new.command("package")
def new_package(
    name: Name = None,
    knowledge: KnowledgeOption = KNOWLEDGE,
    folder: Folder = HERE,
) -> None:
    """Write a package for pip with a loss, its test and a GitHub workflow."""
    _write_plugin("package", name, folder, knowledge)


def asked(given: object, flag: str, question: str) -> str:
    """Return what the user gave, or asks for it on a terminal.

    Raises:
        RecipeError: it is missing, and nobody can be asked.
    """
    if given is not None:
        return str(given)
    if not sys.stdin.isatty():
        raise RecipeError(f"{flag} is missing: {question[0].lower()}{question[1:]}")
    return str(typer.prompt(question))


def _write_plugin(
    kind: str, name: str | None, folder: Path, knowledge: str = plugins.KNOWLEDGE
) -> None:
    wanted = asked(name, "NAME", f"Name of the {kind}, in small letters")
    written, command = plugins.write(kind, wanted, folder, str(knowledge))
    _tell(written, command if folder == HERE else f"cd {folder} && {command}")


def _parts(words: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (words or "").split(",") if word.strip())


def _size(text: str | None) -> str | None:
    """Return `data.image_size` as YAML: `224`, or `[256, 384]` of `256,384`."""
    if text is None:
        return None
    sides = text.split(",")
    if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
        raise RecipeError(f"--size: '{text}' is neither a side, such as 224, nor H,W")
    return sides[0].strip() if len(sides) == 1 else f"[{', '.join(map(str.strip, sides))}]"


def _tell(files: Iterable[Path], following: str) -> None:
    for file in files:
        out.print(os.fspath(file), markup=False)
    out.print(f"next: {following}", markup=False)


@app.command()
def doctor() -> None:
    """Show versions, devices and limits of this machine, and what is known to be wrong with them.

    Ends with code 1 if something would keep runs from ending.
    """
    from kdkit.start.doctor import examine

    found = examine(Path.cwd())
    table = Table("what", "found", box=None, pad_edge=False)
    for row in found.rows:
        table.add_row(row.what, row.found)
    out.print(table)
    for note in found.notes:
        out.print(f"note: {note}", markup=False)
    for problem in found.problems:
        out.print(f"problem: {problem}", markup=False)
    if found.problems:
        raise typer.Exit(1)
    out.print("no problem found", markup=False)
