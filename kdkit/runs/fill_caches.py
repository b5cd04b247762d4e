"""Fills the teacher caches of a recipe before its training, and lists caches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from kdkit.cache.folder import Found, look
from kdkit.cache.opening import open_cache, wanted
from kdkit.cache.packing import Slots
from kdkit.cache.teacher import Forward, TeacherCache
from kdkit.contracts.records import Batch, Inputs
from kdkit.data import loaders
from kdkit.data.augment import crop_flip
from kdkit.data.loaders import TrainLoader
from kdkit.engine.accelerator import build_accelerator
from kdkit.recipe import Recipe
from kdkit.recipe.data_section import DataSpec
from kdkit.runs import checks, training
from kdkit.runs.networks import ModelFactory
from kdkit.runs.progress import Reporter
from kdkit.units import gigabytes

BETWEEN_COMMITS = 10.0  # seconds

Step = tuple[Tensor, Inputs]  # rows of the store and their images


def fill(recipe: Recipe, *, quiet: bool = False) -> list[Found]:
    """Ask the teachers that have a `cache` for every view of every training image, leaving existing
    answers as they are; return the filled caches.

    Raises:
        RecipeError: no teacher has one, or something does not fit.
        RunError: the disk is nearly full; the answers so far are kept.
    """
    spec = recipe.spec
    options = {name: one for name in spec.all_teachers() if (one := wanted(recipe, name))}
    if not options:
        raise recipe.error(
            ["teacher"] if spec.teacher is not None or not spec.teachers else ["teachers"],
            "has no `cache:` that could be filled",
        )
    checks.make(recipe, Reporter(quiet=quiet).say)
    trained = training.trained_teachers(recipe, spec.run.folder / spec.name, quiet=quiet)
    device = build_accelerator(spec.train).device
    exact = Slots.of(next(iter(options.values())), spec.data, spec.seed).exact
    plain = {"augment": None} if exact else {}  # every outcome is visited in turn, without drawing
    source = recipe.dataset()
    prepared = loaders.prepare(
        spec.data.model_copy(update={"drop_last": False, **plain}),
        source,
        recipe.task,
        seed=spec.seed,
        device=device,
        unlabelled=recipe.unlabelled(),
    )
    factory = ModelFactory(recipe, prepared.info, trained, device=device)
    filled = []
    for name in options:
        teacher = factory.teacher(name)
        cache = open_cache(
            recipe, name, teacher, prepared.info, prepared.train, Reporter(quiet=quiet).warn
        )
        assert cache is not None
        try:
            _fill(cache, _epochs(spec.data, prepared), teacher.forward, name, quiet)
        finally:
            cache.store.close()
        filled.append(look(cache.store.path))
    return filled


def table(found: Sequence[Found]) -> Table:
    """Return a line for each cache."""
    rows = Table(
        "cache",
        "teacher",
        "data",
        "images x views",
        "filled",
        "on disk",
        "last written",
        box=None,
        pad_edge=False,
    )
    for one in found:
        about = one.about
        if about is None:
            rows.add_row(
                one.path.name,
                "(cache.json is damaged)",
                "",
                "",
                "",
                gigabytes(one.bytes),
                f"{_span(time.time() - one.written)} ago",
            )
            continue
        share = f"{100 * one.filled / about['count']:.1f} %"
        rows.add_row(
            one.path.name,
            about["teacher"],
            about["data"],
            f"{about['images']:,} x {about['views']}",
            share,
            gigabytes(one.bytes),
            f"{_span(time.time() - one.written)} ago",
        )
    return rows


class _Epochs:
    """As many epochs as it takes to see every image, in one view."""

    def __init__(self, train: TrainLoader, count: int) -> None:
        self.indices = train.indices
        self._train, self._count = train, count

    def __len__(self) -> int:
        return self._count * len(self._train)

    def view(self, number: int) -> Iterator[Batch]:
        """Yield the batches in a view."""
        for epoch in range(self._count):
            yield from self._train.epoch(epoch, view=number)


def _epochs(spec: DataSpec, prepared: loaders.Data) -> _Epochs:
    # several times through the labelled images until each unlabelled one has come beside them
    beside = (spec.batch_size - spec.labelled_size) * len(prepared.train)
    return _Epochs(prepared.train, -(-prepared.info.unlabelled // beside) if beside else 1)


def _fill(cache: TeacherCache, train: _Epochs, forward: Forward, name: str, quiet: bool) -> None:
    saved = time.monotonic()
    steps = cache.slots.count * len(train)
    console = Console()
    hidden = quiet or not console.is_terminal
    for rows, inputs in track(
        _steps(cache, train),
        f"asking {name}",
        total=steps,
        console=console,
        transient=True,
        disable=hidden,
    ):
        whole = cache.store.whole(rows)
        if bool((cache.store.known(rows) & ~whole).any()):
            cache.tell_of_damage()
        if not bool(whole.all()):
            cache.keep(rows, inputs, forward)
        if time.monotonic() - saved > BETWEEN_COMMITS:
            cache.store.commit()
            saved = time.monotonic()


def _steps(cache: TeacherCache, train: _Epochs) -> Iterator[Step]:
    """Yield every view of every image, a few images at a time."""
    slots = cache.slots
    if slots.exact:
        for batch in train.view(0):
            for slot in range(slots.count):
                outcome, images = torch.full_like(batch.index, slots.outcome(slot)), batch.inputs
                # texts have one view
                shown = (
                    crop_flip(images, outcome, slots.padding)
                    if isinstance(images, Tensor)
                    else images
                )
                yield cache.rows(slot, batch.index).cpu(), shown
        return
    for slot in range(slots.count):
        if bool(cache.store.whole(cache.rows(slot, train.indices).cpu()).all()):
            continue  # avoids reading the images
        for batch in train.view(slot):
            yield cache.rows(slot, batch.index).cpu(), batch.inputs


def _span(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"
