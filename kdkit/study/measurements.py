"""Measures the finished runs of a study: networks side by side, memory of a step, agreement with
the common teacher, which are stored; lengths of training.
"""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from kdkit import files
from kdkit import recipe as recipes
from kdkit.contracts.model_source import ModelOptions, TeacherOptions
from kdkit.data.subsets import images_per_epoch, samples
from kdkit.engine.accelerator import build_accelerator
from kdkit.engine.evaluate import Judge, TaughtAnswers, measure, taught_answers
from kdkit.errors import KdkitError, RunError
from kdkit.finite import Number
from kdkit.recipe import Recipe
from kdkit.recipe.data_section import DataSpec
from kdkit.runs.check_weights import has_random_weights
from kdkit.runs.folder import RunFolder
from kdkit.runs.run import Run
from kdkit.students import profile
from kdkit.students.loaded import LoadedRun
from kdkit.study.findings import Length
from kdkit.study.step_memory import step_memory

LATENCY_RUNS = 300
LATENCY_SECONDS = 1.0


@dataclass(frozen=True)
class Network:
    """Parameters, multiply-accumulates, bytes, and seconds of one image on one thread (median), of
    one network or the sum of several.
    """

    parameters: int
    macs: int
    bytes: int
    latency: float


class Kept(TypedDict):
    """Content of measured.json."""

    spent: dict[str, float]
    trained: list[str]
    networks: dict[str, Network]
    memory: dict[str, int]
    answers: dict[str, dict[str, Number]]


def _opened(run: Run) -> LoadedRun:
    """Open the run in its folder; its recipe may only run the Python files of the study's own
    recipe.
    """
    return LoadedRun(run.folder, plugins=recipes.code_of_all(run.recipe))


class Measured:
    """Measurements in a file, by the fingerprints of the runs.

    Args:
        path: the file; a missing one counts as empty; a damaged one is reported and counts as
            empty.
        say: called with a message before slow measurements.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = lambda _: None) -> None:
        self.path, self.say = path, say
        self._kept: Kept = {"spent": {}, "trained": [], "networks": {}, "memory": {}, "answers": {}}
        # Measurements are only a matter of time: a damaged file is no reason to fail.
        if path.exists():
            try:
                self._kept = files.read_json(path, Kept, "all is measured again", path.parent.name)
            except RunError as error:
                say(str(error))

    def save(self) -> None:
        networks = {key: asdict(network) for key, network in self._kept["networks"].items()}
        files.write_json(self.path, {**self._kept, "networks": networks}, self.path.parent.name)

    def spend(self, wall: float, cpu: float, trained: Sequence[str]) -> None:
        """Add the cost of training, and the fingerprints of the runs that it has finished."""
        spent = self._kept["spent"]
        self._kept["spent"] = {
            "wall": spent.get("wall", 0.0) + wall,
            "cpu": spent.get("cpu", 0.0) + cpu,
        }
        # A study that was stopped and called again counts each run once.
        self._kept["trained"] = list(dict.fromkeys([*self._kept["trained"], *trained]))
        self.save()

    def together(self, fingerprints: Sequence[str]) -> dict[str, float]:
        """Return the wall and CPU seconds of the training so far, and how many of these runs it
        trained or reused.
        """
        spent, trained = self._kept["spent"], len(set(fingerprints) & set(self._kept["trained"]))
        return {
            "wall": spent.get("wall", 0.0),
            "cpu": spent.get("cpu", 0.0),
            "trained": trained,
            "reused": len(set(fingerprints)) - trained,
        }

    def memory(self, run: Run) -> int:
        """Measure the bytes that a step of that run allocates."""
        if run.key not in self._kept["memory"]:
            self._kept["memory"][run.key] = step_memory(run.recipe, run.folder)
            self.save()
        return int(self._kept["memory"][run.key])

    def networks(
        self, runs: Sequence[Run], taught: Run | None
    ) -> tuple[list[Network], Network | None]:
        """Measure the students of some runs, and the teachers of one. All are timed in turns, as
        times of different days are not comparable.
        """
        teacher = [f"teacher of {taught.key}"] if taught else []
        keys = [*(run.key for run in runs), *teacher]
        if not runs:
            return [], None
        # One that is missing means that all are timed again, as times of different days do not
        # compare.
        if not set(keys) <= set(self._kept["networks"]):
            self._kept["networks"] = self._measure_networks(
                {run.key: run for run in runs}, taught, teacher
            )
            self.save()
        found = [self._kept["networks"][key] for key in keys]
        return found[: len(runs)], found[-1] if teacher else None

    def _measure_networks(
        self, runs: Mapping[str, Run], taught: Run | None, teacher: Sequence[str]
    ) -> dict[str, Network]:
        self.say(f"measuring what {len(runs)} students cost")
        opened = {key: _opened(run) for key, run in runs.items()}
        models = [(student := one.student(), one.seen_by(student)) for one in opened.values()]
        of_teacher = _opened(taught) if taught else None
        models += (
            [(model, of_teacher.seen_by(model)) for model in of_teacher.teachers(answering=False)]
            if of_teacher
            else []
        )
        with profile.threads(1):  # several threads wait for each other on a busy machine
            costs = profile.measure_together(models, runs=LATENCY_RUNS, seconds=LATENCY_SECONDS)
        groups = [[cost] for cost in costs[: len(runs)]] + [costs[len(runs) :]]
        # not strict: without teachers the last group has no key
        return {key: total(group) for key, group in zip([*runs, *teacher], groups, strict=False)}

    def answers(self, run: Run, teacher: CommonTeacher, *, best: bool = False) -> dict[str, float]:
        """Compare a run's student with that teacher on the test data."""
        key = f"{run.key} {teacher.key}{' best' if best else ''}"
        if key not in self._kept["answers"]:
            self._kept["answers"][key] = teacher.compare(run, best=best)
            self.save()
        return dict(self._kept["answers"][key])


class CommonTeacher:
    """The teachers of a run, combined. Their answers to the test data are computed on first use."""

    def __init__(self, run: Run) -> None:
        self.run, self.key = run, who_teaches(run.recipe)

    @property
    def name(self) -> str:
        """Name of the network, or of the recipe that trains it; for several, their number."""
        first, *others = self.run.recipe.spec.all_teachers().values()
        if others:
            return f"{len(others) + 1} teachers together"
        return (
            first.model
            if isinstance(first, ModelOptions)
            else recipes.load(first.recipe, files=False).spec.name
        )

    @functools.cached_property
    def answers(self) -> TaughtAnswers | None:
        opened, device = _opened(self.run), self._device
        data = opened.data(device=device)
        judge = Judge.of(opened.recipe, data.info)
        if self._recorded:
            judge = replace(judge, scores=())
        return taught_answers(opened.teachers(device=device), data.test, judge)

    def scores(self) -> dict[str, float]:
        """Return its test scores: those recorded by the run that it taught, or measured now."""
        if self._recorded:
            return self._recorded
        return self.answers.scores if self.answers else {}

    @functools.cached_property
    def _recorded(self) -> dict[str, float]:
        result = RunFolder(self.run.folder).result()
        return dict(result.teacher or {}) if result else {}

    def compare(self, run: Run, *, best: bool) -> dict[str, float]:
        """Measure how a run's student agrees with it on the test data."""
        opened, device = _opened(run), self._device
        data = opened.data(device=device)
        # The run has its own scores already.
        only_agreement = replace(Judge.of(opened.recipe, data.info), scores=())
        student = opened.student(best=best, device=device)
        return measure(student, data.test, only_agreement, self.answers)

    @property
    def _device(self) -> torch.device:
        device: torch.device = build_accelerator(self.run.recipe.spec.train).device
        return device


def common_teacher(runs: Sequence[Run]) -> CommonTeacher | None:
    """Return the teacher of all those runs that have one, if it is the same."""
    taught = [run for run in runs if run.recipe.spec.all_teachers()]
    return (
        CommonTeacher(taught[0]) if len({who_teaches(run.recipe) for run in taught}) == 1 else None
    )


def who_teaches(recipe: Recipe) -> str:
    """Return a digest of the teachers' definition, without execution options; a teacher with random
    weights differs for each seed.
    """
    content, options = recipe.content(), recipe.spec.all_teachers().values()
    # Random weights follow from the run's seed.
    seed = [recipe.spec.seed] if any(has_random_weights(one) for one in options) else []
    teachers = [one for one in (content["teacher"], *content["teachers"]) if one]
    told = [_which(one) for one in teachers]
    return hashlib.sha256(json.dumps([*told, *seed], sort_keys=True).encode()).hexdigest()[:16]


def _which(teacher: Mapping[str, Any]) -> Any:
    """Reduce a teacher's section to what it answers."""
    if "recipe" in teacher:
        seen = teacher.get("input")
        return [teacher["recipe"], seen] if seen else teacher["recipe"]
    # Precision, cache and the like say how a teacher is asked, not which one it is.
    return {key: value for key, value in teacher.items() if key not in TeacherOptions.model_fields}


def total(costs: Sequence[profile.Profile]) -> Network:
    """Add up the costs of several networks that answer one after the other."""
    return Network(
        sum(cost.parameters for cost in costs),
        sum(cost.macs for cost in costs),
        sum(cost.bytes for cost in costs),
        sum(cost.latencies[0].percentile(50) for cost in costs),
    )


def of_run(folder: RunFolder, data: DataSpec) -> Length:
    """Compute the length from a finished run's files; `data` is its recipe's section."""
    # of each stage, its last epoch
    ends = {line["stage"]: line for line in folder.metrics("epoch")}.values()
    count, epochs = samples(data, folder.info().num_train), sum(end["epoch"] for end in ends)
    return Length(
        count, epochs, sum(end["step"] for end in ends), epochs * images_per_epoch(data, count)
    )


def mean_length(runs: Sequence[tuple[RunFolder, DataSpec]]) -> Length | None:
    """Average the lengths of a variant's finished runs, which may end after different epochs; None
    without any.
    """
    found = [of_run(folder, data) for folder, data in runs]
    whole = zip(*((one.samples, one.epochs, one.steps, one.images) for one in found), strict=True)
    return Length(*(round(statistics.fmean(values)) for values in whole)) if found else None


def of_teachers(folder: Path, plugins: Sequence[Path]) -> tuple[Length, ...]:
    """Return the lengths of those teachers of a run that other recipes train; empty if their runs
    no longer exist, or need more than `plugins`.
    """
    try:
        runs = LoadedRun(folder, plugins=plugins).teacher_runs()
        return tuple(of_run(one, one.recipe(plugins=plugins).spec.data) for one in runs)
    # the lengths are only reported: what cannot be read is left out
    except KdkitError:
        return ()
