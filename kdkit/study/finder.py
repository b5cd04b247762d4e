"""Collects what a study's finished runs show: the best point of each variant's search, and the
findings.
"""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

from kdkit.contracts.task import ScoreInfo
from kdkit.errors import RunError
from kdkit.recipe import Recipe, code_of_all
from kdkit.recipe.fairness import in_words
from kdkit.runs.folder import RunFolder
from kdkit.runs.plan import formula
from kdkit.runs.result import Result, versions
from kdkit.runs.run import Run
from kdkit.students.curves import deciding
from kdkit.study.findings import Cost, Findings, Search, Teacher, Tuned, Variant, rank
from kdkit.study.intervals import with_differences
from kdkit.study.measurements import Measured, Network, common_teacher, mean_length, of_teachers
from kdkit.study.plan import StudyRun, judges, scores_of
from kdkit.study.variants import Point, Study, point_name

# by the name of a variant's point, one a seed; None: it could not be trained
Results = Mapping[str, Sequence[Result | None]]


@dataclass(frozen=True)
class Searched:
    """The choice of a search for each variant, and the search as a whole."""

    tuned: Mapping[str, Tuned]
    whole: Search


def after_search(study: Study, planned: Sequence[StudyRun]) -> tuple[Study, Searched]:
    """Replace each variant by its chosen point, and describe the choice; `planned` are the
    trainings of its search.

    Raises:
        RunError: no point of some variant could be trained.
    """
    results: dict[str, list[Result | None]] = {}
    for each in planned:
        results.setdefault(each.variant, []).append(each.result)
    score = deciding(scores_of(judges(planned))[0])
    points = choose(study, results, score)
    tuned = tuned_by(study, points, results, score)
    return study.chosen(points), Searched(tuned, summary(study, tuned, study.search.seeds))


def choose(study: Study, results: Results, score: ScoreInfo) -> dict[str, Point]:
    """Choose for each variant the point with the best mean score on validation after the last
    epoch; the first of equal ones.

    Raises:
        RunError: no point of some variant could be trained with every seed.
    """
    chosen = {}
    for name, points in study.points.items():
        scores = validation(name, points, results, score)
        if not scores:
            raise RunError(
                f"{name}: no point of its search could be trained with every seed, so that nothing"
                " can be chosen"
            )
        # Of equal points the first: `max` keeps it.
        best = max(scores, key=lambda label: rank(score, [scores[label]]))
        chosen[name] = next(point for point in points if point.label == best)
    return chosen


def validation(
    variant: str, points: Sequence[Point], results: Results, score: ScoreInfo
) -> dict[str, float]:
    """Compute the mean score on validation of each point that was trained with every seed, by the
    point's label.
    """
    means: dict[str, float] = {}
    for point in points:
        values = [
            result.validation[score.name]
            for result in results[point_name(variant, point)]
            if result and result.validation
        ]
        # A point that failed with one seed is none to choose: its mean would be over easier seeds.
        if len(values) == len(results[point_name(variant, point)]):
            means[point.label] = statistics.fmean(values)
    return means


def tuned_by(
    study: Study, chosen: Mapping[str, Point], results: Results, score: ScoreInfo
) -> dict[str, Tuned]:
    """Describe the choice for each variant, and its cost."""
    return {
        name: Tuned(
            chosen[name].label,
            chosen[name].values,
            tuple(
                key
                for key, values in study.tune.items()
                if at_edge(chosen[name].values[key], values)
            ),
            validation(name, points, results, score),
            sum(
                result.cpu_seconds
                for point in points
                for result in results[point_name(name, point)]
                if result
            ),
        )
        for name, points in study.points.items()
    }


def at_edge(value: object, values: Sequence[object]) -> bool:
    """Check whether a value is the smallest or the largest of several numbers."""
    numbers = [
        number
        for number in values
        if isinstance(number, int | float) and not isinstance(number, bool)
    ]
    # A grid of words or of one value has no edge.
    return len(numbers) == len(values) > 1 and value in (min(numbers), max(numbers))


def summary(study: Study, tuned: Mapping[str, Tuned], seeds: Sequence[int]) -> Search:
    """Describe the search as a whole."""
    runs = sum(map(len, study.points.values())) * len(seeds)
    keys = {key: tuple(values) for key, values in study.tune.items()}
    return Search(keys, tuple(seeds), runs, sum(choice.cpu_seconds for choice in tuned.values()))


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
        # One run a variant: its seeds have networks of one size.
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
        # Teachers that differ between variants have no row, as no single one is compared with all.
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
            last=by_name([*self._last(runs, results)]),
            best=by_name([*self._best(runs, results)]),
            difference=None,
            # Memory of one seed's step: the others have the same shapes.
            cost=cost(results, network, self.measured.memory(runs[0])) if network else None,
            failures={
                each.seed: self.failures[each.folder]
                for each in self.planned
                if each.variant == name and each.folder in self.failures
            },
            averaged=self.study.variants[name].spec.train.average_best or 0,
            validation=by_name([result.validation for result in results if result.validation]),
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
        # A run with a teacher was compared with it when it was trained.
        compared = {score.name for score in self.agreement if not score.part_of}
        if self.teacher is None or compared <= set(scores):
            return dict(scores)
        return {**scores, **self.measured.answers(run, self.teacher, best=best)}


def _losses(run: Run) -> dict[str, float]:
    """Read the training loss of the last epoch, and its mean over the last stage's `LATE` epochs;
    empty if no epoch is logged.
    """
    lines = RunFolder(run.folder).metrics("epoch")
    # Earlier stages may have other objectives, whose losses do not compare.
    losses = [line["train"]["loss"] for line in lines if line["stage"] == lines[-1]["stage"]]
    if not losses:
        return {}
    # Rounded up, so that a single epoch counts.
    late = losses[-math.ceil(len(losses) * LATE) :]
    return {"loss": losses[-1], "late_loss": statistics.fmean(late)}


def by_name(scores: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    """Group values by score, one a seed; a score that some runs lack is left out."""
    first = scores[0] if scores else {}
    names = [name for name in first if all(name in of_seed for of_seed in scores)]
    return {name: tuple(of_seed[name] for of_seed in scores) for name in names}


def cost(results: Sequence[Result], network: Network, memory: int) -> Cost:
    """Return what the training of a variant's runs took, and what the network costs."""
    speeds = [
        line["images_per_second"]
        for result in results
        for line in RunFolder(result.folder).metrics("epoch")
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
    # Only what the recipe says of its schedule, as in `formula`.
    said = spec.schedule.model_dump(mode="json", by_alias=True, exclude_unset=True)
    options = [f"{key} {in_words(value)}" for key, value in said.items() if key != "use"]
    # A loss may be named `taught` in every variant, by which none is told from another.
    uses = [loss.use for loss in spec.losses]
    names = [
        use if uses.count(use) == 1 else name
        for use, name in zip(uses, recipe.loss_names(), strict=True)
    ]
    losses = formula(dict(zip(names, spec.losses, strict=True)))
    return f"{losses}; schedule {' '.join([spec.schedule.use, *options])}"


def _machine() -> dict[str, str]:
    """Name the CPU, and the accelerator if there is one."""
    accelerator = {"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"processor": _processor(), "threads": str(torch.get_num_threads()), **accelerator}


def _processor() -> str:
    # On Linux, `platform.processor` is empty or names only the architecture.
    described = Path("/proc/cpuinfo")
    lines: Iterator[str] = iter(described.read_text().splitlines() if described.is_file() else [])
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
