"""Makes findings from runs without a study: groups them into variants, and measures their costs."""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdkit.contracts.inputs import Shape
from kdkit.errors import KdkitError, RunError
from kdkit.models.tapped import TappedModel
from kdkit.recipe.fairness import refuse_mixed
from kdkit.runs.folder import RunFolder
from kdkit.runs.result import Result
from kdkit.students import profile
from kdkit.students.loaded import LoadedRun
from kdkit.students.profile import Profile
from kdkit.students.show import brief
from kdkit.study import intervals
from kdkit.study.finder import by_name, cost
from kdkit.study.findings import Findings, Length, Teacher, Variant
from kdkit.study.measurements import mean_length, of_teachers, total
from kdkit.study.variants import TEACHER

TIMED = 0.5  # seconds of timing per network


@dataclass(frozen=True)
class _Run:
    folder: RunFolder
    marker: Mapping[str, Any]
    recipe: Mapping[str, Any]
    result: Result | None
    plugins: Sequence[Path]

    def opened(self) -> LoadedRun:
        return LoadedRun(self.folder.path, plugins=self.plugins)

    @property
    def taught_by(self) -> list[Any]:
        """The definition of the teachers, without execution options."""
        content = self.marker["content"]
        # The same recipe counts as the same teacher, however its answers are kept.
        return [one.get("recipe", one) for one in (content["teacher"], *content["teachers"]) if one]

    @property
    def kind(self) -> str:
        """The recipe without its seed, which all runs of one variant share."""
        return json.dumps({**self.marker["content"], "seed": None}, sort_keys=True)


def of_runs(folders: Sequence[Path], plugins: Sequence[Path] = ()) -> Findings:
    """Group finished runs by their recipes; the recipe of the first run is the baseline.

    Args:
        folders: folders of the runs, finished or not.
        plugins: Python files and folders of theirs that may run; networks that need others are not
            timed.

    Raises:
        RunError: none is finished.
        RecipeError: their tasks or deciding scores differ.
    """
    runs = [_open(folder, plugins) for folder in dict.fromkeys(folders)]
    if not any(run.result for run in runs):
        raise RunError(
            f"{folders[0]}: no run here is finished; `kdkit train` with the same recipe goes on"
            " with one"
        )
    _refuse_mixed(runs)
    groups: dict[str, list[_Run]] = {}
    for run in runs:
        groups.setdefault(run.kind, []).append(run)
    named = _named(list(groups.values()))
    # As for `kdkit compare RECIPE...`, where the first recipe is the baseline.
    baseline = next(iter(named))
    teachers = [run for run in runs if run.taught_by and run.result]
    alike = len({json.dumps(run.taught_by) for run in teachers}) == 1
    teacher, costs = _profiles(named, teachers[0] if alike else None)
    # empty for an older kdkit; the baseline's scores come first
    scores, agreement = (
        {one.name: one for run in (*named[baseline], *runs) for one in run.marker.get(key, ())}
        for key in ("scores", "agreement")
    )
    found = Findings(
        # Runs without a study are named after the folder that holds them.
        name=folders[0].resolve().parent.name,
        question="",
        baseline=baseline,
        command="\n".join(_again(run.folder.path) for run in runs if run.result),
        variants=tuple(_variant(name, each, costs.get(name)) for name, each in named.items()),
        teacher=teacher,
        # Trained by separate commands: there is no common time.
        together={},
        versions=runs[0].marker["versions"],
        machine={"processor": platform.processor() or platform.machine()},
        scores=tuple(scores.values()),
        agreement=tuple(agreement.values()),
    )
    return intervals.with_differences(found)


def _refuse_mixed(runs: Sequence[_Run]) -> None:
    """Check that all runs have one task and one deciding score; those of an older kdkit may not say
    theirs.

    Raises:
        RecipeError: they have not.
    """
    tasks: dict[str, str] = {}
    scores: dict[str, str] = {}
    for run in runs:
        name = str(run.folder.path)
        if "task" in run.marker:
            tasks[name] = run.marker["task"]
        if run.marker.get("scores"):
            scores[name] = run.marker["scores"][0].title
    refuse_mixed("task", tasks)
    refuse_mixed("deciding score", scores)


def _again(folder: Path) -> str:
    """Return the command that trains a run again from its stored recipe."""
    return shlex.join(
        ["kdkit", "train", str(folder / "recipe.yaml"), "--run", f"again/{folder.name}"]
    )


def _open(path: Path, plugins: Sequence[Path]) -> _Run:
    folder = RunFolder(path)
    return _Run(folder, folder.about(), folder.plain_recipe(), folder.result(), plugins)


def _named(groups: Sequence[Sequence[_Run]]) -> dict[str, list[_Run]]:
    """Name the groups by their recipe's name, with the first run's folder if two have the same or
    it is that of the teacher's row; runs by seed, each seed once.
    """
    names = [str(each[0].recipe["name"]) for each in groups]
    found: dict[str, list[_Run]] = {}
    for name, each in zip(names, groups, strict=True):
        is_clear = names.count(name) == 1 and name != TEACHER
        called = name if is_clear else f"{name}, {each[0].folder.path.name}"
        seeds: dict[int, _Run] = {}
        # Of several runs of one seed, a finished one stands for it.
        for run in sorted(each, key=lambda one: one.result is None):
            seeds.setdefault(int(run.recipe["seed"]), run)
        found[called] = [seeds[seed] for seed in sorted(seeds)]
    return found


def _variant(name: str, runs: Sequence[_Run], network: Profile | None) -> Variant:
    done = [run for run in runs if run.result]
    results = [run.result for run in done if run.result]
    told = dict(brief(runs[0].recipe))
    return Variant(
        name=name,
        about=f"{told['total']}; schedule {told['schedule']}",
        seeds=tuple(int(run.recipe["seed"]) for run in done),
        folders=tuple(run.folder.path for run in done),
        last=by_name([result.test for result in results]),
        best=by_name([result.best["test"] for result in results if result.best]),
        difference=None,
        cost=cost(results, total([network]), memory=0) if results and network else None,
        failures={
            int(
                run.recipe["seed"]
            ): f"not finished, {len(run.folder.metrics('epoch'))} epochs so far"
            for run in runs
            if not run.result
        },
        averaged=runs[0].recipe["train"].get("average_best") or 0,
        validation=by_name([result.validation for result in results if result.validation]),
        length=_length(done),
    )


def _length(runs: Sequence[_Run]) -> Length | None:
    with contextlib.suppress(KdkitError):  # files that a recipe names no longer exist
        return mean_length([(run.folder, run.opened().recipe.spec.data) for run in runs])
    return None


def _profiles(
    named: Mapping[str, Sequence[_Run]], taught: _Run | None
) -> tuple[Teacher | None, dict[str, Profile]]:
    """Measure the costs of the networks, timed together on one thread: of the common teacher, and
    of each variant's first student.
    """
    models: dict[str, tuple[TappedModel, Shape]] = {}
    for name, runs in named.items():
        # something it needs no longer exists, such as a teacher of which the student has a part
        with contextlib.suppress(KdkitError):
            finished = next((one for one in runs if one.result), None)
            if finished is None:
                continue
            run = finished.opened()
            models[name] = (student := run.student()), run.seen_by(student)
    teachers: list[tuple[TappedModel, Shape]] = []
    if taught is not None:
        with contextlib.suppress(KdkitError):
            run = taught.opened()
            teachers = [(one, run.seen_by(one)) for one in run.teachers()]
    with profile.threads(1):  # several threads wait for each other on a busy machine
        # In turns, as times of different moments on a busy machine do not compare.
        found = profile.measure_together([*teachers, *models.values()], runs=100, seconds=TIMED)
    own = found[: len(teachers)]
    return _teacher(taught, own), dict(zip(models, found[len(teachers) :], strict=True))


def _teacher(taught: _Run | None, networks: Sequence[Profile]) -> Teacher | None:
    """Describe the teacher with the scores measured when it taught; several are added up."""
    # A teacher without the data's classes is not measured, and has no row.
    if taught is None or taught.result is None or not taught.result.teacher:
        return None
    return Teacher(
        name=_called(taught),
        last=taught.result.teacher,
        **vars(total(networks)),
        lengths=of_teachers(taught.folder.path, taught.plugins),
    )


def _called(taught: _Run) -> str:
    one, several = taught.recipe.get("teacher"), taught.recipe.get("teachers") or ()
    if one is None:
        return f"{len(several)} together"
    return Path(one["recipe"]).stem if one.get("recipe") else str(one["model"])
