"""What `kdkit show` says of a run, finished or not: the recipe in brief, the result, the
learning curves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kdkit.errors import RunError
from kdkit.runs.folder import Result, RunFolder
from kdkit.students import curves
from kdkit.students.curves import Curve, Curves
from kdkit.terminal import printable

WIDTH = 48  # characters of a curve
UNTOLD = {"use", "name", "weight", "layers", "model", "recipe", "interpolation", "args"}
# values that say nothing of their own
USUAL: tuple[object, ...] = (None, False, "", 0, [], "eval", "logits")
TITLES = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "balanced_accuracy": "balanced acc. %",
    "macro_f1": "macro F1 %",
    "nll": "NLL, nats",
    "ece": "ECE %",
    "agreement": "agreement %",
    "kl_to_teacher": "KL to teacher, nats",
    "logit_difference": "mean |z_s - z_t|",
}


class Story:
    """A run folder, read for people. The recipe is read as plain data: no plugin is run, and
    none needs to be there.

    Raises:
        RunError: no run folder.
    """

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.recipe: dict[str, Any] = self.folder.plain_recipe()
        self.result: Result | None = self.folder.result()
        self.curves: Curves = curves.read(self.folder)

    def report(self) -> RenderableType:
        """All of it, for a rich console."""
        parts: list[RenderableType] = [_facts(brief(self.recipe)), Text()]
        parts += (
            list(_outcome(self.result)) if self.result else [_text(self._so_far(), style="yellow")]
        )
        if self.curves.epochs:
            parts += [Text(), _curve_table(self.curves)]
        return Group(*parts)

    def draw(self, file: Path | None = None) -> Path:
        """Write the learning curves as a picture (default: `curves.png` in the run folder);
        gives its path.

        Raises:
            RunError: no epoch has been finished, or the file cannot be written so.
        """
        if not self.curves.epochs:
            raise RunError(
                f"{self.folder.path}: has not finished an epoch, so there are no curves to draw"
            )
        path = file or self.folder.path / "curves.png"
        teacher = self.result.teacher["top1"] if self.result and self.result.teacher else None
        try:
            curves.draw(
                self.curves, f"{self.recipe['name']}, seed {self.recipe['seed']}", path, teacher
            )
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot be written: {' '.join(str(error).split())}") from None
        return path

    def picture(self, file: Path | None = None) -> str:
        """Draw the curves, and say where they are; empty where no epoch has been finished and no
        file was asked for.

        A run folder that cannot be written into is no error: all that is told of the run is told
        without the picture.

        Raises:
            RunError: the file that was asked for cannot be written.
        """
        if file is None and not self.curves.epochs:
            return ""
        try:
            return f"curves: {self.draw(file)}"
        except RunError as error:
            if file is not None:
                raise
            return f"no picture of the curves: {error}"

    def _so_far(self) -> str:
        done = f"{self.curves.epochs} epochs so far" if self.curves.epochs else "no epoch so far"
        return f"not finished: {done}; `kdkit train` with the same recipe goes on"


def brief(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(section, what it says) of a resolved recipe."""
    data, train = recipe["data"], recipe["train"]
    yield "run", f"{recipe['name']}, seed {recipe['seed']}"
    yield "student", _model(recipe["student"])
    if recipe.get("teacher"):
        yield "teacher", _model(recipe["teacher"])
    for number, teacher in enumerate(recipe.get("teachers", ()), 1):
        yield teacher.get("name") or f"teacher{number}", _model(teacher)
    yield "schedule", _named(recipe["schedule"])
    yield (
        "total",
        " + ".join(f"{_number(entry['weight'])} * {_named(entry)}" for entry in recipe["losses"]),
    )
    augment = [
        f"{key} ({', '.join(_on(data[key]))})"
        for key in ("augment", "timm_augment")
        if data.get(key)
    ]
    chosen = [
        f"{key} {data[key]}"
        for key in ("image_size", "train_samples", "train_fraction", "validation")
        if data.get(key)
    ]
    chosen += [f"repeats {data['repeats']}"] if data.get("repeats", 1) > 1 else []
    chosen += ["balanced classes"] if data.get("sampling") == "balanced" else []
    yield (
        "data",
        ", ".join([_named(data["dataset"]), *chosen, f"batches of {data['batch_size']}", *augment]),
    )
    optimizer = train["optimizer"]
    rate = f"lr {optimizer['lr']:g} {train['lr_schedule']['name']}"
    extra = [key for key in ("ema", "mixup", "compile") if train.get(key)]
    extra += [f"{key} {train[key]}" for key in ("average_best", "patience") if train.get(key)]
    decay = f", weight decay {optimizer['weight_decay']:g}" if optimizer["weight_decay"] else ""
    yield (
        "train",
        ", ".join(
            [
                f"{train['epochs']} epochs",
                f"{optimizer['name']}, {rate}{decay}",
                train["precision"],
                *extra,
            ]
        ),
    )


def _model(section: Mapping[str, Any]) -> str:
    name = section.get("model") or f"the student of {section['recipe']}"
    told = [
        *_on(section),
        *(f"{key} {_number(value)}" for key, value in (section.get("args") or {}).items()),
    ]
    return name + (f" ({', '.join(told)})" if told else "")


def _named(entry: Mapping[str, Any]) -> str:
    """A plugin with those of its options that are on."""
    pairs = [f"{pair['student']} ~ {pair['teacher']}" for pair in entry.get("layers", ())]
    told = ", ".join([*pairs, *_on(entry)])
    return str(entry.get("name") or entry["use"]) + (f" ({told})" if told else "")


def _on(options: Mapping[str, Any]) -> list[str]:
    def text(key: str, value: Any) -> str:
        return key if value is True else f"{key} {_number(value)}"

    return [
        text(key, value)
        for key, value in options.items()
        if key not in UNTOLD and value not in USUAL
    ]


def _number(value: Any) -> str:
    if isinstance(value, Mapping) and "to" in value:  # a ramp
        return f"({value['from']:g} -> {value['to']:g} in {value['epochs']:g} epochs)"
    if isinstance(value, Mapping):
        return f"({', '.join(f'{key} {_number(item)}' for key, item in value.items())})"
    if isinstance(value, list):
        return "-".join(map(_number, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(text: str, style: str = "") -> Text:
    """What a run's files say, which may be a stranger's."""
    return Text(printable(text), style)


def _facts(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for title, text in rows:
        table.add_row(title, _text(text))
    return table


def score_table(rows: Iterable[tuple[str, Mapping[str, float]]]) -> Table:
    """One row for each (who, metrics); a dash where a metric is not defined."""
    listed = list(rows)
    known = [key for key in TITLES if any(key in scores for _, scores in listed)]
    table = Table("", box=None, pad_edge=False, header_style="bold")
    for key in known:
        table.add_column(TITLES[key], justify="right")
    for who, scores in listed:
        table.add_row(who, *(_score(key, scores.get(key)) for key in known))
    return table


def _score(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if key in ("nll", "kl_to_teacher", "logit_difference") else f"{value:.2f}"


def _outcome(result: Result) -> Iterator[RenderableType]:
    rows = [(f"student, test, {result.moment}", result.test)]
    rows += (
        [(f"student, validation, {result.moment}", result.validation)] if result.validation else []
    )
    rows += [
        (f"student, {part}, last epoch", result.last[part])
        for part in ("test", "validation")
        if result.last
    ]
    if best := result.best:
        rows += [(f"student, test, epoch {best['epoch']} (best on validation)", best["test"])]
    rows += [(f"student {number}, test", scores) for number, scores in enumerate(result.peers, 2)]
    rows += [("ensemble, test", result.ensemble)] if result.ensemble else []
    rows += [("teacher, test", result.teacher)] if result.teacher else []
    yield score_table(rows)
    yield _text(
        f"{result.parameters:,} parameters, {result.epochs} epochs in the last stage, trained for"
        f" {result.seconds:,.0f} s"
    )
    for warning in result.warnings:
        yield _text(f"warning: {warning}", style="yellow")


def _curve_table(found: Curves) -> Table:
    table = Table("", box=None, pad_edge=False, header_style="bold")
    for title in ("first", "", "last", "lowest", "highest"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    for name, curve in found.top1.items():
        table.add_row(f"top-1 %, {name}", *_curve(curve, found.epochs, "{:.2f}"))
    for name, curve in found.losses.items():
        table.add_row(
            "training loss" if name == "loss" else f"  {name}, weighted",
            *_curve(curve, found.epochs, "{:.4g}"),
        )
    return table


def _curve(curve: Curve, epochs: int, number: str) -> list[str]:
    first, last, low, high = (
        number.format(v) for v in (curve.y[0], curve.y[-1], min(curve.y), max(curve.y))
    )
    return [first, curves.blocks(curve, epochs, WIDTH), last, low, high]
