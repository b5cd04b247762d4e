"""Collects the findings from a study's finished runs."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import torch

from kdkit.recipe import Recipe, code_of_all
from kdkit.runs.folder import RunFolder, versions
from kdkit.runs.plan import formula
from kdkit.runs.result import Result
from kdkit.runs.run import Run
from kdkit.study.findings import Cost, Findings, Teacher, Variant
from kdkit.study.intervals import with_differences
from kdkit.study.lengths import mean_length, of_teachers
from kdkit.study.measurements import Measured, Network, common_teacher
from kdkit.study.search import Searched
from kdkit.study.trainings import StudyRun, judges, scores_of
from kdkit.study.variants import Study

# `late_loss` is the mean over this share of the epochs, the last ones: 15 of 25
LATE = Fraction(3, 5)


class Finder:
    """Collects the findings from a study's finished runs.

    Args:
        study: the study.
        planned: its trainings.
        failures: reasons of those that failed, by folder.
        measured: the measurements of finished runs.
        searched: the choice of a search.
    """

    def __init__(
        self,
        study: Study,
        planned: Sequence[StudyRun],
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
        runs = {(each.variant, each.seed): Run(each.recipe, each.folder) for each in planned}
        self.runs = {place: runs[place] for place in self.results}
        self.teacher = common_teacher(list(self.runs.values()))
        # the baseline first, because its first score decides
        self.scores, self.agreement = scores_of(
            judges(sorted(planned, key=lambda each: each.variant != study.baseline))
        )

    def findings(self) -> Findings:
        """Measure the networks of the first runs, and collect all findings."""
        study = self.study
        firsts: dict[str, Run] = {}
        for (variant, _), run in self.runs.items():
            firsts.setdefault(variant, run)
        networks, network_of_teacher = self.measured.networks(
            list(firsts.values()), self.teacher.run if self.teacher else None
        )
        by_variant = dict(zip(firsts, networks, strict=True))
        findings = Findings(
            study.name,
            study.question,
            study.baseline,
            study.command,
            tuple(self._variant(name, by_variant.get(name)) for name in study.variants),
            self._teacher(network_of_teacher),
            self.measured.together([each.recipe.fingerprint for each in self.planned]),
            versions(),
            _machine(),
            search=self.searched.whole if self.searched else None,
            scores=self.scores,
            agreement=self.agreement,
        )
        return with_differences(findings)

    def _teacher(self, network: Network | None) -> Teacher | None:
        if self.teacher is None or network is None:
            return None
        run = self.teacher.run
        lengths = of_teachers(run.folder, code_of_all(run.recipe))
        return Teacher(self.teacher.name, self.teacher.scores(), **vars(network), lengths=lengths)

    def _variant(self, name: str, network: Network | None) -> Variant:
        seeds = tuple(seed for seed in self.study.seeds if (name, seed) in self.results)
        runs = [self.runs[name, seed] for seed in seeds]
        results = [self.results[name, seed] for seed in seeds]
        return Variant(
            name=name,
            about=about(self.study.variants[name]),
            seeds=seeds,
            folders=tuple(run.folder for run in runs),
            last=_by_name([*self._last(runs, results)]),
            best=_by_name([*self._best(runs, results)]),
            difference=None,
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

    def _last(self, runs: Sequence[Run], results: Sequence[Result]) -> Iterator[dict[str, float]]:
        """Yield each run's scores at its end, with its losses."""
        for run, result in zip(runs, results, strict=True):
            yield {**self._compared(run, result.test), **_losses(run)}

    def _best(self, runs: Sequence[Run], results: Sequence[Result]) -> Iterator[dict[str, float]]:
        """Yield each run's scores at its best epoch, if it chooses one."""
        for run, result in zip(runs, results, strict=True):
            if result.best:
                yield self._compared(run, result.best["test"], best=True)

    def _compared(
        self, run: Run, scores: Mapping[str, float], *, best: bool = False
    ) -> dict[str, float]:
        """Add the scores that compare a run with the common teacher to its test scores."""
        if self.teacher is None or {score.name for score in self.agreement} <= set(scores):
            return dict(scores)
        return {**scores, **self.measured.answers(run, self.teacher, best=best)}


def _losses(run: Run) -> dict[str, float]:
    """Read the training loss of the last epoch, and its mean over the last stage's `LATE` epochs;
    empty if no epoch is logged.
    """
    lines = RunFolder(run.folder).metrics("epoch")
    losses = [line["train"]["loss"] for line in lines if line["stage"] == lines[-1]["stage"]]
    if not losses:
        return {}
    late = losses[-math.ceil(len(losses) * LATE) :]
    return {"loss": losses[-1], "late_loss": statistics.fmean(late)}


def _by_name(scores: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    """Group values by score, one a seed; a score that some runs lack is left out."""
    first = scores[0] if scores else {}
    names = [name for name in first if all(name in of_seed for of_seed in scores)]
    return {name: tuple(of_seed[name] for of_seed in scores) for name in names}


def _cost(runs: Sequence[Run], results: Sequence[Result], network: Network, memory: int) -> Cost:
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
    """Describe a recipe's training in one line: `0.1 * cross_entropy + 0.9 * logit_kl(temperature
    4); schedule offline`.
    """
    spec = recipe.spec
    options = [
        f"{key} {value}"
        for key, value in spec.schedule
        if key in spec.schedule.model_fields_set and key != "use"
    ]
    losses = formula(dict(zip(recipe.loss_names(), spec.losses, strict=True)))
    return f"{losses}; schedule {' '.join([spec.schedule.use, *options])}"


def _machine() -> dict[str, str]:
    """Name the CPU, and the accelerator if there is one."""
    accelerator = {"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"processor": _processor(), "threads": str(torch.get_num_threads()), **accelerator}


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines: Iterator[str] = iter(described.read_text().splitlines() if described.is_file() else [])
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
