"""A teacher without a network, whose answers to the training images are read from a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kdkit.cache.packing import is_channels_last
from kdkit.cache.teacher import Forward
from kdkit.contracts.inputs import first_tensor
from kdkit.contracts.known_answers import AnswersOptions, KnownAnswers, TopK
from kdkit.contracts.model_source import OWN_OUTPUTS
from kdkit.contracts.records import Batch, Inputs, Outputs
from kdkit.contracts.schedule import Arrange
from kdkit.data.loaders import TrainLoader
from kdkit.data.wrapping import WrappedLoader
from kdkit.errors import ModelError, RunError
from kdkit.models.tapped import TappedModel, features_only
from kdkit.recipe import Recipe

OTHER_IMAGES = (
    "is shown other samples than those of the batch (further views, changed ones), to which there"
    " are no answers"
)
STREAM = (
    "this dataset is read from start to end, so its samples have no places that a row could"
    " belong to"
)


def has_answers_alone(recipe: Recipe, name: str) -> bool:
    """Check whether a teacher of the recipe is a set of answers, without a network."""
    return isinstance(recipe.spec.all_teachers()[name], AnswersOptions)


def source_of(recipe: Recipe, name: str) -> KnownAnswers:
    """Return the source of a teacher that is a set of answers."""
    options = cast("AnswersOptions", recipe.spec.all_teachers()[name])
    return cast("KnownAnswers", recipe.model_source(options))


def read_answers(recipe: Recipe, name: str, images: int, classes: int) -> Tensor | TopK:
    """Read the answers (N, K) of a teacher.

    Args:
        recipe: the recipe.
        name: of the teacher.
        images: N, of the dataset's whole training part.
        classes: K, of the teacher.

    Raises:
        RecipeError: they cannot be read, are of another shape, or not finite.
    """
    source = source_of(recipe, name)
    called = source.model_name
    try:
        shape = source.shape()
        if len(shape) != 2:
            raise ModelError(
                f"'{called}' is {_listed(shape)}, not (N, K): a row of logits for each training"
                " sample"
            )
        if shape[0] != images:
            raise ModelError(
                f"'{called}' has {shape[0]:,} rows, and the dataset's whole training part"
                f" {images:,} samples"
            )
        if shape[1] != classes:
            says = (
                f"'{called}' has {shape[1]:,} columns, for {classes:,} classes (`{OWN_OUTPUTS}` and"
                " `classes` say what they are)"
            )
            raise ModelError(says)
        rows = source.read()
        if isinstance(rows, TopK) and source.options.answers != "logits":  # type: ignore[attr-defined]
            raise ModelError(f"'{called}' has `top_k`, which is of logits; leave `answers` out")
        for numbers in (rows.values, rows.rest) if isinstance(rows, TopK) else (rows,):
            _refuse_not_finite(called, numbers)
    except ModelError as error:
        raise recipe.error([*recipe.spec.place_of(name), "model"], str(error)) from None
    return rows


def read_layers(recipe: Recipe, name: str, layers: Iterable[str]) -> dict[str, Tensor]:
    """Read the outputs (N, ...) of layers of a teacher whose answers `read_answers` has read.

    Raises:
        RecipeError: they cannot be read, or are not finite.
    """
    source, found = source_of(recipe, name), {}
    try:
        for layer in layers:
            found[layer] = source.read_layer(layer)
            _refuse_not_finite(layer, found[layer])
    except ModelError as error:
        raise recipe.error([*recipe.spec.place_of(name), "model"], str(error)) from None
    return found


def _refuse_not_finite(name: str, rows: Tensor) -> None:
    if wrong := (~rows.isfinite().flatten(1).all(1)).nonzero().flatten()[:1].tolist():
        raise ModelError(
            f"'{name}' has numbers that are not finite, first in row {wrong[0]} (counted from 0)"
        )


class GivenAnswers:
    """Returns a teacher's answers to a batch's images by their place in the training part.

    Args:
        rows: its answers (N, K), or the largest of each row.
        teacher: the teacher; its post-processing of answers (such as a choice of classes) is
            applied to these too.
        layers: outputs (N, ...) of its layers by name; they stay where they are.
    """

    def __init__(
        self, rows: Tensor | TopK, teacher: TappedModel, layers: Mapping[str, Tensor]
    ) -> None:
        self._rows, self._teacher, self._layers = rows, teacher, layers
        # the images of a batch -> their places (B,); weak, so that no batch is kept alive
        self._places: Any = WeakIdKeyDictionary()

    def loader(self, train: TrainLoader) -> TrainLoader:
        """Wrap the training batches, so that their images become known."""
        return _KnownImages(train, self)

    def note(self, batch: Batch) -> None:
        """Record which images these are."""
        self._places[first_tensor(batch.inputs)] = batch.index

    def answer(self, inputs: Inputs, forward: Forward) -> Outputs:
        """Return the answers to a batch's images, in fp32; `forward` is never called.

        Raises:
            RunError: the images belong to no batch.
        """
        images = first_tensor(inputs)
        if images not in self._places:
            raise RunError(f"{self._teacher.role} {OTHER_IMAGES}")
        positions = self._places[images]
        # moved on first use: the device is unknown until a batch arrives
        self._rows = self._rows.to(positions.device)
        # the module is a stand-in, with the hooks that convert a network's answers
        with torch.no_grad():
            logits: Tensor = self._teacher.module(self._rows[positions].float())
        features = dict.fromkeys(self._teacher.layers, logits)
        for name, rows in self._layers.items():
            taken = rows[positions.to(rows.device)].float()
            # the layout of the cache, on which the order of a sum depends
            layout = torch.channels_last if is_channels_last(rows) else torch.contiguous_format
            features[name] = taken.contiguous(memory_format=layout).to(positions.device)
        if self._teacher.needs_logits:
            return Outputs(logits, features)
        return features_only(features, self._teacher.role)

    def close(self) -> None:
        """Do nothing: no file is open."""


class _KnownImages(WrappedLoader):
    """Training batches that are recorded before anything else reads them."""

    def __init__(self, loader: TrainLoader, answers: GivenAnswers) -> None:
        super().__init__(loader)
        self._answers = answers

    def epoch(
        self, number: int, start: int = 0, view: int | None = None, arrange: Arrange | None = None
    ) -> Iterator[Batch]:
        for batch in self._loader.epoch(number, start, view, arrange):
            self._answers.note(batch)
            yield batch


def _listed(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
