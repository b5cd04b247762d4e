"""What a run may share with runs beside it: batches, frozen teachers and their answers. A run by
itself shares nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from kdkit.cache import opening
from kdkit.data.loaders import Data, TrainLoader
from kdkit.engine.evaluate import Predictions, predict_together
from kdkit.models.tapped import TappedModel
from kdkit.recipe import Recipe

BuildTeacher = Callable[[Sequence[str], bool], TappedModel]
"""Builds a teacher with these taps, and with logits or without."""


class Demand(NamedTuple):
    """What a run reads of one of its teachers; teachers of one key answer every batch alike."""

    key: str
    layers: Sequence[str]
    needs_logits: bool


class Shared(Protocol):
    """Where a run gets its data and its frozen teachers."""

    def opened(self, read: Callable[[], Data]) -> Data:
        """The data; `read` opens them for a run by itself."""

    def changed(
        self, key: str, train: TrainLoader, change: Callable[[TrainLoader], TrainLoader]
    ) -> TrainLoader:
        """The training batches, changed in a way that the key names (mixed, fewer views)."""

    def expect(self, demands: Iterable[Demand]) -> None:
        """Take note of what a run reads of its teachers, before any of them is built."""

    def teacher(
        self,
        key: Callable[[], str],
        state: str,
        layers: Sequence[str],
        *,
        needs_logits: bool,
        build: BuildTeacher,
    ) -> TappedModel:
        """A run's view of a frozen teacher.

        Args:
            key: gives the key that the teacher was expected under.
            state: which weights, where there are several.
            layers: taps of this run.
            needs_logits: of this run.
            build: makes the teacher.
        """

    def answering(
        self,
        recipe: Recipe,
        teachers: Mapping[str, TappedModel],
        data: Data,
        warn: Callable[[str], None],
    ) -> contextlib.AbstractContextManager[Data]:
        """Open the caches of a run's teachers; gives the data in the views that they keep."""

    def predictions(
        self, teachers: Sequence[TappedModel], data: Data, *, world: int
    ) -> Predictions | None:
        """The teachers' combined answer to the test data."""


class Alone:
    """Shares nothing."""

    def opened(self, read: Callable[[], Data]) -> Data:
        return read()

    def changed(
        self, key: str, train: TrainLoader, change: Callable[[TrainLoader], TrainLoader]
    ) -> TrainLoader:
        return change(train)

    def expect(self, demands: Iterable[Demand]) -> None:
        return

    def teacher(
        self,
        key: Callable[[], str],
        state: str,
        layers: Sequence[str],
        *,
        needs_logits: bool,
        build: BuildTeacher,
    ) -> TappedModel:
        return build(layers, needs_logits)

    def answering(
        self,
        recipe: Recipe,
        teachers: Mapping[str, TappedModel],
        data: Data,
        warn: Callable[[str], None],
    ) -> contextlib.AbstractContextManager[Data]:
        return opening.answering(recipe, teachers, data, warn)

    def predictions(
        self, teachers: Sequence[TappedModel], data: Data, *, world: int
    ) -> Predictions | None:
        return predict_together(teachers, data.test, world=world)
