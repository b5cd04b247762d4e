"""Opens the caches of a recipe: the form of the answers, the maximum size, the folder."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from kdkit.cache import fingerprint
from kdkit.cache.asked_ahead import AskedAhead
from kdkit.cache.given import STREAM, GivenAnswers, has_answers_alone, read_answers, read_layers
from kdkit.cache.packing import KeptAnswers, Slots, is_channels_last
from kdkit.cache.served import ServedTeacher
from kdkit.cache.store import SMALLER, AnswerStore
from kdkit.cache.teacher import TeacherCache, autocast
from kdkit.contracts.dataset_source import DataInfo, Stream
from kdkit.contracts.inputs import random_inputs
from kdkit.contracts.model_source import CacheOptions, RecipeTeacher, TeacherOptions
from kdkit.contracts.records import Outputs, tensors
from kdkit.data import beside
from kdkit.data.loaders import Data, TrainLoader
from kdkit.errors import RecipeError, RunError
from kdkit.models.devices import device_of
from kdkit.models.tapped import TappedModel
from kdkit.recipe import Recipe
from kdkit.units import gigabytes

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
DIRECTORY = "teacher-cache"
PROBE = 4  # images


def wanted(recipe: Recipe, name: str) -> CacheOptions | None:
    """Return the options of a teacher's cache, if the recipe has any."""
    options = recipe.spec.all_teachers()[name]
    return options.cache if isinstance(options, TeacherOptions) else None


def directory(recipe: Recipe, options: CacheOptions) -> Path:
    """Return the folder of the recipe's caches."""
    return options.dir or recipe.spec.run.folder / DIRECTORY


def open_cache(
    recipe: Recipe,
    name: str,
    teacher: TappedModel,
    info: DataInfo,
    train: TrainLoader,
    tell: Callable[[str], None] = lambda _: None,
) -> TeacherCache | None:
    """Open the cache of one of the recipe's teachers; None if it has no cache.

    Args:
        recipe: of the run.
        name: of the teacher.
        teacher: the model with its taps, on its device.
        info: of the data, as batches have them.
        train: the training batches.
        tell: called with a message about damage that is repaired.

    Raises:
        RecipeError: the answers cannot be kept (a stream of images, a random teacher), or they
            would take too much room.
    """
    if (options := wanted(recipe, name)) is None:
        return None
    key_path = [*recipe.spec.place_of(name), "cache"]
    part = recipe.dataset().split("train")
    if not train.indexed or isinstance(part, Stream):
        raise recipe.error(
            key_path,
            "this dataset can only be read from start to end, so its samples have no names to keep"
            " answers under",
        )
    mixed = recipe.spec.train.mixup is not None
    slots = Slots.of(options, recipe.spec.data, recipe.spec.seed, mixed=mixed)
    other = None if (source := recipe.unlabelled()) is None else source.split("train")
    assert not isinstance(other, Stream), "the loader has refused it"
    images = len(part) + (0 if other is None else len(other))
    try:
        kept = _look(recipe, options, teacher, info)
        key = fingerprint.key(recipe, name, teacher, kept, slots, part, other)
        store = _open_store(recipe, name, options, kept, slots, images, key, train)
    except RecipeError:
        raise
    except RunError as error:
        raise recipe.error(key_path, str(error)) from None
    return TeacherCache(
        store, kept, slots, images, AUTOCAST.get(recipe.spec.train.precision), teacher.role, tell
    )


def open_answers(
    recipe: Recipe,
    name: str,
    teacher: TappedModel,
    info: DataInfo,
    train: TrainLoader,
    tell: Callable[[str], None] = lambda _: None,
) -> TeacherCache | GivenAnswers | AskedAhead | None:
    """Open what answers in place of a teacher: its cache, given answers, its servers; None: itself.

    Raises:
        RecipeError: see `open_cache` and `read_answers`.
    """
    if (served := teacher.elsewhere) is not None:
        assert isinstance(served, ServedTeacher)
        served.tell_by(tell)
        return AskedAhead(served, teacher, AUTOCAST.get(recipe.spec.train.precision))
    if not has_answers_alone(recipe, name):
        return open_cache(recipe, name, teacher, info, train, tell)
    if not train.indexed:
        raise recipe.error([*recipe.spec.place_of(name), "model"], STREAM)
    outputs = int(cast("Any", teacher.module).outputs)
    rows = read_answers(recipe, name, beside.indexed(recipe.spec.data, info), outputs)
    kept = [layer for layer, place in teacher.layers.items() if place.path]
    return GivenAnswers(rows, teacher, read_layers(recipe, name, kept))


@contextlib.contextmanager
def answering(
    recipe: Recipe,
    teachers: Mapping[str, TappedModel],
    opened: Data,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Data]:
    """Let teachers with a cache answer from it inside the block; yield data for the caches.

    `tell` is called with a message about damage that is repaired.

    Raises:
        RecipeError: see `open_cache`.
    """
    train = opened.train
    with contextlib.ExitStack() as stack:
        for name, teacher in teachers.items():
            cache = open_answers(recipe, name, teacher, opened.info, opened.train, tell)
            if cache is None:
                continue
            stack.callback(cache.close)
            stack.callback(setattr, teacher, "answers", teacher.answers)
            # each cache sees the views that the one around it asks for
            train = cache.loader(train)
            teacher.answers = functools.partial(cache.answer, forward=teacher.forward)
        yield replace(opened, train=train)


def _look(
    recipe: Recipe, options: CacheOptions, teacher: TappedModel, info: DataInfo
) -> KeptAnswers:
    """Ask the teacher twice about noise, for the form of its answers and whether they repeat."""
    # not the teacher itself, which may be compiled for batches of another size
    plain = teacher.twin()
    plain.layers = teacher.layers
    plain.needs_logits = teacher.needs_logits
    device = device_of(teacher.module)
    noise = random_inputs(info.train_shape, PROBE, device)
    with torch.no_grad(), autocast(device, AUTOCAST.get(recipe.spec.train.precision)):
        answer, again = plain.forward(noise), plain.forward(noise)
    if not _same(answer, again, exactly=device.type == "cpu"):
        raise RunError(
            f"{teacher.role} answers the same samples twice in different ways, so that its answers"
            " cannot be kept"
        )
    aliases = [
        name
        for name, layer in teacher.layers.items()
        if teacher.needs_logits and not layer.path and layer.side == "output"
    ]
    shapes = {
        name: tuple(value.shape[1:])
        for name, value in answer.features.items()
        if name not in aliases
    }
    last = [name for name in shapes if is_channels_last(answer.features[name])]
    if not shapes and not teacher.needs_logits:
        raise RunError(f"no loss reads anything that {teacher.role} says; leave `cache` out")
    logits = tuple(answer.logits.shape[1:]) if teacher.needs_logits else ()
    axis = recipe.task.answer_axis
    return KeptAnswers(options, logits, teacher.needs_logits, shapes, aliases, last, axis)


def _open_store(
    recipe: Recipe,
    name: str,
    options: CacheOptions,
    kept: KeptAnswers,
    slots: Slots,
    images: int,
    key: dict[str, Any],
    train: TrainLoader,
) -> AnswerStore:
    spec, called = recipe.spec, called_in(recipe, name)
    about = {
        "teacher": called,
        "data": spec.data.dataset.use,
        "views": slots.count,
        "images": images,
        "made": time.time(),
        "key": key,
    }
    path = directory(recipe, options) / folder_name(called, key)
    store = AnswerStore(path, kept.columns(), slots.count * images, about)
    # of the images that this run trains on; other runs may have written the same ones
    indices = train.indices.cpu()
    grown = store.allocated() + sum(
        store.missing_bytes(slot * images + indices) for slot in range(slots.count)
    )
    if grown > options.max_gb * 1e9:
        store.close()
        says = (
            f"may take {gigabytes(grown)} ({slots.count} views of {train.num_samples:,} samples,"
            f" {kept.bytes:,} bytes each)"
        )
        raise recipe.error(
            [*spec.place_of(name), "cache", "max_gb"],
            f"the cache {says}, `max_gb` is {options.max_gb:g}; {SMALLER}",
        )
    return store


def folder_name(called: str, key: Mapping[str, Any]) -> str:
    """Return the name of a store's folder: that of what is kept, and a fingerprint of its key."""
    # a model's name may hold slashes and colons
    label = "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in called)
    return f"{label}-{fingerprint.fingerprint(key)[:16]}"


def called_in(recipe: Recipe, name: str) -> str:
    """Return the usual name of a teacher: its network, or the recipe that trains it."""
    options = recipe.spec.all_teachers()[name]
    return options.recipe.stem if isinstance(options, RecipeTeacher) else options.model


def _same(answer: Outputs, again: Outputs, *, exactly: bool) -> bool:
    """Check whether two answers agree, up to another summation order unless `exactly`."""
    pairs = list(zip(tensors(answer), tensors(again), strict=True))
    if exactly:
        return all(torch.equal(a, b) for a, b in pairs)
    return all(
        torch.allclose(a, b, rtol=0, atol=1e-3 * float(a.abs().max()), equal_nan=True)
        for a, b in pairs
    )
