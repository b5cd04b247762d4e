"""Resources that a run may share with runs trained side by side: batches, frozen teachers and their
answers. A single run shares nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from kdkit.cache import opening
from kdkit.data.loaders import Data, TrainLoader
from kdkit.engine.evaluate import Judge, TaughtAnswers, taught_answers
from kdkit.models.tapped import TappedModel
from kdkit.recipe import Recipe

BuildTeacher = Callable[[Sequence[str], bool], TappedModel]
"""Builds a teacher with these taps, and with logits or without."""


class Demand(NamedTuple):
    """The outputs that a run reads of one of its teachers; teachers with equal keys give equal
    answers to every batch.
    """

    key: str
    layers: Sequence[str]
    needs_logits: bool


# A protocol, so that `study.shared.Sharing` provides it without being imported from here.
class Shared(Protocol):
    """Provides a run's data and its frozen teachers; the methods here share nothing."""

    def opened(self, read: Callable[[], Data]) -> Data:
        """Return the data; `read` opens them for a single run."""
        return read()

    def changed(
        self, key: str, train: TrainLoader, change: Callable[[TrainLoader], TrainLoader]
    ) -> TrainLoader:
        """Return the training batches with a change that the key identifies (mixed, fewer
        views).
        """
        return change(train)

    def expect(self, demands: Iterable[Demand]) -> None:
        """Register what a run reads of its teachers, before any of them is built."""
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
        """Return a run's view of a frozen teacher.

        Args:
            key: returns the key under which the teacher was registered.
            state: selects the weights if there are several.
            layers: taps of this run.
            needs_logits: of this run.
            build: builds the teacher.
        """
        return build(layers, needs_logits)

    def answering(
        self,
        recipe: Recipe,
        teachers: Mapping[str, TappedModel],
        data: Data,
        warn: Callable[[str], None],
    ) -> contextlib.AbstractContextManager[Data]:
        """Open the caches of a run's teachers; return the data with the views that they store."""
        return opening.answering(recipe, teachers, data, warn)

    def taught_answers(
        self, teachers: Sequence[TappedModel], data: Data, judge: Judge, *, world: int
    ) -> TaughtAnswers | None:
        """Return the teachers' combined answer to the test data."""
        return taught_answers(teachers, data.test, judge, world=world)


class Alone(Shared):
    """Shares nothing: for a single run."""
