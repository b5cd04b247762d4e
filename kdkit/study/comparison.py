"""Runs a study: trains the missing runs, and writes down the findings."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kdkit.errors import Interrupted
from kdkit.launching import is_first
from kdkit.runs.agreement import agreed
from kdkit.runs.checkpoints import write_atomically
from kdkit.runs.folder import RunFolder
from kdkit.runs.interrupts import sigterm_raises
from kdkit.runs.run import Run
from kdkit.runs.spreading import Crew, part
from kdkit.study.checks import check
from kdkit.study.finder import Finder
from kdkit.study.findings import Findings
from kdkit.study.lockstep import train_together
from kdkit.study.measurements import Measured
from kdkit.study.search import Searched, after_search
from kdkit.study.trainings import StudyRun, trainings
from kdkit.study.variants import Study

FINDINGS = "study.json"
STUDY = "study.yaml"


def compare(
    study: Study,
    *,
    max_parallel: int | None = None,
    spread: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Findings | None:
    """Run a study, or what is left of it, and write `study.yaml` and `study.json` into its folder.

    Args:
        study: the study to run.
        max_parallel: runs that are trained side by side at most.
        spread: if a launcher has started several processes, each trains its own seeds and groups
            (False: all train each run together).
        say: called with messages about the progress.

    Returns:
        The findings; None in all processes of a launch but the first.

    Raises:
        RecipeError: the variants differ in more than what is compared, or one cannot work; found
            before anything is trained.
        Interrupted: a signal stopped it; everything is saved, and another call resumes.
    """
    first = is_first()
    with agreed("study") as asked:
        planned = trainings(study)
        with _advice_if_stopped(study, planned):
            check(study, say)
        asked |= {f"{each.variant} (seed {each.seed})": each.recipe.content() for each in planned}
        asked["--spread"] = spread
    crew = Crew.of_launch() if spread else None
    if first:
        write_atomically(study.path / STUDY, study.dump().encode())
    searched: Searched | None = None
    if study.tune:
        study, searched = _searched(study, max_parallel, say, crew)
    planned = trainings(study)
    measured = _measured(study, say) if first else None
    with _advice_if_stopped(study, planned):
        failures = _train(planned, measured, max_parallel, say, crew)
        if measured is None:
            return None
        part()
        findings = Finder(study, planned, failures, measured, searched).findings()
    findings.save(study.path / FINDINGS)
    return findings


@contextlib.contextmanager
def _advice_if_stopped(study: Study, planned: Sequence[StudyRun]) -> Iterator[None]:
    """Report how far a study is, and how to resume it, when a signal stops it.

    Raises:
        Interrupted: it was stopped.
    """
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


def _searched(
    study: Study, max_parallel: int | None, say: Callable[[str], None], crew: Crew | None
) -> tuple[Study, Searched]:
    """Run the search of a study, and replace each variant by its chosen point."""
    planned = trainings(study.search)
    measured = _measured(study.search, say) if is_first() else None
    with _advice_if_stopped(study.search, planned):
        _train(planned, measured, max_parallel, say, crew)
    return after_search(study, planned)


def _measured(study: Study, say: Callable[[str], None]) -> Measured:
    return Measured(study.path / "measured.json", say)


def _train(
    planned: Sequence[StudyRun],
    measured: Measured | None,
    max_parallel: int | None,
    say: Callable[[str], None],
    crew: Crew | None,
) -> dict[Path, str]:
    """Train the unfinished runs, and record their costs; return the reasons of failures by
    folder.
    """
    left = {each.folder: Run(each.recipe, each.folder) for each in planned if each.result is None}
    every = len({each.folder for each in planned})
    if measured:
        say(f"{every} runs: {every - len(left)} trained already, {len(left)} to train")
        for folder, recipe in {each.folder: each.recipe for each in planned}.items():
            if folder not in left:
                RunFolder(folder).finished(recipe, say)  # tells of metrics that they lack
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
