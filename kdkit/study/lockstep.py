"""Trains several recipes side by side, batch by batch; each ends with bitwise the same weights as
if trained alone.

Runs of one seed on the same images form a group: they go through the data together, and a frozen
teacher that several of them share answers each batch once. This changes no run's numbers, because
no random number depends on earlier draws (see `kdkit.randomness`), and because anything that
changes a teacher's answers by a rounding error makes it another teacher.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from kdkit.contracts.dataset_source import DataInfo
from kdkit.engine.turns import BEGINNING, Place, Stopwatch, Turns
from kdkit.errors import BusyError, Interrupted, KdkitError, RunError
from kdkit.recipe import Recipe, content_of
from kdkit.runs import opening, training
from kdkit.runs.folder import RunFolder
from kdkit.runs.interrupts import StopRequest
from kdkit.runs.progress import Seldom
from kdkit.runs.result import Result
from kdkit.runs.run import Run
from kdkit.study.shared import Sharing
from kdkit.study.time_left import TimeLeft

OF_A_GROUP = ("device", "precision", "accumulate", "capture")  # keys of `train`
# torch reports out of memory, and much else, by a RuntimeError
FAILURES = (KdkitError, RuntimeError, OSError)
BETWEEN_LOOKS = 1.0  # seconds at least until a process looks again for runs that others have left
LOOKS = 20.0  # locks a second that a waiting process tries at most: others share the file system
NAMED = 10  # runs at most that a line names
BETWEEN_REMINDERS = 300.0  # seconds
SILENT = 60.0  # seconds of an epoch until a line tells how far it is

Claims = Generator[tuple[int, dict[int, RunFolder]], None, None]
"""Runs to be trained together, with the number of their pass: their folders, by position."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run: its result, or the reason why there is none; with neither, it has
    paused.
    """

    job: Run
    result: Result | None = None
    reason: str | None = None


@dataclass
class Going:
    """A run in progress."""

    job: Run
    turns: Turns[Result | None]
    clock: Stopwatch = field(default_factory=Stopwatch)
    place: Place = BEGINNING
    outcome: Outcome | None = None
    stopped: Interrupted | None = None

    @property
    def going(self) -> bool:
        return self.outcome is None and self.stopped is None


def train_together(
    jobs: Sequence[Run],
    *,
    max_parallel: int | None = None,
    spread: bool = False,
    until: int | None = None,
    epochs: Mapping[Path, int] | None = None,
    sound: dict[str, DataInfo] | None = None,
    booked: Callable[[Sequence[Run]], AbstractContextManager[object]] = nullcontext,
    say: Callable[[str], None] = lambda _: None,
) -> list[Outcome]:
    """Train recipes side by side; return one outcome per job, in their order; a failing run does
    not stop the others.

    Teachers that other recipes train are trained first. Finished runs are reused.

    Args:
        jobs: recipes with different folders.
        max_parallel: maximum number of runs in memory at once (None: all of a group).
        spread: share them with every other process that is called with the same jobs: train what
            no other process has claimed, wait for the rest (False: a claimed run fails).
        until: epochs of all stages together after which each run pauses, to be resumed by another
            call (None: they run to their ends).
        epochs: of each run, all stages together, by its folder, for the estimate of the time left
            (None: those of the recipes).
        sound: recipes whose plan is known to be valid, filled here, to be passed to a next call.
        booked: context in which some of the jobs are trained.
        say: called with a message when a group begins or a run ends.

    Raises:
        Interrupted: a signal stopped them; all are saved, and another call resumes.
    """
    if max_parallel is not None and max_parallel < 1:
        raise RunError(f"at least one run must be in memory at once, not {max_parallel}")
    outcomes = {i: Outcome(job, result) for i, job in enumerate(jobs) if (result := job.result)}
    # all processes that share the jobs must divide them alike, whatever is finished already
    divided = [i for i in range(len(jobs)) if spread or i not in outcomes]
    parts = list(_passes({i: _kind(jobs[i].recipe) for i in divided}, max_parallel))
    offered = _claims(jobs, parts, outcomes, say) if spread else _unclaimed(jobs, parts)
    sound = {} if sound is None else sound
    left = TimeLeft(epochs or {job.folder: until or job.recipe.spec.train.epochs for job in jobs})
    with closing(offered):
        for number, folders in offered:
            name = f"pass {number} of {len(parts)}"
            with booked([jobs[i] for i in folders]):
                outcomes |= _trained(jobs, folders, sound, say, name, until, left)
    return [outcomes[i] for i in range(len(jobs))]


def _unclaimed(jobs: Sequence[Run], parts: Sequence[Sequence[int]]) -> Claims:
    """Yield pass after pass; each run claims its folder when it begins."""
    for number, part in enumerate(parts, 1):
        yield number, {i: RunFolder(jobs[i].folder) for i in part}


def _claims(
    jobs: Sequence[Run],
    parts: Sequence[Sequence[int]],
    outcomes: dict[int, Outcome],
    say: Callable[[str], None],
) -> Claims:
    """Yield runs that this process has claimed, until every run has a result or has failed here.

    Whole passes come first, so that processes take different ones; then what is left of any, such
    as the runs of a process that has died. A claim ends when the next one is asked for.
    """
    remind = Seldom(say, BETWEEN_REMINDERS)
    told, whole = False, True
    while True:
        begun, waits = False, []
        for number, part in enumerate(parts, 1):
            with ExitStack() as claim:
                folders, busy = _claim(jobs, part, outcomes, claim, whole=whole)
                waits += busy
                if folders and not (whole and busy):
                    begun = True
                    yield number, folders
        if not (begun or waits):
            return
        if waits and not (begun or whole):
            names = ", ".join(jobs[i].folder.name for i in waits[:NAMED])
            names += f" and {len(waits) - NAMED:,} more" if len(waits) > NAMED else ""
            (remind if told else say)(f"waiting for what other processes train: {names}")
            told = True
            time.sleep(max(BETWEEN_LOOKS, len(waits) / LOOKS))
        whole = False


def _claim(
    jobs: Sequence[Run],
    part: Sequence[int],
    outcomes: dict[int, Outcome],
    claim: ExitStack,
    *,
    whole: bool,
) -> tuple[dict[int, RunFolder], list[int]]:
    """Claim the runs of a pass that are to be trained here; also return those that other processes
    hold, the first one only if `whole` passes are wanted. What others have finished becomes an
    outcome.
    """
    folders, busy = {}, []
    for i in part:
        if i in outcomes and outcomes[i].result:
            continue
        folder = RunFolder(jobs[i].folder)
        with ExitStack() as lock:
            try:
                lock.enter_context(folder.held())
            except BusyError:
                busy.append(i)
                if whole:
                    break  # at the first one, or two processes that begin at once tear a pass apart
                continue
            if result := jobs[i].result:
                outcomes[i] = Outcome(jobs[i], result)
            elif i not in outcomes:  # else it has failed here; another process may try it
                folders[i] = folder
                claim.push(lock.pop_all())
    return folders, busy


def _trained(
    jobs: Sequence[Run],
    folders: Mapping[int, RunFolder],
    sound: dict[str, DataInfo],
    say: Callable[[str], None],
    name: str,
    until: int | None,
    left: TimeLeft,
) -> dict[int, Outcome]:
    """Train the runs of one pass side by side."""
    made = {i: _prepared(jobs[i], folder, sound, say) for i, folder in folders.items()}
    ready = {i: run for i, run in made.items() if isinstance(run, training.Prepared)}
    seed = jobs[next(iter(folders))].recipe.spec.seed
    say(f"{name}: {len(ready)} run{'s' * (len(ready) > 1)} side by side, seed {seed}")
    group = [(jobs[i], run) for i, run in ready.items()]
    trained = _train_group(group, say, name, until, left)
    failed = {i: run for i, run in made.items() if isinstance(run, Outcome)}
    return failed | dict(zip(ready, trained, strict=True))


def _prepared(
    job: Run, folder: RunFolder, sound: dict[str, DataInfo], say: Callable[[str], None]
) -> training.Prepared | Outcome:
    """Prepare a run; return its outcome if it cannot begin. `sound` are recipes whose plan was
    validated with another seed.
    """
    but_for_the_seed = json.dumps({**job.recipe.content(), "seed": None}, sort_keys=True)
    try:
        _refuse_other_study(job, folder)
        prepared = training.Prepared.make(
            job.recipe, folder, info=sound.get(but_for_the_seed), quiet=True, say=say
        )
        sound[but_for_the_seed] = prepared.info
        return prepared
    # a stop ends all runs; only failures belong to a single one
    except Interrupted:
        raise
    except FAILURES as error:
        return _failed(job, error, say)


def _refuse_other_study(job: Run, folder: RunFolder) -> None:
    """Refuse a folder that another process has taken since the study was planned.

    Raises:
        RunError: it holds a run of another recipe.
    """
    try:
        folder.check(job.recipe)
    except RunError:
        if folder.owner in (None, job.recipe.fingerprint):
            raise  # another fault than another's run
        raise RunError(
            f"{job.folder} holds a run of another recipe, begun since: another process compares"
            " this study with other overrides; give one of the two another `name:`"
        ) from None


def _kind(recipe: Recipe) -> str:
    """Return the properties that runs trained side by side must share."""
    spec = recipe.spec
    train = [getattr(spec.train, name) for name in OF_A_GROUP]
    # a tracker logs a single run, so such runs are not grouped
    trackers = str(spec.run.folder / spec.name) if spec.run.trackers else None
    # plugins may give different images under the same name
    makers = [type(one) for one in (*recipe.datasets(), recipe.task)]
    made_by = [f"{one.__module__}.{one.__qualname__}" for one in makers]
    return json.dumps(
        [content_of(spec.data), content_of(spec.task), made_by, spec.seed, train, trackers],
        sort_keys=True,
        default=str,
    )


def passes(recipes: Sequence[Recipe], size: int | None = None) -> list[list[int]]:
    """Decide which of these recipes are trained side by side, `size` at most: lists of positions in
    `recipes`, one for each pass.
    """
    return list(_passes({i: _kind(recipe) for i, recipe in enumerate(recipes)}, size))


def _passes(kinds: dict[int, str], size: int | None) -> Iterator[list[int]]:
    """Group the runs by kind, in order, at most `size` at a time."""
    alike: dict[str, list[int]] = {}
    for i, kind in kinds.items():
        alike.setdefault(kind, []).append(i)
    for group in alike.values():
        rest = iter(group)
        while part := list(itertools.islice(rest, size)):
            yield part


def _train_group(
    group: Sequence[tuple[Run, training.Prepared]],
    say: Callable[[str], None],
    name: str,
    until: int | None,
    left: TimeLeft,
) -> list[Outcome]:
    if not group:
        return []
    first = group[0][0]
    try:
        accelerator = training.accelerator_for(first.recipe, RunFolder(first.folder))
        train = first.recipe.spec.train
        on_gpu = accelerator.device.type == "cuda"
        sharing = Sharing(
            opening.read_data(first.recipe, accelerator),
            accelerator.num_processes,
            records=on_gpu and train.capture is not False and not train.compile,
        )
    except FAILURES as error:
        return [_failed(job, error, say) for job, _ in group]
    with StopRequest() as stop:
        going = [
            _start(job, prepared, accelerator, stop, sharing, until) for job, prepared in group
        ]
        try:
            _take_turns(going, sharing, say, name, left)
        finally:
            sharing.close()
    if stopped := [run for run in going if run.stopped]:
        saved = ", ".join(run.job.folder.name for run in stopped)
        assert stopped[0].stopped is not None
        raise Interrupted(
            f"stopped; {saved}: saved; the same command goes on from here",
            stopped[0].stopped.signal,
        )
    return [run.outcome for run in going if run.outcome is not None]


def _start(
    job: Run,
    prepared: training.Prepared,
    accelerator: Accelerator,
    stop: StopRequest,
    sharing: Sharing,
    until: int | None,
) -> Going:
    clock = Stopwatch()
    return Going(job, prepared.turns(accelerator, stop, clock, sharing, until), clock)


def _take_turns(
    group: Sequence[Going],
    sharing: Sharing,
    say: Callable[[str], None],
    name: str,
    left: TimeLeft,
) -> None:
    """Advance the run that is furthest behind to its next batch, until all have ended."""
    tell, told = Seldom(say), 0  # finished epochs of the run that is behind
    for run in group:
        _turn(run, sharing, say)  # each run registers what it reads before any begins
    while going := [run for run in group if run.going]:
        # the furthest behind first, so that all runs meet at the same batch
        last = min(going, key=lambda run: run.place)
        epoch, _, batch = last.place
        measuring = sum(run.place[1] < 0 for run in going)  # after an epoch that is not logged yet
        if epoch > max(told, 0) and tell.due:
            tell(
                f"{name}: epoch {epoch} is over in all runs, {len(group) - len(going)} of"
                f" {len(group)} have ended{left.told(measuring)}"
            )
        elif epoch >= 0 and tell.since > SILENT:
            tell(f"{name}: in epoch {epoch + 1}, batch {batch + 1}{left.told(measuring)}")
        told = epoch
        _turn(last, sharing, say)


def _turn(run: Going, sharing: Sharing, say: Callable[[str], None]) -> None:
    try:
        with sharing.memo.turn(run.place, run.clock):
            run.place = next(run.turns)
    except StopIteration as end:
        run.outcome = Outcome(run.job, end.value)
        if end.value is None:
            return
        score = RunFolder(run.job.folder).scores()[0]
        say(
            f"{run.job.folder.name}: {score.title} {score.text(end.value.test[score.name])},"
            f" {run.clock.wall:.1f} s, see {run.job.folder}"
        )
    except Interrupted as error:
        run.stopped = error
    except FAILURES as error:
        if sharing.world > 1 and not isinstance(error, KdkitError):
            raise  # the other processes did not fail, and would wait for this one
        run.outcome = _failed(run.job, error, say)


def _failed(job: Run, error: Exception, say: Callable[[str], None]) -> Outcome:
    reason = " ".join(str(error).split())
    if isinstance(error, BusyError):
        reason += "; with `--spread` processes share a study"
    if isinstance(error, torch.OutOfMemoryError):
        reason = (
            "out of memory; `--max-parallel` with a smaller number, or a smaller data.batch_size"
            f" ({reason})"
        )
    say(f"{job.folder.name}: failed: {reason}")
    return Outcome(job, reason=reason)
