"""Fills the teacher caches of a recipe before its training, writes them out, lists them."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from kdkit.cache import export
from kdkit.cache.folder import Found, look
from kdkit.cache.opening import called_in, open_cache, wanted
from kdkit.cache.packing import Slots
from kdkit.cache.parts import MOST, Parts
from kdkit.cache.teacher import Forward, TeacherCache
from kdkit.contracts.known_answers import AnswerIndex
from kdkit.contracts.model_source import CacheOptions
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


def fill(recipe: Recipe, *, quiet: bool = False, spread: bool = False) -> list[Found]:
    """Ask the teachers that have a `cache` for every view of every training image, leaving existing
    answers as they are; return the filled caches.

    Args:
        recipe: whose caches are filled.
        quiet: show no progress.
        spread: share the work with other processes that do the same.

    Raises:
        RecipeError: no teacher has one, or something does not fit.
        RunError: the disk is nearly full; the answers so far are kept.
    """
    paths = [cache.store.path for cache in _filled(recipe, recipe.spec.data, quiet, spread)]
    return [look(path) for path in paths]


def write_out(recipe: Recipe, folder: Path, *, quiet: bool = False) -> AnswerIndex:
    """Fill the cache of the recipe's teacher for the dataset's whole training part, and write it as
    a folder of answers.

    Raises:
        RecipeError: as `fill`; several teachers have a cache, or images are shown in several views.
        RunError: as `fill` and `export.write`.
    """
    export.refuse_taken(folder)
    spec = recipe.spec
    options = _options(recipe)
    name = next(iter(options))
    place = [*spec.place_of(name), "cache"]
    if len(options) > 1:
        says = f"{len(options)} teachers have a cache, and a folder holds the answers of one"
        raise recipe.error(place, f"{says}; leave the others' `cache` out")
    slots = Slots.of(options[name], spec.data, spec.seed, mixed=False)
    if not slots.exact or slots.count > 1:
        says = "a folder of answers has one view, of images as they are; leave `augment`"
        raise recipe.error(["data"], f"{says}, `timm_augment` and `joint_augment` out")
    # those of other runs, too, which may train on images that this one leaves out
    every = {"train_samples": None, "train_fraction": None, "validation": None}
    whole = {} if spec.data.unlabelled is not None else every
    (index,) = [
        export.write(cache, folder, spec.data.dataset.use, called_in(recipe, name))
        for cache in _filled(recipe, spec.data.model_copy(update=whole), quiet)
    ]
    return index


def _options(recipe: Recipe) -> dict[str, CacheOptions]:
    """Return the options of all caches of a recipe, by teacher.

    Raises:
        RecipeError: there is none, or images are mixed.
    """
    spec = recipe.spec
    options = {name: one for name in spec.all_teachers() if (one := wanted(recipe, name))}
    if not options:
        raise recipe.error(
            ["teacher"] if spec.teacher is not None or not spec.teachers else ["teachers"],
            "has no `cache:` that could be filled",
        )
    if spec.train.mixup is not None:
        says = "mixes are kept as training makes them, and cannot be asked for ahead or handed on"
        raise recipe.error(["train", "mixup"], says)
    return options


def _filled(
    recipe: Recipe, data: DataSpec, quiet: bool, spread: bool = False
) -> Iterator[TeacherCache]:
    """Yield each cache of a recipe, open, after filling it for the training images of `data`."""
    spec, options = recipe.spec, _options(recipe)
    checks.make(recipe, Reporter(quiet=quiet).say)
    trained = training.trained_teachers(recipe, spec.run.folder / spec.name, quiet=quiet)
    device = build_accelerator(spec.train).device
    exact = Slots.of(next(iter(options.values())), data, spec.seed, mixed=False).exact
    plain = {"augment": None} if exact else {}  # every outcome is visited in turn, without drawing
    source = recipe.dataset()
    prepared = loaders.prepare(
        data.model_copy(update={"drop_last": False, **plain}),
        source,
        recipe.task,
        seed=spec.seed,
        device=device,
        unlabelled=recipe.unlabelled(),
    )
    factory = ModelFactory(recipe, prepared.info, trained, device=device)
    for name in options:
        teacher = factory.teacher(name)
        cache = open_cache(
            recipe, name, teacher, prepared.info, prepared.train, Reporter(quiet=quiet).warn
        )
        assert cache is not None
        try:
            asking = _Asking(cache, _epochs(data, prepared), teacher.forward, name, quiet)
            asking.parts() if spread else asking.all()
            yield cache
        finally:
            cache.store.close()


def table(found: Sequence[Found]) -> Table:
    """Return a line for each cache."""
    rows = Table(
        "cache",
        "teacher",
        "data",
        "samples x views",
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

    def view(self, number: int, chosen: range) -> Iterator[Batch]:
        """Yield the chosen ones of all batches in a view."""
        length = len(self._train)
        for epoch in range(self._count):
            before = epoch * length
            start, stop = max(chosen.start - before, 0), min(chosen.stop - before, length)
            if start < stop:
                batches = self._train.epoch(epoch, start, view=number)
                yield from itertools.islice(batches, stop - start)


def _epochs(spec: DataSpec, prepared: loaders.Data) -> _Epochs:
    # several times through the labelled images until each unlabelled one has come beside them
    beside = (spec.batch_size - spec.labelled_size) * len(prepared.train)
    return _Epochs(prepared.train, -(-prepared.info.unlabelled // beside) if beside else 1)


@dataclass(frozen=True)
class _Asking:
    """One teacher, asked about the images of some epochs."""

    cache: TeacherCache
    train: _Epochs
    forward: Forward
    name: str
    quiet: bool

    def all(self) -> None:
        """Fill the cache."""
        self._ask(range(len(self.train)), self.cache, f"asking {self.name}")

    def parts(self) -> None:
        """Fill it together with other processes."""
        steps, store = len(self.train), self.cache.store
        parts = Parts(store, min(MOST, steps), self._is_full)
        # closed, so that a part is free again at once if this process does not go on with it
        with contextlib.closing(parts.free()) as free:
            for part, own in free:
                chosen = range(steps * part // parts.count, steps * (part + 1) // parts.count)
                says = f"asking {self.name}, part {part + 1} of {parts.count}"
                self._ask(chosen, replace(self.cache, store=own), says)
        parts.join()
        if not self._is_full():  # a row of a part was damaged
            self.all()

    def _is_full(self) -> bool:
        cache = self.cache
        rows = (cache.rows(slot, self.train.indices).cpu() for slot in range(cache.slots.count))
        return all(bool(cache.store.known(slot).all()) for slot in rows)

    def _ask(self, chosen: range, into: TeacherCache, says: str) -> None:
        saved = time.monotonic()
        console = Console()
        for rows, inputs in track(
            self._steps(chosen),
            says,
            total=self.cache.slots.count * len(chosen),
            console=console,
            transient=True,
            disable=self.quiet or not console.is_terminal,
        ):
            whole = into.store.whole(rows)
            if bool((into.store.known(rows) & ~whole).any()):
                into.tell_of_damage()
            if into is not self.cache:
                whole |= self.cache.store.whole(rows)
            if not bool(whole.all()):
                into.keep(rows, inputs, self.forward)
            if time.monotonic() - saved > BETWEEN_COMMITS:
                into.store.commit()
                saved = time.monotonic()

    def _steps(self, chosen: range) -> Iterator[Step]:
        """Yield every view of every image of the chosen batches, a few images at a time."""
        cache, slots = self.cache, self.cache.slots
        if slots.exact:
            for batch in self.train.view(0, chosen):
                for slot in range(slots.count):
                    outcome, images = (
                        torch.full_like(batch.index, slots.outcome(slot)),
                        batch.inputs,
                    )
                    # texts have one view
                    shown = (
                        crop_flip(images, outcome, slots.padding)
                        if isinstance(images, Tensor)
                        else images
                    )
                    yield cache.rows(slot, batch.index).cpu(), shown
            return
        for slot in range(slots.count):
            if bool(cache.store.whole(cache.rows(slot, self.train.indices).cpu()).all()):
                continue  # avoids reading the images
            for batch in self.train.view(slot, chosen):
                yield cache.rows(slot, batch.index).cpu(), batch.inputs


def _span(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"
