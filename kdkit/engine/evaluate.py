"""Measures models batch by batch: how good their answers are, and how closely they agree with a
teacher's.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.records import Batch, Outputs
from kdkit.contracts.schedule import Model
from kdkit.contracts.task import Ask, Rows, Score, Task
from kdkit.engine.scores import scores_of
from kdkit.engine.turns import Turns, finish
from kdkit.errors import RunError
from kdkit.finite import LOOK
from kdkit.models.freezing import in_eval_mode
from kdkit.models.given_answers import looks_like
from kdkit.recipe import Recipe

Place = tuple[int, int]
"""Epoch and part of the data, as in `Turns`."""

NOWHERE = (0, -1)

Shown = Callable[[Ask, Batch], Batch]


@dataclass(frozen=True)
class Judge:
    """The scores that answers are measured with.

    Attributes:
        task: of the recipe.
        scores: the scores to compute; the first one decides.
        agreement: scores that compare answers with a teacher's.
    """

    task: Task
    scores: Sequence[Score]
    agreement: Sequence[Score]

    @classmethod
    def of(cls, recipe: Recipe, info: DataInfo) -> Judge:
        """Make the judge of a recipe's students for a dataset."""
        return cls(recipe.task, scores_of(recipe, info), recipe.task.agreement(info))

    @property
    def deciding(self) -> Score:
        return self.scores[0]


@dataclass(frozen=True)
class TaughtAnswers:
    """A teacher's answers to one part of the data, or those of several teachers combined.

    Attributes:
        scores: the teacher's own scores.
        index: `Batch.index` of the samples, ascending.
        remembered: the teacher's answers in the form that students are compared with, an entry for
            each sample.
        looks_like: apparent form of its rows: logits, or probabilities by `softmax` or `sigmoid`.
    """

    scores: dict[str, float]
    index: Tensor
    remembered: Any
    looks_like: str

    def of(self, index: Tensor) -> Any:
        """Select the entries of those samples."""
        places = torch.searchsorted(self.index, index.cpu())
        if isinstance(self.remembered, Tensor):
            return self.remembered[places].to(index.device)
        return [self.remembered[place] for place in places.tolist()]


class Tally:
    """Accumulates the scores of one model.

    Args:
        scores: the scores to accumulate.
        together: whether the values are reduced over all processes.
    """

    def __init__(self, scores: Sequence[Score], *, together: bool) -> None:
        self._scores = scores
        self._together = together
        # by what makes them and what they see: several scores may read one object
        self._metrics: dict[Any, Any] = {}

    @property
    def shown(self) -> list[Shown]:
        """List what networks are shown beside the data's own batches."""
        return [shown for shown in dict.fromkeys(score.shown for score in self._scores) if shown]

    def add(self, rows: Rows, shown: Shown | None = None) -> None:
        """Add a batch of the data, or one that was `shown` in its place."""
        device = rows.answer.device
        if device.type == "mps":  # MPS has no double precision
            rows, device = rows.to(torch.device("cpu")), torch.device("cpu")
        # all of them: another process may be shown samples where this one is shown none
        for score in self._scores:
            if (key := _key(score)) not in self._metrics:
                self._metrics[key] = score.build().to(device)
                self._metrics[key].sync_on_compute = self._together
        for (_, sees, whose), metric in self._metrics.items():
            if whose is shown:
                metric.update(*sees(rows))

    def values(self) -> dict[str, float]:
        """Return the scores by name.

        Raises:
            RunError: a score that shows something else was shown no sample, so it has no value.
        """
        values: dict[str, float] = {}
        for score in self._scores:
            with warnings.catch_warnings():
                # no update: the samples were shown in other processes, or the value is NaN
                warnings.filterwarnings("ignore", "The ``compute`` method")
                # computed once: torchmetrics remembers the value until the next update
                values |= score.numbers(self._metrics[_key(score)].compute())
            if score.shown and math.isnan(values.get(score.name, 0.0)):
                raise RunError(f"'{score.name}': none of the samples is shown; show more of them")
        return values


def _key(score: Score) -> tuple[Any, ...]:
    return score.build, score.sees, score.shown


def show(tally: Tally, ask: Ask, batch: Batch, task: Task, taught: TaughtAnswers | None) -> None:
    """Add what a network answers to what it is shown in the place of a batch."""
    for shown in tally.shown:
        if len((instead := shown(ask, batch)).index):
            (rows,), asked = task.scored_rows([ask(instead.inputs)], instead)
            known = taught.of(instead.index) if taught else None
            tally.add(Rows(rows.logits.float(), asked.labels, known), shown)


def asking(
    models: Sequence[Model],
    batches: Iterable[Batch],
    take: Callable[[Batch, list[Outputs]], None],
    *,
    world: int = 1,
    place: Place = NOWHERE,
) -> Turns[None]:
    """Show every batch to all models, in eval mode; `take` receives their answers.

    Yields (*`place`, batch) before each batch; not in several processes, whose shares can differ by
    one batch.
    """
    with in_eval_mode(*(model.module for model in models)):
        coming = iter(batches)
        for number in itertools.count():
            if world == 1:
                yield (*place, number)
            if (batch := next(coming, None)) is None:
                break
            with torch.no_grad():
                take(batch, [model(batch.inputs) for model in models])


def measuring(
    models: Sequence[Model],
    batches: Iterable[Batch],
    judge: Judge,
    taught: TaughtAnswers | None = None,
    *,
    world: int = 1,
    place: Place = NOWHERE,
    everyones: Callable[[list[Outputs]], list[Outputs]] | None = None,
) -> Turns[tuple[list[dict[str, float]], dict[str, float]]]:
    """Measure the scores of every model, and those of their ensemble if there are several.

    Args:
        models: models to measure, in one pass.
        batches: this process's share of a part of the data.
        judge: the scores to compute.
        taught: the teacher's answers to that part, which the models are compared with.
        world: processes that measure together.
        place: see `asking`.
        everyones: adds the answers of models in other processes, which are shown the same batches,
            to those here (None: there are none).
    """
    known_alone = [score for score in judge.scores if taught or not score.of_teacher]
    counted = [*known_alone, *(judge.agreement if taught else ())]
    tallies = [Tally(counted, together=world > 1) for _ in models]
    several = len(models) > 1 or everyones is not None
    # models in other processes cannot be shown what is made for all together
    common = counted if everyones is None else [score for score in counted if not score.shown]
    ensemble = [Tally(common, together=world > 1)] if several else []

    asks: list[Ask] = [*models, as_one(models, judge.task)]

    def take(batch: Batch, answers: list[Outputs]) -> None:
        known = taught.of(batch.index) if taught else None
        spoken = [Outputs(answer.logits) for answer in answers] if ensemble else []
        spoken = everyones(spoken) if everyones else spoken
        together = [judge.task.combined(spoken)] if ensemble else []
        rows, asked = judge.task.scored_rows([*answers, *together], batch)
        for tally, answer in zip([*tallies, *ensemble], rows, strict=True):
            tally.add(Rows(answer.logits.float(), asked.labels, known))
        for tally, ask in zip([*tallies, *ensemble], asks, strict=False):
            show(tally, ask, batch, judge.task, taught)

    yield from asking(models, batches, take, world=world, place=place)
    found = [tally.values() for tally in tallies]
    return found, ensemble[0].values() if ensemble else {}


def as_one(models: Sequence[Model], task: Task) -> Ask:
    """Return the models as a function to their one answer."""
    if len(models) == 1:
        return models[0]
    return lambda inputs: task.combined([model(inputs) for model in models])


def measure(
    model: Model, batches: Iterable[Batch], judge: Judge, taught: TaughtAnswers | None = None
) -> dict[str, float]:
    """Measure one model's scores, in one process."""
    return finish(measuring([model], batches, judge, taught))[0][0]


def taught_answers(
    models: Sequence[Model], batches: Iterable[Batch], judge: Judge, *, world: int = 1
) -> TaughtAnswers | None:
    """Collect the teachers' answers to a part of the data, combined if there are several; None
    without a teacher.

    Raises:
        RunError: an answer is not finite; names the model.
    """
    if not models:
        return None
    tally = Tally(judge.scores, together=world > 1)
    index: list[Tensor] = []
    entries: list[Any] = []
    faulty: list[list[int]] = [[] for _ in models]
    seen: set[str] = set()

    def take(batch: Batch, answers: list[Outputs]) -> None:
        for places, answer in zip(faulty, answers, strict=True):
            wrong = ~answer.logits.isfinite().flatten(1).all(1)
            places += batch.index[wrong].tolist()
        whole = answers[0] if len(answers) == 1 else judge.task.combined(answers)
        (rows,), asked = judge.task.scored_rows([whole], batch)
        kept = judge.task.remembered(whole, batch)
        tally.add(Rows(rows.logits.float(), asked.labels, kept))
        show(tally, as_one(models, judge.task), batch, judge.task, None)
        seen.add(looks_like(rows.logits.float()))
        index.append(batch.index.cpu())
        entries.append(_on_host(kept) if isinstance(kept, Tensor) else kept)

    finish(asking(models, batches, take, world=world))
    ours = [(torch.cat(index), entries, faulty, seen)] if index else []
    everyones = gather_object(ours) if world > 1 else ours
    samples = torch.cat([one[0] for one in everyones])
    for number, model in enumerate(models):
        if wrong := sorted(place for one in everyones for place in one[2][number]):
            role = getattr(model, "role", type(model.module).__name__)
            raise RunError(
                f"{role}: its logits are NaN or infinite for {len(wrong):,} of the"
                f" {len(samples):,} samples that are measured, the first of them number {wrong[0]};"
                f" {LOOK}"
            )
    order = samples.argsort()
    kept = [entry for one in everyones for entry in one[1]]
    for one in everyones:
        one[1].clear()
    remembered = (
        _stacked(kept, order)
        if all(isinstance(batch, Tensor) for batch in kept)
        else _in_order(itertools.chain(*kept), order)
    )
    found = set().union(*(one[3] for one in everyones))
    seems = next(form for form in ("logits", "sigmoid", "softmax") if form in found)
    return TaughtAnswers(tally.values(), samples[order], remembered, seems)


def _on_host(kept: Tensor) -> Tensor:
    """Copy to the CPU; fp32 in place of half precision."""
    return (kept.float() if kept.is_floating_point() else kept).cpu()


def _stacked(batches: list[Tensor], order: Tensor) -> Tensor:
    """Stack the samples of all batches in an order (N,); empties the list, so that memory holds
    little more than them once.
    """
    whole = batches[0].new_empty((len(order), *batches[0].shape[1:]))
    places = order.argsort()
    batches.reverse()
    first = 0
    while batches:
        batch = batches.pop()
        whole[places[first : first + len(batch)]] = batch
        first += len(batch)
    return whole


def _in_order(entries: Iterable[Any], order: Tensor) -> list[Any]:
    listed = [*entries]
    return [listed[place] for place in order.tolist()]


@dataclass(frozen=True)
class Predictions:
    """A model's answers (N, K) to a part of the data, in its order, with the targets (N, ...), on
    the CPU.
    """

    logits: Tensor
    labels: Tensor


def predict(model: Model, batches: Iterable[Batch]) -> Predictions:
    """Collect a model's complete answers to every batch: for pictures of small parts of the
    data.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(batch: Batch, answers: list[Outputs]) -> None:
        found.append((batch.index.cpu(), answers[0].logits.float().cpu(), batch.labels.cpu()))

    finish(asking([model], batches, take))
    index, logits, labels = (torch.cat(column) for column in zip(*found, strict=True))
    order = index.argsort()
    return Predictions(logits[order], labels[order])
