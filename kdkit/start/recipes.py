"""A new recipe for a user's own images or texts, and the recipe of its teacher."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import yaml

from kdkit.errors import KdkitError, RecipeError, one_line, suggest
from kdkit.start import datasets, tasks
from kdkit.start.tasks import PENULTIMATE, TASKS, Beginning
from kdkit.start.writing import filled, flow, refuse_existing, remove, write_new

if TYPE_CHECKING:
    from kdkit.recipe import Recipe

WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
RECIPES = (".yaml", ".yml")


@dataclass(frozen=True)
class Wish:
    """What the user says about a new recipe.

    Attributes:
        images: folder or table, of texts if the task is one of texts.
        output: the file to write.
        task: a key of `TASKS`.
        teacher: a network's name, a file of weights, or a recipe (empty: the task's).
        teacher_model: of a file of weights, its network.
        student: a network's name (empty: the task's).
        loss: what the teacher teaches by (None: the task's response loss).
        name: of the run (None: after the images).
        classes, columns: see `datasets.Images`.
        size: `data.image_size` (None: the task's).
        batch: `data.batch_size` (None: the task's).
        epochs: of the student and of its teacher (0: the task's).
        pretrained: whether networks begin with their public weights.
    """

    images: Path
    output: Path
    task: str = tasks.TASK
    teacher: str = ""
    teacher_model: str | None = None
    student: str = ""
    loss: str | None = None
    name: str | None = None
    classes: Sequence[str] = ()
    columns: Sequence[str] = ()
    size: str | None = None
    batch: int | None = None
    epochs: int = 0
    pretrained: bool = True

    @property
    def beginning(self) -> Beginning:
        return TASKS[self.task]


def write(wish: Wish) -> list[Path]:
    """Write a recipe that `kdkit check` accepts, and that of its teacher if it must be trained.

    Raises:
        KdkitError: the images, networks or the loss do not go together; nothing is written.
        OSError: a file exists already, or cannot be written.
    """
    if wish.task not in TASKS:
        raise RecipeError(f"--task: '{one_line(wish.task)}': {suggest(wish.task, TASKS)}")
    if wish.output.suffix not in RECIPES:
        raise RecipeError(f"--output: {wish.output}: write a file .yaml")
    usual = wish.beginning
    wish = replace(
        wish,
        teacher=wish.teacher or usual.teacher,
        student=wish.student or usual.student,
        epochs=wish.epochs or usual.epochs,
    )
    values = _values(wish)
    text = filled("recipe.yaml", {**values, "loss": usual.losses["response"]})
    files = {wish.output: text}
    if _is_network(wish.teacher):
        files[_teacher_file(wish)] = filled("teacher.yaml", {**values, **_shared(values, text)})
    refuse_existing(files)
    # before the slow import
    _refuse_suffixes(wish)
    from kdkit import recipe
    from kdkit.runs import checks

    with written(files):
        if wish.loss is not None:
            loss = _loss(wish.loss, wish.beginning, recipe.load(wish.output))
            wish.output.write_text(filled("recipe.yaml", {**values, "loss": loss}))
        checks.make(recipe.load(wish.output))
    return list(files)


@contextmanager
def written(files: Mapping[Path, str]) -> Iterator[None]:
    """Write files, and remove them if what follows fails."""
    write_new(files)
    try:
        yield
    except KdkitError as error:
        remove(list(files))
        raise RecipeError(f"{error}; nothing is written") from None
    except BaseException:
        remove(list(files))
        raise


def _values(wish: Wish) -> dict[str, str]:
    beginning = wish.beginning
    images = datasets.Images(wish.images, wish.output.parent, wish.classes, wish.columns)
    teacher, comment = _teacher(wish)
    section = datasets.section(wish.task, images)
    if wish.task == tasks.TEXTS:
        # a folder begins with `.` in both
        section["tokenizer"] = wish.student.removeprefix("hf/")
    size = wish.size or beginning.size
    share = "   # a test part, drawn" if isinstance(section.get("test"), float) else ""
    return {
        "images": one_line(wish.images.name or str(wish.images)),
        "file": one_line(wish.output.name),
        "name": _name(wish),
        "dataset": flow(section) + share,
        "size": f"  image_size: {size}   # one side, or [height, width], in pixels\n"
        if size
        else "",
        "batch": str(wish.batch or beginning.batch),
        "augmentation": f"{beginning.augmentation}\n" if beginning.augmentation else "",
        "student_network": _network(wish.student, wish),
        "teacher": one_line(wish.teacher),
        "student": one_line(wish.student),
        "teacher_network": teacher,
        "teacher_comment": comment,
        "network": _network(wish.teacher, wish),
        "label_loss": beginning.label_loss,
        "epochs": str(wish.epochs),
        "lr": beginning.lr,
        "warmup": str(max(1, wish.epochs // 15)),
    }


def _shared(values: Mapping[str, str], recipe: str) -> dict[str, str]:
    """Return what a teacher's recipe has of the student's: all, by `extends`, or only two sections
    where its network does not know all keys of the student's, which `extends` would merge in.
    """
    keys, known = (yaml.safe_load(values[name]).keys() for name in ("student_network", "network"))
    if keys <= known:
        says = "# Data and training are those of {file}; keys here replace them.\nextends: {file}\n"
        return {"extends": says.format(file=values["file"]), "sections": ""}
    sections = re.findall(r"^(?:data|train):\n(?:  .*\n)+", recipe, re.MULTILINE)
    return {"extends": "", "sections": "".join(sections)}


def _name(wish: Wish) -> str:
    """Return the run's name: the user's, or the images' made fit for a folder."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", wish.images.resolve().stem).strip("-._")
    return flow(wish.name or f"{plain or 'images'}-{_last(wish.student)}")


def _last(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model.rpartition("/")[2]) or "student"


def _network(model: str, wish: Wish) -> str:
    """Return the section of a network: SOURCE/NAME as it is, a bare name within the task's."""
    if "/" in model:
        from kdkit.recipe import registry

        source = registry.load().models.get(model.partition("/")[0])
        weights = source is not None and "pretrained" in source.Options.model_fields
        return flow({"model": model, **({"pretrained": wish.pretrained} if weights else {})})
    told = {"backbone": flow(model), "pretrained": flow(wish.pretrained)}
    return Template(wish.beginning.network).substitute(told)


def _teacher(wish: Wish) -> tuple[str, str]:
    """Return the teacher's section, and what is to be known of it."""
    path = Path(wish.teacher)
    beside = datasets.relative(path, wish.output.parent)
    if path.suffix in RECIPES:
        return flow({"recipe": beside}), "another recipe trains it, first and once"
    if path.suffix in WEIGHTS:
        network = _network(wish.teacher_model or "", wish)
        weights = f"{network[:-1].replace(f', pretrained: {flow(wish.pretrained)}', '')}"
        return (
            f"{weights}, checkpoint: {flow(beside)}}}",
            "its weights have to fit this network and these classes; `normalize` says what pixels"
            " it expects",
        )
    file = _teacher_file(wish).name
    return flow({"recipe": file}), f"{file} trains it on these images, first and once"


def _is_network(teacher: str) -> bool:
    return Path(teacher).suffix not in (*WEIGHTS, *RECIPES)


def _teacher_file(wish: Wish) -> Path:
    return wish.output.with_stem(f"{wish.output.stem}-teacher")


def _refuse_suffixes(wish: Wish) -> None:
    """Refuse a file as teacher that is not there, or weights without a network."""
    path = Path(wish.teacher).expanduser()
    if _is_network(wish.teacher):
        return
    if not path.is_file():
        raise RecipeError(f"--teacher: {path}: no such file")
    if path.suffix in WEIGHTS and not wish.teacher_model:
        raise RecipeError(f"--teacher-model: name the network whose weights {path} holds")


def _loss(name: str, beginning: Beginning, loaded: Recipe) -> str:
    """Return the section of a loss, with layers if it has to be told some."""
    from kdkit.start.stages import last_stages

    losses = loaded.plugins.losses
    if name not in losses:
        raise RecipeError(f"--loss: no loss is called '{one_line(name)}'; {suggest(name, losses)}")
    usual = [text for text in beginning.losses.values() if text.startswith(f"{{use: {name}")]
    layers = losses[name].Options.model_fields.get("layers")
    if len(usual) == 1 and usual[0].count("use:") == 1:
        text = usual[0]
    elif layers is None or not layers.is_required():
        text = flow({"use": name})
    else:
        pair = PENULTIMATE if losses[name].knowledge == "relation" else beginning.layers
        text = f"{{use: {name}, layers: [{pair}]}}"
    return Template(text).substitute(last_stages(loaded) if "$" in text else {})
