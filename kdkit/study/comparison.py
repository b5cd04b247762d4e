"""Carries out a study: trains what is not trained yet, measures, and says what was found."""

from __future__ import annotations

import contextlib
import math
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch

from kdkit.errors import Interrupted, RecipeError, RunError
from kdkit.launching import is_first
from kdkit.recipe import Recipe, code_of_all
from kdkit.recipe.fairness import refuse_unequal
from kdkit.runs.agreement import agreed
from kdkit.runs.checkpoints import write_atomically
from kdkit.runs.folder import Result, RunFolder, versions
from kdkit.runs.interrupts import sigterm_raises
from kdkit.runs.plan import formula
from kdkit.runs.spreading import Crew, part
from kdkit.runs.training import folder_for
from kdkit.study import search
from kdkit.study.findings import Cost, Findings, Length, Search, Teacher, Tuned, Variant
from kdkit.study.grid import has
from kdkit.study.intervals import corrected, paired
from kdkit.study.lengths import STEPS, mean_length, of_plan, of_run, of_teachers, refuse_longer
from kdkit.study.lockstep import Job, train_together
from kdkit.study.measurements import (
    COMPARED_WITH_TEACHER,
    FinishedRun,
    Measured,
    Network,
    common_teacher,
)
from kdkit.study.variants import Study, point_name

FINDINGS = "study.json"
STUDY = "study.yaml"
# share of the epochs, the last ones, that `late_loss` is the mean of: 15 of 25
LATE = Fraction(3, 5)


@dataclass(frozen=True)
class Training:
    """One training of a study: a variant with a seed, and the folder in which it is or will be."""

    variant: str
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def result(self) -> Result | None:
        """Of the finished run, if it is finished."""
        return RunFolder(self.folder).finished(self.recipe)


def trainings(study: Study) -> list[Training]:
    """Every variant with every seed. A run of the same content is taken where it is: a finished
    one anywhere in the study's runs folder, an unfinished one in the study's own. Equal variants
    are one training.

    Raises:
        RecipeError: the variants differ in more than what is compared.
        RunError: the study's folder is a run's.
    """
    _refuse_unknown(study)
    refuse_unequal(study.variants, study.baseline, (*study.allow, *study.tune))
    if (study.path / "run.json").is_file():
        raise RunError(f"{study.path} is the folder of a run; give the study another `name:`")
    shelf = _shelf(study)
    found = []
    for variant in study.variants:
        for seed in study.seeds:
            recipe = study.recipe(variant, seed)
            known = recipe.fingerprint if recipe.fingerprint in shelf else recipe.older_fingerprint
            if known not in shelf:
                known = recipe.fingerprint
                shelf[known] = folder_for(recipe, study.path, f"{recipe.spec.name}-seed{seed}")
            found.append(Training(variant, seed, recipe, shelf[known]))
    return found


def _refuse_unknown(study: Study) -> None:
    """Make sure that what may differ is a key of some variant.

    Raises:
        RecipeError: it is not; it may be misspelt.
    """
    for key in study.allow:
        if key != STEPS and not any(
            has(recipe.spec, key.split(".")) for recipe in study.variants.values()
        ):
            raise RecipeError(f"allow: no variant has the key '{key}'")


def compare(
    study: Study,
    *,
    max_parallel: int | None = None,
    spread: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Findings | None:
    """Carry a study out, or what is left of it, and write `study.yaml` and `study.json` into its
    folder.

    Args:
        study: what is compared.
        max_parallel: runs that are trained side by side at most.
        spread: where a launcher has started several processes, each trains seeds and groups of its
            own (False: all train each run).
        say: told of what happens.

    Returns:
        What was found; None in processes of a launch that are not its first.

    Raises:
        RecipeError: the variants differ in more than what is compared, or one cannot work; found
            before anything is trained.
        Interrupted: a signal stopped it; all is saved, and a further call goes on.
    """
    first = is_first()
    with agreed("study") as asked:
        planned = trainings(study)
        with _told_if_stopped(study, planned):
            check(study, say)
        asked |= {f"{each.variant} (seed {each.seed})": each.recipe.content() for each in planned}
        asked["--spread"] = spread
    crew = Crew.of_launch() if spread else None
    if first:
        write_atomically(study.path / STUDY, study.dump().encode())
    searched: Searched | None = None
    if study.tune:
        planned = trainings(study.search)
        with _told_if_stopped(study.search, planned):
            _train(
                planned, _measured(study.search, say) if first else None, max_parallel, say, crew
            )
        study, searched = after_search(study, planned)
    planned = trainings(study)
    measured = _measured(study, say) if first else None
    with _told_if_stopped(study, planned):
        failures = _train(planned, measured, max_parallel, say, crew)
        if measured is None:
            return None
        part()
        found = _Finder(study, planned, failures, measured, searched).findings()
    found.save(study.path / FINDINGS)
    return found


@contextlib.contextmanager
def _told_if_stopped(study: Study, planned: Sequence[Training]) -> Iterator[None]:
    try:
        with sigterm_raises():
            yield
    except (Interrupted, KeyboardInterrupt) as error:
        done = sum(each.result is not None for each in planned)
        says = (
            f"{study.name}: stopped with {done} of {len(planned)} runs finished; the same command"
            " goes on where it was"
        )
        raise Interrupted(says, getattr(error, "signal", signal.SIGINT)) from None


def _measured(study: Study, say: Callable[[str], None]) -> Measured:
    return Measured(study.path / "measured.json", say)


def check(study: Study, fetch: Callable[[str], None] | None = None) -> dict[str, Length]:
    """How long each variant trains (of a search, at its longest point), with all that can be
    refused before anything is trained.

    `fetch` is told of what is fetched for it (None: nothing is fetched).

    Raises:
        RecipeError: a variant cannot work, differs in more than what is compared, or trains longer
            than the baseline.
        RunError: the study's folder is a run's.
    """
    planned = trainings(study)
    if study.points:
        longest = {
            name: max(points, key=lambda point: point.recipe.spec.train.epochs)
            for name, points in study.points.items()
        }
        wanted = {point_name(name, point): name for name, point in longest.items()}
        planned = [
            replace(each, variant=wanted[each.variant])
            for each in trainings(study.search)
            if each.variant in wanted
        ]
    lengths: dict[str, Length] = {}
    problems: list[str] = []
    by_variant = {each.variant: each for each in planned}
    # what is finished needs no plan any more
    by_variant |= {each.variant: each for each in planned if each.result}
    for name, each in by_variant.items():
        try:
            # which may end some runs early
            finished = each.result is not None and not each.recipe.spec.train.patience
            lengths[name] = (
                of_run(RunFolder(each.folder), each.recipe.spec.data)
                if finished
                else of_plan(each.recipe, fetch)
            )
        except RecipeError as error:
            problems += [f"{line} (variant {name})" for line in str(error).splitlines()]
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    refuse_longer(lengths, study.variants, study.baseline, study.allow)
    return {name: lengths[name] for name in study.variants}


def after_search(study: Study, planned: Sequence[Training]) -> tuple[Study, Searched]:
    """The study with each variant at its chosen point, and what was chosen; `planned` are the
    trainings of its search.

    Raises:
        RunError: of some variant no point could be trained.
    """
    results: dict[str, list[Result | None]] = {}
    for each in planned:
        results.setdefault(each.variant, []).append(each.result)
    points = search.choose(study, results)
    tuned = search.told(study, points, results)
    return study.chosen(points), Searched(tuned, search.summary(study, tuned, study.search.seeds))


@dataclass(frozen=True)
class Searched:
    """What a search has chosen for each variant, and what it was."""

    tuned: Mapping[str, Tuned]
    whole: Search


def _shelf(study: Study) -> dict[str, Path]:
    """Folders of runs by fingerprint; a finished one is preferred, then one in the study's own
    folder.
    """
    markers = [
        *study.path.glob("*/run.json"),
        *study.folder.glob("*/run.json"),
        *study.folder.glob("*/*/run.json"),
    ]
    finished: dict[str, Path] = {}
    unfinished: dict[str, Path] = {}
    for marker in dict.fromkeys(
        sorted(markers, key=lambda path: (path.parent.parent != study.path, path))
    ):
        folder = RunFolder(marker.parent)
        # a damaged run, or another program's: nothing that could be taken
        with contextlib.suppress(RunError):
            fingerprint = folder.about()["fingerprint"]
            if folder.path.parent == study.path:
                unfinished.setdefault(fingerprint, folder.path)
            if folder.result():
                finished.setdefault(fingerprint, folder.path)
    return unfinished | finished


def _train(
    planned: Sequence[Training],
    measured: Measured | None,
    max_parallel: int | None,
    say: Callable[[str], None],
    crew: Crew | None,
) -> dict[Path, str]:
    """Train what is not finished; reasons of failures by folder. What it takes is taken down
    where it is measured.
    """
    left = {each.folder: Job(each.recipe, each.folder) for each in planned if each.result is None}
    every = len({each.folder for each in planned})
    if measured:
        say(f"{every} runs: {every - len(left)} trained already, {len(left)} to train")
    if not left:
        return {}
    wall, cpu = time.monotonic(), time.process_time()
    try:
        outcomes = train_together(
            list(left.values()), max_parallel=max_parallel, say=say, crew=crew
        )
    finally:
        spent = time.process_time() - cpu
        if measured:
            done = [
                each.recipe.fingerprint for each in planned if each.folder in left and each.result
            ]
            measured.spend(time.monotonic() - wall, spent, done)
    if crew and (others := crew.gather(spent)[1:]) and measured:
        measured.spend(0, sum(others), [])
    return {
        outcome.job.folder: outcome.reason for outcome in outcomes if outcome.reason is not None
    }


class _Finder:
    """Puts together what a study's finished runs say."""

    def __init__(
        self,
        study: Study,
        planned: Sequence[Training],
        failures: Mapping[Path, str],
        measured: Measured,
        searched: Searched | None = None,
    ) -> None:
        self.study = study
        self.planned = planned
        self.failures = failures
        self.measured = measured
        self.searched = searched
        self.results = {
            (each.variant, each.seed): result for each in planned if (result := each.result)
        }
        runs = {
            (each.variant, each.seed): FinishedRun(each.recipe, each.folder) for each in planned
        }
        self.runs = {place: runs[place] for place in self.results}
        self.teacher = common_teacher(list(self.runs.values()))

    def findings(self) -> Findings:
        study = self.study
        firsts: dict[str, FinishedRun] = {}
        for (variant, _), run in self.runs.items():
            firsts.setdefault(variant, run)
        networks, taught = self.measured.networks(
            list(firsts.values()), self.teacher.run if self.teacher else None
        )
        by_variant = dict(zip(firsts, networks, strict=True))
        variants = corrected(self._variant(name, by_variant.get(name)) for name in study.variants)
        teacher = None
        if self.teacher and taught:
            run = self.teacher.run
            lengths = of_teachers(run.folder, code_of_all(run.recipe))
            teacher = Teacher(
                self.teacher.name, self.teacher.metrics(), **vars(taught), lengths=lengths
            )
        together = self.measured.together([each.recipe.fingerprint for each in self.planned])
        return Findings(
            study.name,
            study.question,
            study.baseline,
            study.command,
            variants,
            teacher,
            together,
            versions(),
            _machine(),
            search=self.searched.whole if self.searched else None,
        )

    def _variant(self, name: str, network: Network | None) -> Variant:
        seeds = tuple(seed for seed in self.study.seeds if (name, seed) in self.results)
        runs = [self.runs[name, seed] for seed in seeds]
        results = [self.results[name, seed] for seed in seeds]
        baseline = self.study.baseline
        return Variant(
            name=name,
            about=about(self.study.variants[name]),
            seeds=seeds,
            folders=tuple(run.folder for run in runs),
            last=_by_name(
                [
                    {**self._scores(run, result.test), **_losses(run)}
                    for run, result in zip(runs, results, strict=True)
                ]
            ),
            best=_by_name(
                [
                    self._scores(run, r.best["test"], best=True)
                    for run, r in zip(runs, results, strict=True)
                    if r.best
                ]
            ),
            difference=paired(self._top1(name), self._top1(baseline)) if name != baseline else None,
            cost=_cost(runs, results, network, self.measured.memory(runs[0])) if network else None,
            failures={
                each.seed: self.failures[each.folder]
                for each in self.planned
                if each.variant == name and each.folder in self.failures
            },
            averaged=self.study.variants[name].spec.train.average_best or 0,
            validation=_by_name([result.validation for result in results if result.validation]),
            length=mean_length([(RunFolder(run.folder), run.recipe.spec.data) for run in runs]),
            tuned=self.searched.tuned[name] if self.searched else None,
        )

    def _top1(self, variant: str) -> dict[int, float]:
        return {
            seed: result.test["top1"]
            for (name, seed), result in self.results.items()
            if name == variant
        }

    def _scores(
        self, run: FinishedRun, told: Mapping[str, float], *, best: bool = False
    ) -> dict[str, float]:
        """A run's test metrics, with those that compare it with the common teacher."""
        if self.teacher is None or set(COMPARED_WITH_TEACHER) <= set(told):
            return dict(told)
        return {**told, **self.measured.answers(run, self.teacher, best=best)}


def _losses(run: FinishedRun) -> dict[str, float]:
    """The training loss of the last epoch, and its mean over the last stage's `LATE` epochs, if
    they are told.
    """
    lines = RunFolder(run.folder).metrics("epoch")
    found = [line["train"]["loss"] for line in lines if line["stage"] == lines[-1]["stage"]]
    return (
        {"loss": found[-1], "late_loss": statistics.fmean(found[-math.ceil(len(found) * LATE) :])}
        if found
        else {}
    )


def _by_name(scores: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    """One value a seed of each metric that all have."""
    names = [name for name in scores[0] if all(name in one for one in scores)] if scores else []
    return {name: tuple(one[name] for one in scores) for name in names}


def _cost(
    runs: Sequence[FinishedRun], results: Sequence[Result], network: Network, memory: int
) -> Cost:
    speeds = [
        line["images_per_second"] for run in runs for line in RunFolder(run.folder).metrics("epoch")
    ]
    return Cost(
        seconds=statistics.mean(result.seconds for result in results),
        cpu_seconds=statistics.mean(result.cpu_seconds for result in results),
        memory=memory,
        images_per_second=statistics.mean(speeds) if speeds else 0.0,
        **vars(network),
    )


def about(recipe: Recipe) -> str:
    """What a recipe trains, in one line: `0.1 * cross_entropy + 0.9 * logit_kl(temperature 4);
    schedule offline`.
    """
    spec = recipe.spec
    told = [
        f"{key} {value}"
        for key, value in spec.schedule
        if key in spec.schedule.model_fields_set and key != "use"
    ]
    return (
        f"{formula(dict(zip(recipe.loss_names(), spec.losses, strict=True)))}; schedule"
        f" {' '.join([spec.schedule.use, *told])}"
    )


def _machine() -> dict[str, str]:
    """The processor, and the accelerator if there is one."""
    accelerator = {"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"processor": _processor(), "threads": str(torch.get_num_threads()), **accelerator}


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines: Iterator[str] = iter(described.read_text().splitlines() if described.is_file() else [])
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
