"""Runs a study: trains the missing runs, and writes down the findings."""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from kdkit.errors import Interrupted
from kdkit.files import write_atomically
from kdkit.launching import is_first, leave_launch
from kdkit.runs.agreement import agreed
from kdkit.runs.folder import RunFolder
from kdkit.runs.interrupts import sigterm_raises
from kdkit.runs.leftovers import LOCK
from kdkit.runs.run import Run
from kdkit.study.finder import Finder, Searched, after_search
from kdkit.study.findings import Findings, Length
from kdkit.study.lockstep import train_together
from kdkit.study.measurements import Measured
from kdkit.study.plan import StudyRun, check, trainings
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
        spread: share the runs with every other process that compares this study, of this launch or
            another (False: the processes of a launch train each run together).
        say: called with messages about the progress.

    Returns:
        The findings; None in all processes of a launch but the first.

    Raises:
        RecipeError: the variants differ in more than what is compared, or one cannot work; found
            before anything is trained.
        Interrupted: a signal stopped it; everything is saved, and another call resumes.
    """
    first = is_first()
    writes = first or spread
    with agreed("study") as asked:
        planned = trainings(study)
        with advice_if_stopped(functools.partial(_how_far, study, planned)):
            lengths = check(study, say)
        asked |= {f"{each.variant} (seed {each.seed})": each.recipe.content() for each in planned}
        asked["--spread"] = spread
        if not spread:
            # processes that train each run together must go through the same passes
            asked["--max-parallel"] = max_parallel
    if spread:
        leave_launch()
    if writes:
        write_atomically(study.path / STUDY, study.dump().encode())
    searched: Searched | None = None
    if study.tune:
        planned = trainings(study.search)
        with advice_if_stopped(functools.partial(_how_far, study.search, planned)):
            _train(study.search, planned, {}, max_parallel, spread, writes, say)
        study, searched = after_search(study, planned)
    planned = trainings(study)
    with advice_if_stopped(functools.partial(_how_far, study, planned)):
        failures = _train(study, planned, lengths, max_parallel, spread, writes, say)
        if not first:
            return None
        leave_launch()
        # another process may have finished what failed, or was busy, here
        finished = {each.folder for each in planned if each.result is not None}
        failures = {folder: why for folder, why in failures.items() if folder not in finished}
        # whoever measures later finds what the first one has measured
        before = _state_of(study.path / FINDINGS)
        with _measured(study, say) as measured:
            # with many processes, each after the other would take hours to find the same
            if spread and _state_of(study.path / FINDINGS) != before and not failures:
                theirs = Findings.load(study.path / FINDINGS)
                if _tells_of(theirs) == {(run.variant, run.seed, run.folder) for run in planned}:
                    return theirs
            findings = Finder(study, planned, failures, measured, searched).findings()
            findings.save(study.path / FINDINGS)
    return findings


def _state_of(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is replaced; None if there is none."""
    if not path.exists():
        return None
    about = path.stat()
    return about.st_ino, about.st_mtime_ns


def _tells_of(found: Findings) -> set[tuple[str, int, Path]]:
    """Return the runs whose results are in the findings."""
    return {
        (variant.name, seed, folder)
        for variant in found.variants
        for seed, folder in zip(variant.seeds, variant.folders, strict=True)
    }


@contextlib.contextmanager
def advice_if_stopped(how_far: Callable[[], str]) -> Iterator[None]:
    """Report how far a study is, and how to resume it, when a signal stops it.

    Raises:
        Interrupted: it was stopped.
    """
    try:
        with sigterm_raises():
            yield
    except (Interrupted, KeyboardInterrupt) as error:
        says = f"{how_far()}; the same command goes on where it was"
        raise Interrupted(says, getattr(error, "signal", signal.SIGINT)) from None


def _how_far(study: Study, planned: Sequence[StudyRun]) -> str:
    done = sum(each.result is not None for each in planned)
    return f"{study.name}: stopped with {done} of {len(planned)} runs finished"


def _train(
    study: Study,
    planned: Sequence[StudyRun],
    lengths: Mapping[str, Length],
    max_parallel: int | None,
    spread: bool,
    writes: bool,
    say: Callable[[str], None],
) -> dict[Path, str]:
    """Train the unfinished runs, and record their costs if this process `writes`; return the
    reasons of failures by folder.
    """
    runs = {each.folder: Run(each.recipe, each.folder) for each in planned}
    left = {folder: run for folder, run in runs.items() if run.result is None}
    if writes:
        say(f"{len(runs)} runs: {len(runs) - len(left)} trained already, {len(left)} to train")
        for folder, run in runs.items():
            if folder not in left:
                RunFolder(folder).finished(run.recipe, say)  # tells of metrics that they lack
    if not left:
        return {}
    chosen = list((runs if spread else left).values())
    booked = functools.partial(book, study, say) if writes else contextlib.nullcontext
    # A search has other lengths than its variants.
    epochs = {
        each.folder: lengths[each.variant].epochs
        if each.variant in lengths
        else each.recipe.spec.train.epochs
        for each in planned
    }
    outcomes = train_together(
        chosen, max_parallel=max_parallel, spread=spread, epochs=epochs, booked=booked, say=say
    )
    return {
        outcome.job.folder: outcome.reason for outcome in outcomes if outcome.reason is not None
    }


@contextlib.contextmanager
def book(study: Study, say: Callable[[str], None], runs: Sequence[Run]) -> Iterator[None]:
    """Record what it costs to train some runs inside the block, and which of them it finishes."""
    wall, cpu = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        done = [run.key for run in runs if run.result]
        with _measured(study, say) as measured:
            measured.spend(wall, cpu, done)


@contextlib.contextmanager
def _measured(study: Study, say: Callable[[str], None]) -> Iterator[Measured]:
    """Open the study's measurements; other processes wait until the block ends."""
    study.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(study.path / LOCK, fallback_to_soft=False)
    with contextlib.suppress(Timeout):
        lock.acquire(blocking=False)
    if not lock.is_locked:
        say(f"{study.name}: another process is measuring; waiting for it")
        lock.acquire()
    try:
        yield Measured(study.path / "measured.json", say)
    finally:
        lock.release()
