"""The output of `kdkit show` for a run: its recipe in brief, its result, its curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kdkit.contracts.model_source import InputOptions
from kdkit.contracts.task import ScoreInfo
from kdkit.errors import RunError
from kdkit.runs import pictures
from kdkit.runs.folder import RunFolder
from kdkit.runs.result import Result
from kdkit.students import curves
from kdkit.students.curves import Curve, Curves
from kdkit.terminal import printable

WIDTH = 48  # characters of a curve
MOST_NAMES = 20  # of classes
# options that stand elsewhere in the line, or say little about a run
UNTOLD = {"use", "name", "weight", "layers", "model", "recipe", "interpolation", "args"}
# values that need no mention
USUAL: tuple[object, ...] = (None, False, "", 0, [], "eval", "logits")


class Story:
    """A run folder, read for display as plain data: no plugin runs, and none has to exist.

    Raises:
        RunError: no run folder.
    """

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        # what an untrusted run names is not imported to show it
        self.recipe: dict[str, Any] = self.folder.plain_recipe()
        self.result: Result | None = self.folder.result()
        self.scores = self.folder.scores()
        self.curves: Curves = curves.read(self.folder)

    def report(self) -> RenderableType:
        """Return the whole report for a rich console."""
        blocks: list[RenderableType] = [_facts([*brief(self.recipe), *self._names()]), Text()]
        blocks += (
            list(_outcome(self.result, self.scores))
            if self.result
            else [_text(self._so_far(), style="yellow")]
        )
        blocks += [_text(f"made: {path}") for path in pictures.drawn(self.folder.path).values()]
        if self.curves.epochs:
            blocks += [Text(), _curve_table(self.curves, curves.deciding(self.scores))]
        return Group(*blocks)

    def _names(self) -> Iterator[tuple[str, str]]:
        """Describe the classes, labels or numbers that the network answers, if they have names."""
        names = self.folder.info().class_names if self.folder.marker.is_file() else ()
        if names:
            more = ", ..." if len(names) > MOST_NAMES else ""
            yield "outputs", f"{len(names)}: {', '.join(names[:MOST_NAMES])}{more}"

    def draw(self, file: Path | None = None) -> Path:
        """Write the learning curves as a picture (default: `curves.png`); return its path.

        Raises:
            RunError: no epoch has been finished, or the file cannot be written so.
        """
        if not self.curves.epochs:
            raise RunError(
                f"{self.folder.path}: has not finished an epoch, so there are no curves to draw"
            )
        path = file or self.folder.path / "curves.png"
        teacher = (self.result.teacher if self.result else None) or {}
        title = f"{self.recipe['name']}, seed {self.recipe['seed']}"
        score = curves.deciding(self.scores)
        try:
            curves.draw(self.curves, title, path, score, teacher.get(score.name))
        # matplotlib raises ValueError for an unknown suffix
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{path}: cannot be written: {reason}") from None
        return path

    def picture(self, file: Path | None = None) -> str:
        """Draw the curves, and return a line with their path; empty if nothing was drawn.

        A read-only run folder is no error: the report is then shown without the picture.

        Raises:
            RunError: the requested file cannot be written.
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
    """List (section, description) of a resolved recipe."""
    data, train = recipe["data"], recipe["train"]
    yield "run", f"{recipe['name']}, seed {recipe['seed']}"
    yield "student", _model(recipe["student"])
    if recipe.get("teacher"):
        yield "teacher", _model(recipe["teacher"])
    for number, teacher in enumerate(recipe.get("teachers", ()), 1):
        yield teacher.get("name") or f"teacher{number}", _model(teacher)
    yield "schedule", _named(recipe["schedule"])
    terms = (f"{_number(entry['weight'])} * {_named(entry)}" for entry in recipe["losses"])
    yield "total", " + ".join(terms)
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
    if data.get("synthetic_batches"):
        chosen.append(f"{data['synthetic_batches']} batches an epoch without training images")
    chosen += [f"repeats {data['repeats']}"] if data.get("repeats", 1) > 1 else []
    chosen += ["balanced classes"] if data.get("sampling") == "balanced" else []
    batches = f"batches of {data['batch_size']}"
    yield "data", ", ".join([_named(data["dataset"]), *chosen, batches, *augment])
    optimizer = train["optimizer"]
    rate = f"lr {optimizer['lr']:g} {train['lr_schedule']['name']}"
    extra = [key for key in ("ema", "mixup", "compile") if train.get(key)]
    extra += [f"{key} {train[key]}" for key in ("average_best", "patience") if train.get(key)]
    decay = f", weight decay {optimizer['weight_decay']:g}" if optimizer["weight_decay"] else ""
    steps = [f"{train['epochs']} epochs", f"{optimizer['name']}, {rate}{decay}"]
    yield "train", ", ".join([*steps, train["precision"], *extra])


def _model(section: Mapping[str, Any]) -> str:
    name = section.get("model") or f"the student of {section['recipe']}"
    arguments = (section.get("args") or {}).items()
    rest = {key: value for key, value in section.items() if key != "input"}
    options = [*_on(rest), *(f"{key} {_number(value)}" for key, value in arguments)]
    if section.get("input"):
        options.append(f"sees {InputOptions.model_validate(section['input'])}")
    return name + (f" ({', '.join(options)})" if options else "")


def _named(entry: Mapping[str, Any]) -> str:
    """Describe a plugin with those of its options that are set."""
    pairs = [f"{pair['student']} ~ {pair['teacher']}" for pair in entry.get("layers", ())]
    options = ", ".join([*pairs, *_on(entry)])
    return str(entry.get("name") or entry["use"]) + (f" ({options})" if options else "")


def _on(options: Mapping[str, Any]) -> list[str]:
    def text(key: str, value: Any) -> str:
        return key if value is True else f"{key} {_number(value)}"

    return [
        text(key, value)
        for key, value in options.items()
        if key not in UNTOLD and value not in USUAL
    ]


def _number(value: Any) -> str:
    if isinstance(value, Mapping) and {"from", "to"} <= value.keys():  # the value is a ramp
        return f"({value['from']:g} -> {value['to']:g} in {value['epochs']:g} epochs)"
    if isinstance(value, Mapping):
        return f"({', '.join(f'{key} {_number(item)}' for key, item in value.items())})"
    if isinstance(value, list):
        return "-".join(map(_number, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(text: str, style: str = "") -> Text:
    """Make a text from a run's files safe to print, as they may come from a stranger."""
    return Text(printable(text), style)


def _facts(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for title, text in rows:
        table.add_row(title, _text(text))
    return table


def score_table(
    rows: Iterable[tuple[str, Mapping[str, float]]], scores: Sequence[ScoreInfo]
) -> Table:
    """Build a table of a row per (who, values by name), a column per score; dash: undefined."""
    listed = list(rows)
    known = [s for s in scores if not s.part_of and any(s.name in values for _, values in listed)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(no_wrap=True)
    for score in known:
        table.add_column(score.heading, justify="right", overflow="fold")
    for who, values in listed:
        cells = (s.number(values[s.name]) if s.name in values else "-" for s in known)
        table.add_row(who, *cells)
    return table


def _outcome(result: Result, scores: Sequence[ScoreInfo]) -> Iterator[RenderableType]:
    rows = [(f"student, test, {result.moment}", result.test)]
    rows += (
        [(f"student, validation, {result.moment}", result.validation)] if result.validation else []
    )
    rows += [
        (f"student, {split}, last epoch", result.last[split])
        for split in ("test", "validation")
        if result.last
    ]
    if best := result.best:
        rows += [(f"student, test, epoch {best['epoch']} (best on validation)", best["test"])]
    rows += [(f"student {number}, test", peer) for number, peer in enumerate(result.peers, 2)]
    rows += [("ensemble, test", result.ensemble)] if result.ensemble else []
    rows += [("teacher, test", result.teacher)] if result.teacher else []
    yield score_table(rows, scores)
    yield from map(_text, _parts(result.test, scores))
    yield _text(
        f"{result.parameters:,} parameters, {result.epochs} epochs in the last stage, trained for"
        f" {result.seconds:,.0f} s"
    )
    for warning in result.warnings:
        yield _text(f"warning: {warning}", style="yellow")


def _parts(test: Mapping[str, float], scores: Sequence[ScoreInfo]) -> Iterator[str]:
    """Describe the scores of classes, labels or numbers, a line for each kind."""
    for whole in dict.fromkeys(score.part_of for score in scores if score.part_of):
        told = [s for s in scores if s.part_of == whole and s.name in test]
        if told:
            values = ", ".join(f"{s.title} {s.number(test[s.name])}" for s in told[:MOST_NAMES])
            more = f", ... ({len(told)} in all)" if len(told) > MOST_NAMES else ""
            yield f"{replace(told[0], title=whole).heading}, test: {values}{more}"


def _curve_table(run: Curves, score: ScoreInfo) -> Table:
    table = Table("", box=None, pad_edge=False, header_style="bold")
    for title in ("first", "", "last", "lowest", "highest"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    for split, curve in run.of(score).items():
        cells = _curve(curve, run.epochs, score.number)
        table.add_row(f"{score.heading}, {split}", *cells)
    for name, curve in run.losses.items():
        title = "training loss" if name == "loss" else f"  {name}, weighted"
        table.add_row(title, *_curve(curve, run.epochs, "{:.4g}".format))
    return table


def _curve(curve: Curve, epochs: int, number: Callable[[float], str]) -> list[str]:
    first, last, low, high = map(number, (curve.y[0], curve.y[-1], min(curve.y), max(curve.y)))
    return [first, curves.blocks(curve, epochs, WIDTH), last, low, high]
