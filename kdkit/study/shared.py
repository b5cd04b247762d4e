"""Shared work of runs trained side by side: each batch is made once, and each frozen teacher
answers it once.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar, cast

from torch import nn

from kdkit.cache import opening
from kdkit.cache.asked_ahead import AskedAhead
from kdkit.cache.given import GivenAnswers
from kdkit.cache.teacher import TeacherCache
from kdkit.contracts.records import Batch, Inputs, Outputs, tensors
from kdkit.contracts.schedule import Arrange
from kdkit.data.loaders import Data, EvalLoader, TrainLoader
from kdkit.engine.capture import Repeated
from kdkit.engine.evaluate import Judge, TaughtAnswers, taught_answers
from kdkit.engine.graphs import CudaGraphs
from kdkit.engine.turns import Place, Stopwatch
from kdkit.errors import RunError
from kdkit.models.hooks import version
from kdkit.models.tapped import TappedModel, features_only
from kdkit.recipe import Recipe
from kdkit.runs.shared import BuildTeacher, Demand

T = TypeVar("T", Batch, Outputs)


class Memo:
    """Results that one run's turn has computed, for other runs that need them at the same place.

    The time is added to every run that uses a result, so that a run's clock shows what the run
    would take alone.

    Attributes:
        clock: of the run whose turn it is.
    """

    def __init__(self) -> None:
        self.clock = Stopwatch()
        self._place: Place | None = None
        self._kept: dict[Hashable, tuple[Batch | Outputs, list[int | None], float, float]] = {}

    @contextlib.contextmanager
    def turn(self, place: Place | None, clock: Stopwatch) -> Iterator[None]:
        """Enter one run's turn at a place; results from another place are discarded."""
        if place != self._place:
            self._kept.clear()
        self._place, self.clock = place, clock
        with clock:
            yield

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of `make`, or the one that another run has computed at this place.

        Raises:
            RunError: that run has modified it in place.
        """
        if key not in self._kept:
            wall, cpu = self.clock.wall, self.clock.cpu
            made = make()
            self._kept[key] = made, _versions(made), self.clock.wall - wall, self.clock.cpu - cpu
            return made
        kept, versions, wall, cpu = self._kept[key]
        if _versions(kept) != versions:
            raise RunError(
                "a plugin of a run beside this one has changed a batch, or a teacher's answer to"
                " it, in place"
            )
        self.clock.add(wall, cpu)
        return cast("T", kept)

    def holds(self, inputs: Inputs) -> bool:
        """Check whether these are the images of a batch that all runs share."""
        return any(
            isinstance(made, Batch) and made.inputs is inputs for made, *_ in self._kept.values()
        )


def _versions(made: Batch | Outputs) -> list[int | None]:
    """Return how often each tensor was changed in place."""
    return [version(tensor) for tensor in tensors(made)]


class SharedTrainLoader:
    """Training batches, each made once as long as the runs request them in turn."""

    def __init__(self, loader: TrainLoader, memo: Memo) -> None:
        self.labels = loader.labels
        self.indices = loader.indices
        self.num_samples = loader.num_samples
        self.indexed = loader.indexed
        self._loader, self._memo = loader, memo
        # epoch and view -> next batch's number, where from
        self._open: dict[tuple[int, int | None], tuple[int, Iterator[Batch]]] = {}

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(
        self, number: int, start: int = 0, view: int | None = None, arrange: Arrange | None = None
    ) -> Iterator[Batch]:
        if arrange is not None:  # the order depends on the run, so it cannot be shared
            yield from self._loader.epoch(number, start, view, arrange)
            return
        for batch in range(start, len(self)):
            yield self._memo.once(
                (id(self), number, view, batch), functools.partial(self._make, number, view, batch)
            )

    def _make(self, number: int, view: int | None, batch: int) -> Batch:
        following, source = self._open.pop((number, view), (-1, iter(())))
        if following != batch:
            # no run goes back to earlier batches
            self._open = {which: rest for which, rest in self._open.items() if which[0] >= number}
            source = self._loader.epoch(number, batch, view)
        made = next(source)
        if batch + 1 < len(self):
            self._open[number, view] = batch + 1, source
        return made


class SharedEvalLoader:
    """Batches for measuring, each made once, from the first to the last."""

    def __init__(self, loader: EvalLoader, memo: Memo) -> None:
        self.num_samples = loader.num_samples
        self._loader, self._memo = loader, memo
        self._source: Iterator[Batch] = iter(())
        self._following = 0
        self._end: int | None = None  # how many there are, once that is known

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        # a stream read by several workers has more batches than its length says
        for batch in itertools.count():
            try:
                made = self._memo.once((id(self), batch), functools.partial(self._make, batch))
            except StopIteration:
                return
            yield made

    def whole(self) -> EvalLoader:
        return self._loader.whole()

    def _make(self, batch: int) -> Batch:
        if batch == self._end:
            raise StopIteration
        if batch == 0 or batch != self._following:
            self._source, self._end = itertools.islice(self._loader, batch, None), None
        self._following = batch + 1
        try:
            return next(self._source)
        # the number of batches is known now: later runs end here without asking
        except StopIteration:
            self._end = batch
            raise


class Sharing:
    """The data and the frozen teachers of runs that share seed and images.

    Args:
        data: the data opened for the group.
        world: training processes; several measure without yielding in between, so no batch is
            shared while measuring.
        records: whether the teachers' answers are recorded (`train.capture`).
    """

    def __init__(self, data: Data, world: int = 1, *, records: bool = False) -> None:
        self.memo = Memo()
        self._alone, self.world = data, world
        self._graphs = CudaGraphs() if records else None
        self.data = replace(data, train=SharedTrainLoader(data.train, self.memo))
        if world == 1:
            validation = (
                SharedEvalLoader(data.validation, self.memo)
                if data.validation is not None
                else None
            )
            self.data = replace(
                self.data, validation=validation, test=SharedEvalLoader(data.test, self.memo)
            )
        self._loaders: dict[str, TrainLoader] = {}
        self._demands: dict[str, Demand] = {}  # of all runs together
        self._asking: Counter[str] = Counter()  # runs by the key of their demand
        # while a run has a view
        self._teachers: weakref.WeakValueDictionary[tuple[str, str], TappedModel] = (
            weakref.WeakValueDictionary()
        )
        # of each run's view
        self._wholes: weakref.WeakKeyDictionary[TappedModel, TappedModel] = (
            weakref.WeakKeyDictionary()
        )
        self._caches: dict[TappedModel, TeacherCache | GivenAnswers | AskedAhead | None] = {}
        self._taught: dict[
            tuple[tuple[nn.Module, ...], tuple[str, ...]],
            tuple[TaughtAnswers | None, float, float],
        ] = {}

    def close(self) -> None:
        """Close the files on disk."""
        for cache in [one for one in self._caches.values() if one is not None]:
            cache.close()

    def opened(self, read: Callable[[], Data]) -> Data:
        return self.data

    def changed(
        self, key: str, train: TrainLoader, change: Callable[[TrainLoader], TrainLoader]
    ) -> TrainLoader:
        if key not in self._loaders:
            self._loaders[key] = SharedTrainLoader(change(train), self.memo)
        return self._loaders[key]

    def expect(self, demands: Iterable[Demand]) -> None:
        demands = list(demands)
        self._asking.update({demand.key for demand in demands})
        for demand in demands:
            known = self._demands.get(demand.key, Demand(demand.key, [], False))
            layers = list(dict.fromkeys([*known.layers, *demand.layers]))
            self._demands[demand.key] = Demand(
                demand.key, layers, known.needs_logits or demand.needs_logits
            )

    def teacher(
        self,
        key: Callable[[], str],
        state: str,
        layers: Sequence[str],
        *,
        needs_logits: bool,
        build: BuildTeacher,
    ) -> TappedModel:
        """Return a run's view of a teacher that answers for all runs, and has the taps that any of
        them needs.
        """
        demand = self._demands[key()]
        whole = self._teachers.get((demand.key, state))
        if whole is None:
            self._teachers[demand.key, state] = whole = build(demand.layers, demand.needs_logits)
            # a teacher that one run asks is its own: it is recorded with the run's step
            if self._asking[demand.key] == 1:
                return whole
            if self._graphs is not None:
                whole.answers = Repeated(whole.forward, self._graphs)
        answers = functools.partial(self._answer, whole, list(layers), needs_logits)
        view = whole.view(layers, needs_logits=needs_logits, answers=answers)
        self._wholes[view] = whole
        return view

    @contextlib.contextmanager
    def answering(
        self,
        recipe: Recipe,
        teachers: Mapping[str, TappedModel],
        data: Data,
        warn: Callable[[str], None],
    ) -> Iterator[Data]:
        """Return the data; the caches stay open until all runs have ended."""
        caches = []
        for name, view in teachers.items():
            whole = self._wholes.get(view, view)
            if whole not in self._caches:
                cache = opening.open_answers(recipe, name, whole, data.info, data.train, warn)
                self._caches[whole] = cache
                if cache is not None:
                    whole.answers = functools.partial(cache.answer, forward=whole.forward)
            caches.append(self._caches[whole])
        # mixed batches are another chain of loaders, whose coming batches are not known here; their
        # cache is of this chain alone, as each way of mixing has a teacher of its own
        mixed = data.train is not self.data.train
        found = [
            cache
            for cache in caches
            if cache is not None and not (mixed and isinstance(cache, AskedAhead))
        ]

        def in_kept_views(train: TrainLoader) -> TrainLoader:
            base = train if mixed else self._alone.train
            return functools.reduce(lambda train, cache: cache.loader(train), found, base)

        key = f"kept {[id(cache) for cache in found]}"
        yield replace(data, train=self.changed(key, data.train, in_kept_views)) if found else data

    def taught_answers(
        self, teachers: Sequence[TappedModel], data: Data, judge: Judge, *, world: int
    ) -> TaughtAnswers | None:
        modules = tuple(teacher.module for teacher in teachers)
        key, clock = (modules, tuple(score.name for score in judge.scores)), self.memo.clock
        if key not in self._taught:
            wall, cpu = clock.wall, clock.cpu
            found = taught_answers(teachers, self._alone.test, judge, world=world)
            self._taught[key] = found, clock.wall - wall, clock.cpu - cpu
            return found
        found, wall, cpu = self._taught[key]
        clock.add(wall, cpu)
        return found

    def _answer(
        self, whole: TappedModel, layers: list[str], needs_logits: bool, inputs: Inputs
    ) -> Outputs:
        common = self.memo.holds(inputs)  # False for a run's own view of the images
        answer = (
            self.memo.once((id(whole), id(inputs)), lambda: whole(inputs))
            if common
            else whole(inputs)
        )
        features = {name: answer.features[name] for name in layers}
        mask = answer.mask
        return (
            Outputs(answer.logits, features, mask=mask)
            if needs_logits
            else features_only(features, whole.role, mask)
        )
