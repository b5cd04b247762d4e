"""Measures the quantities of `kdkit profile`, and builds its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from kdkit.contracts.inputs import Shape, TextShape, as_image, is_text, kind_of, parse_shape
from kdkit.errors import ModelError, RunError
from kdkit.models.build import build_model
from kdkit.models.tapped import TappedModel
from kdkit.recipe import registry
from kdkit.recipe.explain import validated
from kdkit.recipe.types import source_of
from kdkit.students.loaded import LoadedRun
from kdkit.students.profile import Profile
from kdkit.units import hundredths, with_unit

DEFAULT_SHAPE: Shape = (3, 224, 224)
DEFAULT_TEXT = TextShape((16,))
DEFAULT_CLASSES = 1000


@dataclass(frozen=True)
class Subject:
    """A model to be measured, for images (C, H, W) or texts (N,)."""

    name: str
    model: TappedModel
    shape: Shape


def subjects(
    words: Sequence[str],
    size: str | None,
    classes: int | None,
    device: torch.device,
    plugins: tuple[Path, ...] = (),
) -> list[Subject]:
    """List each run's teacher and student, and named models with random weights.

    Args:
        words: run folders, and model names as a recipe has them.
        size: "C,H,W" (of texts "N", of square images their side) for all of them (None: a run's
            own; 3,224,224 without a run).
        classes: number of logits of named models (None: the first run's; 1000 without a run).
        device: the device to measure on.
        plugins: further plugin files or folders, including those of the runs that may run.

    Raises:
        RunError: neither a run folder nor a model, or an unfinished run.
        ModelError: a model cannot be built.
    """
    runs = {word: LoadedRun(Path(word), plugins=plugins) for word in words if Path(word).is_dir()}
    # networks that are only named are compared with the first run's
    first = next(iter(runs.values()), None)
    asked = parse_shape(size) if size else None
    shape = asked or (first.info.image_shape if first else None)
    number = classes or (first.info.outputs if first else DEFAULT_CLASSES)
    listed: list[Subject] = []
    for word in words:
        if word in runs:
            listed += _of_run(word, runs[word], asked, device)
        else:
            listed.append(_of_name(word, shape, number, device, plugins))
    return listed


def _of_run(
    word: str, run: LoadedRun, asked: Shape | None, device: torch.device
) -> Iterator[Subject]:
    whole, name = run.info.image_shape, Path(word).resolve().name
    # `--size 224` is a text's length or an image's side, which only the run tells
    if asked is not None and not is_text(whole):
        asked = as_image(asked, whole[0])
    if asked is not None and kind_of(asked) != kind_of(whole):
        raise ModelError(f"--size: {word} was trained on {kind_of(whole)}")
    # without a size, each network is given what it sees of a sample
    for teacher in run.teachers(device=device, answering=False):
        yield Subject(f"{name}: {teacher.role}", teacher, asked or run.seen_by(teacher))
    student = run.student(device=device)
    yield Subject(f"{name}: student", student, asked or run.seen_by(student))


def _of_name(
    word: str, shape: Shape | None, classes: int, device: torch.device, plugins: tuple[Path, ...]
) -> Subject:
    sources = registry.load(plugins).models
    try:
        source, name = source_of(word, sources)
    except ModelError as error:
        raise RunError(f"{word}: no such run folder, and {error}") from None
    prefix = f"{word}: needs options that only a recipe can give"
    options = validated(sources[source].Options, {"model": word}, prefix, ModelError)
    is_reader = sources[source].takes == "texts"
    taken = shape or DEFAULT_TEXT if is_reader else as_image(shape or DEFAULT_SHAPE)
    builder = sources[source](options, name)
    # as `train.channels_last: auto`, so that its time is that of a run's network
    last = device.type != "cpu"
    model = build_model(
        options, builder, classes, taken, role=word, device=device, channels_last=last
    )
    return Subject(word, model, taken)


def table(names: Sequence[str], profiles: Sequence[Profile]) -> Table:
    """Build a table of a column per model; from the second on, also as multiples of the first."""
    costs = Table("", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in names:
        costs.add_column(name, justify="right", overflow="fold")
    for title, value, text in _rows(profiles[0]):
        values = [value(profile) for profile in profiles]
        costs.add_row(
            title,
            text(values[0]),
            *(
                Text.assemble(text(v), "  ", (f"{_ratio(v, values[0]):>7}", "dim"))
                for v in values[1:]
            ),
        )
    return costs


def _rows(
    first: Profile,
) -> Iterator[tuple[str, Callable[[Profile], float], Callable[[float], str]]]:
    """List (title, quantity, formatter) of each row."""
    yield "parameters", lambda p: p.parameters, lambda v: f"{v:,.0f}"
    yield "multiply-accumulates per image", lambda p: p.macs, with_unit
    yield "safetensors file, bytes", lambda p: p.bytes, lambda v: f"{v:,.0f}"
    for position, latency in enumerate(first.latencies):
        for percent in (50, 90, 99):
            yield (
                f"batch {latency.batch}: p{percent}, ms",
                _milliseconds(position, percent),
                hundredths,
            )
        yield f"batch {latency.batch}: images/s", _throughput(position), lambda v: f"{v:,.0f}"


# functions that return functions: a lambda in the loop above would see the loop's last values
def _milliseconds(position: int, percent: float) -> Callable[[Profile], float]:
    return lambda profile: 1000 * profile.latencies[position].percentile(percent)


def _throughput(position: int) -> Callable[[Profile], float]:
    return lambda profile: profile.latencies[position].throughput


def _ratio(value: float, first: float) -> str:
    return f"x {value / first:.3g}" if first else ""
