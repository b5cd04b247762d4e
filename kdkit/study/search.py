"""Searches by successive halving: each rung trains its candidates some epochs further, and the best
on validation data go on.

Karnin, Koren, Somekh, "Almost Optimal Exploration in Multi-Armed Bandits", ICML 2013; Jamieson,
Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, TypeAdapter

from kdkit import files
from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.options import LONGEST_NAME
from kdkit.contracts.task import ScoreInfo
from kdkit.errors import RunError
from kdkit.finite import Number
from kdkit.runs.folder import RunFolder
from kdkit.students.curves import deciding
from kdkit.study.comparison import advice_if_stopped, book
from kdkit.study.finder import about
from kdkit.study.findings import Length, rank
from kdkit.study.lockstep import train_together
from kdkit.study.plan import StudyRun, judges, scores_of, trainings
from kdkit.study.search_plan import Rung, Search, left, steps_until

FOUND = "search.json"
WINNER = "winner.yaml"
AGAIN = "`kdkit search` with the same study writes it again"


@dataclass(frozen=True)
class Rated:
    """What a rung has found.

    Attributes:
        epochs: of its candidates, since the beginning of their runs.
        scores: of each candidate on validation data, mean over the seeds; in the study's order.
        kept: candidates that go on, or the winner.
        failures: reasons of the candidates that could not be trained, by name.
    """

    epochs: int
    scores: Mapping[str, Number]
    kept: tuple[str, ...]
    failures: Mapping[str, str]


@dataclass(frozen=True)
class Halved:
    """A whole search, in the form of `search.json`.

    Attributes:
        name, question: of the study.
        command: the command that repeats it.
        seeds: with which each candidate was trained.
        score: description of the score that decides, on validation data.
        candidates: descriptions in one line, by name.
        rungs: what each rung has found.
        winner: name of the candidate that was chosen.
        steps: optimizer steps of all rungs; `whole`: of all candidates trained to their ends.
    """

    name: str
    question: str
    command: str
    seeds: tuple[int, ...]
    score: ScoreInfo
    candidates: Mapping[str, str]
    rungs: tuple[Rated, ...]
    winner: str
    steps: int
    whole: int

    # JSON has no NaN: a score that is not finite is null in the file.
    __pydantic_config__ = ConfigDict(ser_json_inf_nan="null")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `search.json`.

        Raises:
            RunError: it is not there, or is no such file.
        """
        return files.read_json(path, cls, AGAIN)

    def save(self, path: Path) -> None:
        """Write a `search.json`."""
        files.write_json(path, TypeAdapter(Halved).dump_python(self, mode="json"))


def search(
    wanted: Search,
    *,
    max_parallel: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Halved:
    """Search, or do what is left of it; write `search.json`, and the winner's recipe.

    Args:
        wanted: the search.
        max_parallel: runs that are trained side by side at most.
        say: called with messages about the progress.

    Raises:
        RecipeError: a candidate cannot work; found before anything is trained.
        RunError: no candidate could be trained.
        Interrupted: a signal stopped it; everything is saved, and another call resumes.
    """
    study, place = wanted.study, _Place(wanted.name)
    with advice_if_stopped(place.told):
        lengths = wanted.check(say)
        planned = trainings(study)
        found = tuple(_rungs(wanted, lengths, planned, max_parallel, place, say))
    searched = Halved(
        name=wanted.name,
        question=study.question,
        command=study.command,
        seeds=study.seeds,
        score=_score(planned),
        candidates={name: about(recipe) for name, recipe in study.variants.items()},
        rungs=found,
        winner=found[-1].kept[0],
        steps=_steps(found, lengths) * len(study.seeds),
        whole=sum(length.steps for length in lengths.values()) * len(study.seeds),
    )
    _write(wanted, searched)
    return searched


@dataclass
class _Place:
    """Where a search is, for the message that it was stopped."""

    search: str
    rung: str = ""

    def told(self) -> str:
        return f"{self.search}: stopped{f' in {self.rung}' if self.rung else ''}"


def _rungs(
    wanted: Search,
    lengths: Mapping[str, Length],
    planned: Sequence[StudyRun],
    max_parallel: int | None,
    place: _Place,
    say: Callable[[str], None],
) -> Iterator[Rated]:
    """Train rung after rung, until one candidate is left."""
    going: Sequence[str] = list(wanted.study.variants)
    rungs = wanted.plan(lengths)
    sound: dict[str, DataInfo] = {}  # a candidate is checked once, not in each rung
    for number, rung in enumerate(rungs, 1):
        place.rung = f"rung {number} of {len(rungs)}"
        say(f"{place.rung}: {len(going)} candidates until epoch {rung.epochs}")
        runs = [each for each in planned if each.variant in going]
        failures = _train(wanted, rung, runs, max_parallel, sound, say)
        yield (rated := _rated(wanted, rung, runs, failures))
        going = rated.kept
        if len(going) == 1:
            return


def _steps(found: Sequence[Rated], lengths: Mapping[str, Length]) -> int:
    """Count the optimizer steps of all rungs with one seed."""
    steps = 0
    for before, rated in zip((0, *(one.epochs for one in found)), found, strict=False):
        for name in {**rated.scores, **rated.failures}:
            length = lengths[name]
            steps += steps_until(rated.epochs, length) - steps_until(before, length)
    return steps


def _train(
    wanted: Search,
    rung: Rung,
    runs: Sequence[StudyRun],
    max_parallel: int | None,
    sound: dict[str, DataInfo],
    say: Callable[[str], None],
) -> Mapping[Path, str]:
    """Train the runs that have not come as far as the rung; return the reasons of failures by
    folder.
    """
    # equal candidates share a folder, and are trained once
    behind = {each.folder: each for each in runs if not _has_reached(each, rung)}
    if not behind:
        return {}
    outcomes = train_together(
        list(behind.values()),
        max_parallel=max_parallel,
        until=None if rung.whole else rung.epochs,
        sound=sound,
        booked=functools.partial(book, wanted.study, say),
        say=say,
    )
    return {one.job.folder: one.reason for one in outcomes if one.reason is not None}


def _has_reached(run: StudyRun, rung: Rung) -> bool:
    if run.result is not None:
        return True
    return not rung.whole and any(epochs >= rung.epochs for epochs, _ in _epochs(run))


def _epochs(run: StudyRun) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield what a run has logged of each epoch, with its number over all stages."""
    before, stage, last = 0, None, 0
    # of another recipe's run, nothing counts
    folder = RunFolder(run.folder)
    for line in folder.metrics("epoch") if folder.holds(run.recipe) else ():
        if line["stage"] != stage:
            before, stage = before + last, line["stage"]
        last = line["epoch"]
        yield before + last, line


def _score_at(run: StudyRun, rung: Rung, score: ScoreInfo) -> float:
    """Return the score on validation data that a run had at a rung, or when it was last measured
    before; NaN if it was not.
    """
    if rung.whole:
        result = run.result
        return result.validation[score.name] if result and result.validation else math.nan
    measured = [
        line["validation"][score.name]
        for epochs, line in _epochs(run)
        if epochs <= rung.epochs and "validation" in line
    ]
    return float(measured[-1]) if measured else math.nan


def _score(planned: Sequence[StudyRun]) -> ScoreInfo:
    return deciding(scores_of(judges(planned))[0])


def _rated(
    wanted: Search, rung: Rung, runs: Sequence[StudyRun], failures: Mapping[Path, str]
) -> Rated:
    """Rate the candidates of a rung, and choose those that go on: the best mean scores, of equal
    ones the first.

    Raises:
        RunError: no candidate has a score.
    """
    # A candidate that failed with one seed has no mean: it would be over easier seeds.
    failed = {each.variant: failures[each.folder] for each in runs if each.folder in failures}
    sound = [each for each in runs if each.variant not in failed]
    if not sound:
        reasons = "; ".join(dict.fromkeys(failed.values()))
        raise RunError(f"{wanted.name}: no candidate could be trained with every seed: {reasons}")
    score = _score(sound)
    found: dict[str, list[float]] = {}
    for each in sound:
        found.setdefault(each.variant, []).append(_score_at(each, rung, score))
    means = {name: statistics.fmean(values) for name, values in found.items()}
    count = 1 if rung.whole else left(len(means), wanted.halving)
    # `sorted` leaves equal ones in their order
    best = sorted(means, key=lambda name: -rank(score, [means[name]]))[:count]
    return Rated(rung.epochs, means, tuple(name for name in means if name in best), failed)


def _write(wanted: Search, searched: Halved) -> None:
    """Write the findings, and the winner as a recipe."""
    wanted.path.mkdir(parents=True, exist_ok=True)
    searched.save(wanted.path / FOUND)
    recipe = wanted.study.variants[searched.winner]
    name = f"{wanted.name[: LONGEST_NAME - len('-winner')]}-winner"
    named = replace(recipe, spec=recipe.spec.model_copy(update={"name": name}))
    text = f"# {searched.winner}: chosen by `{searched.command}` on validation data.\n"
    files.write_atomically(wanted.path / WINNER, (text + named.dump()).encode())
