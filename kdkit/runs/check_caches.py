"""Checks of teacher caches: which parts of a recipe cannot be cached, and how large each cache may
grow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kdkit.cache import given, served
from kdkit.cache.given import has_answers_alone
from kdkit.cache.opening import wanted
from kdkit.cache.packing import KeptAnswers, Slots
from kdkit.cache.store import SMALLER
from kdkit.cache.teacher import OTHER_IMAGES
from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.inputs import first_tensor, is_text
from kdkit.contracts.known_answers import NETWORK_KEYS, TopK
from kdkit.contracts.model_source import CacheOptions, StudentOptions, TeacherOptions
from kdkit.contracts.records import Batch, Inputs, Outputs
from kdkit.contracts.schedule import Stage
from kdkit.engine.scores import scores_of
from kdkit.errors import RecipeError
from kdkit.models.given_answers import looks_like
from kdkit.models.tapped import TappedModel
from kdkit.recipe import Recipe, models_in
from kdkit.runs.networks import ModelFactory
from kdkit.runs.wanted import looking_at, needs_network
from kdkit.units import gigabytes

Shapes = Mapping[str, tuple[int, ...]]
DRAWN = (
    "the teacher sees a crop that is drawn for each step (`input.crop.place: random`), so its"
    " answers cannot be kept; leave one of them out"
)


def refused(recipe: Recipe, factory: ModelFactory, info: DataInfo) -> Iterator[str]:
    """Yield a line for each thing that a cache's options ask for and that is impossible."""
    spec, views = recipe.spec, set()
    for name in spec.all_teachers():
        yield from _refused_served(recipe, factory, name)
    for name, options in _wanted(recipe):
        teacher, place = spec.all_teachers()[name], [*spec.place_of(name), "cache"]
        assert isinstance(teacher, TeacherOptions)
        views.add(options.views)
        own = factory.teacher_options(name)
        if own is not None and own.input is not None and own.input.is_drawn:
            yield recipe.problem(place, DRAWN)
        for says in _never_again(recipe, teacher):
            yield recipe.problem(place, says)
        ever_new = [f"data.{k}" for k in ("timm_augment", "joint_augment") if getattr(spec.data, k)]
        ever_new += ["train.mixup"] if spec.train.mixup else []
        if options.views == "all" and ever_new:
            says = (
                f"`{ever_new[0]}` gives ever new views, so that not all can be kept; say how"
                " many, or leave it out"
            )
            yield recipe.problem([*place, "views"], says)
        if len(views) > 1:
            says = (
                "all teachers see the same samples, so the caches of all must have the same `views`"
            )
            yield recipe.problem([*place, "views"], says)
        for key, says in _unreadable(recipe, factory, info, name, options):
            yield recipe.problem([*place, key], says)


def _refused_served(recipe: Recipe, factory: ModelFactory, name: str) -> Iterator[str]:
    """Yield a line for each thing that the recipe asks of a served teacher and that is
    impossible.
    """
    if not served.addresses(recipe, name):
        return
    place = [*recipe.spec.place_of(name), "at"]
    if wanted(recipe, name) is not None:
        yield recipe.problem(
            place, "answers that come from a server are not kept; leave `cache` out"
        )
    if needs_network(recipe, name):
        yield recipe.problem(
            place, f"a loss reads the weights of {name}, which are elsewhere; leave it out"
        )
    if recipe.spec.data.synthetic_batches is not None:
        yield recipe.problem(
            place, f"images are made by gradients through {name}, and its network is elsewhere"
        )
    if showing := [score.name for score in scores_of(recipe, factory.info) if score.shown]:
        says = f"'{showing[0]}' needs gradients through {name}, and its network is elsewhere"
        yield recipe.problem(place, says)
    own = factory.teacher_options(name)
    if own is not None and own.input is not None and own.input.is_drawn:
        yield recipe.problem(
            place, "what it sees is drawn for each step (`input.crop.place: random`), here alone"
        )


def _never_again(recipe: Recipe, teacher: TeacherOptions) -> Iterator[str]:
    """Yield the reasons for which an answer is of no use for a later batch."""
    if recipe.spec.train.mixup is not None and recipe.spec.train.mixup.off_epoch:
        yield (
            "epochs of kept mixes repeat, and later ones are not mixed (`train.mixup.off_epoch`);"
            " leave one of them out, or let the teacher answer beside the training (`at`, `kdkit"
            " serve`)"
        )
    if key := recipe.spec.data.repeating:
        yield (
            f"repeated samples (`data.{key}`) come in ever new views, of which answers are not"
            " kept; leave one of them out"
        )
    if teacher.mode == "train":
        yield (
            "with `mode: train` an answer depends on the whole batch, and cannot be kept for each"
            " sample"
        )


def _unreadable(
    recipe: Recipe, factory: ModelFactory, info: DataInfo, name: str, options: CacheOptions
) -> Iterator[tuple[str, str]]:
    """Yield what a loss reads of the teacher and the cache does not store: the key, and the
    reason.
    """
    layers = [layer for layer in factory.teacher_layers(name) if layer != "logits"]
    if options.what == "logits" and layers:
        yield "what", f"losses look at {', '.join(layers)}, which is not kept; write `what: taps`"
    if options.top_k is None:
        return
    if recipe.task.rows_are != "classes":
        says = f"keeps the likeliest classes, and task '{recipe.task.name}' has rows of"
        yield "top_k", f"{says} {recipe.task.rows_are}; leave it out"
    # Keeping indices beside all values would only take more space.
    if options.top_k >= (classes := recipe.task.row_width(info)):
        yield (
            "top_k",
            f"{options.top_k} of {classes} classes; leave it out to keep all logits",
        )
    for called in _reading_all_logits(recipe, factory, name):
        yield (
            "top_k",
            f"'{called}' compares all logits, of which the smaller ones would not be kept",
        )


def _reading_all_logits(recipe: Recipe, factory: ModelFactory, name: str) -> Iterator[str]:
    """Yield the names of losses that may read any logit of a teacher."""
    for called, entry in zip(recipe.loss_names(), recipe.spec.losses, strict=True):
        loss = recipe.plugins.losses[entry.use]
        # Losses on responses read softened probabilities, of which the likeliest are kept exactly.
        whole = loss.knowledge not in ("response", "labels") and loss.needs_teacher_logits
        if entry in looking_at(factory.recipe, name) and (
            whole or any(pair.teacher == "logits" for pair in entry.taps())
        ):
            yield called


def sizes(
    recipe: Recipe,
    factory: ModelFactory,
    info: DataInfo,
    num_train: int,
    shapes: Mapping[str, Shapes],
) -> Iterator[tuple[str, str | None]]:
    """Yield for each cache how large it may grow, in words, and how that exceeds the recipe's limit
    (None: it does not).

    Args:
        recipe: the recipe.
        factory: knows which teachers have the data's classes.
        info: class count.
        num_train: number of training images.
        shapes: of the layers tapped of each teacher, by its name.
    """
    for name, options in _wanted(recipe):
        mixed = recipe.spec.train.mixup is not None
        slots = Slots.of(options, recipe.spec.data, recipe.spec.seed, mixed=mixed)
        taps = {layer: shape for layer, shape in shapes[name].items() if layer != "logits"}
        place = [*recipe.spec.place_of(name), "cache"]
        if (
            options.what == "taps"
            and is_text(info.image_shape)
            and (long := [layer for layer, shape in taps.items() if len(shape) > 1])
        ):
            says = (
                f"{', '.join(long)}: as long as the longest text of a batch, which is another one"
                " each time; keep logits, or vectors"
            )
            yield says, recipe.problem([*place, "what"], says)
            continue
        answer = tuple(recipe.task.random_answer(info, 1).logits.shape[1:])
        axis = recipe.task.answer_axis
        kept = KeptAnswers(options, answer, factory.classes.are_known(name), taps, axis=axis)
        # An upper bound: rows are filled as images are seen, and the files are sparse.
        size = slots.count * num_train * kept.bytes
        views = "1 view" if slots.count == 1 else f"{slots.count} views"
        says = (
            f"up to {gigabytes(size)} ({views} of {num_train:,} samples, {kept.bytes:,} bytes each)"
        )
        large = size > options.max_gb * 1e9
        problem = (
            recipe.problem(
                [*place, "max_gb"],
                f"the cache may take {says}, `max_gb` is {options.max_gb:g}; {SMALLER}",
            )
            if large
            else None
        )
        yield f"the answers of {name} are kept, {says}", problem


def refused_answers(recipe: Recipe, factory: ModelFactory, name: str) -> Iterator[str]:
    """Yield a line for each thing that the recipe asks of a teacher without a network and that is
    impossible.
    """
    spec, place = recipe.spec, recipe.spec.place_of(name)
    teacher = spec.all_teachers()[name]
    for key in NETWORK_KEYS:
        # A key at its default says nothing, whether it is written or not.
        if getattr(teacher, key) != type(teacher).model_fields[key].default:
            yield recipe.problem(
                [*place, key],
                "says how a network is built or asked, and answers alone have none; leave it out",
            )
    for section, key in (("data", "augment"), ("data", "timm_augment"), ("train", "mixup")):
        if getattr(getattr(spec, section), key) is not None:
            yield recipe.problem(
                [section, key],
                f"changes images, and {name} has answers to them as they are; leave it out",
            )
    # Schedules may name students of their own, which begin with a teacher's layers as well.
    for where, model in models_in({"student": spec.student, "schedule": spec.schedule}):
        if (
            isinstance(model, StudentOptions)
            and model.init is not None
            and model.init.from_ == name
        ):
            yield recipe.problem(
                [*where, "init"], f"{name} has answers alone, and no weights to begin with"
            )
    yield from _refused_losses(recipe, factory, name)


def _refused_losses(recipe: Recipe, factory: ModelFactory, name: str) -> Iterator[str]:
    """List losses that read more of a teacher than its answers."""
    source = given.source_of(recipe, name)
    for i, entry in enumerate(recipe.spec.losses):
        loss = recipe.plugins.losses[entry.use]
        if loss.knowledge == "labels" or entry not in looking_at(factory.recipe, name):
            continue
        layers = [pair.teacher for pair in entry.taps() if pair.teacher != "logits"]
        if layers and not source.layers():
            yield recipe.problem(
                ["losses", i],
                f"'{entry.use}' looks at '{layers[0]}' of {name}, which has answers alone, and no"
                " layers",
            )
        elif loss.needs_networks:
            yield recipe.problem(
                ["losses", i], f"'{entry.use}' reads the network of {name}, which has answers alone"
            )


def refused_largest(
    recipe: Recipe, factory: ModelFactory, name: str, rows: Tensor | TopK
) -> Iterator[str]:
    """Yield a line for each loss that reads logits that a teacher's answers do not have."""
    if not isinstance(rows, TopK):
        return
    place = [*recipe.spec.place_of(name), "model"]
    if recipe.task.rows_are != "classes":
        says = f"has the likeliest classes, and task '{recipe.task.name}' has rows of"
        yield recipe.problem(place, f"{says} {recipe.task.rows_are}")
    for called in _reading_all_logits(recipe, factory, name):
        says = f"'{called}' compares all logits, and the {rows.values.shape[1]} largest are kept"
        yield recipe.problem(place, says)


def notes_on_answers(recipe: Recipe, name: str, rows: Tensor | TopK) -> Iterator[str]:
    """Yield notes on unusual values in a teacher's answers."""
    if isinstance(rows, TopK):
        return
    teacher = recipe.spec.all_teachers()[name]
    if getattr(teacher, "answers", None) == "logits" and (seen := looks_like(rows)) != "logits":
        yield (
            f"the answers of {name} lie between 0 and 1, as probabilities do, and are read as"
            f" logits; if they are, say `answers: {seen}`"
        )


class Rehearsal:
    """Stands in for caches while a recipe is checked: a teacher may only be shown the images of the
    batch, unchanged.
    """

    def __init__(self, recipe: Recipe, factory: ModelFactory) -> None:
        self._recipe = recipe
        # By identity, as caches know the images of a batch by the tensor itself; tensors compare by
        # value.
        self._shown: Any = WeakIdKeyDictionary()
        self._places = {name: [*recipe.spec.place_of(name), "cache"] for name, _ in _wanted(recipe)}
        # Answers from a file are rows by image number, as those of a cache: the same images can be
        # asked for.
        alone = [name for name in recipe.spec.all_teachers() if has_answers_alone(recipe, name)]
        self._places |= {name: [*recipe.spec.place_of(name), "model"] for name in alone}
        for name, place in self._places.items():
            teacher = factory.teacher(name)
            other_images = given.OTHER_IMAGES if name in alone else OTHER_IMAGES
            teacher.answers = functools.partial(
                self._answer, teacher, recipe.error(place, f"{teacher.role} {other_images}")
            )

    def noting(self, stage: Stage, batch: Callable[[int], Batch]) -> Callable[[int], Batch]:
        """Wrap a source of batches, so that their images become known.

        Raises:
            RecipeError: they come in several views, or the stage makes its own.
        """
        # Rows are kept by image and view, and further views of a batch have no number.
        shows = f"shows {stage.data.views} views of each image at once"
        if stage.prepare is not None:
            shows = "makes batches of its own"
        if (stage.data.views > 1 or stage.prepare is not None) and self._places:
            name, place = next(iter(self._places.items()))
            alone = has_answers_alone(self._recipe, name)
            why = (
                f"to which {name} has no answers"
                if alone
                else "which caches do not keep; leave `cache` out"
            )
            raise self._recipe.error(place, f"stage '{stage.name}' {shows}, {why}")

        def noted(count: int) -> Batch:
            made = batch(count)
            self._shown[first_tensor(made.inputs)] = True
            return made

        return noted

    def _answer(self, teacher: TappedModel, refusal: RecipeError, inputs: Inputs) -> Outputs:
        if first_tensor(inputs) not in self._shown:
            raise refusal
        return teacher.forward(inputs)


def _wanted(recipe: Recipe) -> Iterator[tuple[str, CacheOptions]]:
    for name in recipe.spec.all_teachers():
        if (options := wanted(recipe, name)) is not None:
            yield name, options
