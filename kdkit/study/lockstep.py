"""Trains several recipes side by side, batch by batch; each ends with the weights that it would
have alone, bit for bit.

Runs of one seed on the same images form a group: they go through the data together, and a frozen
teacher that several of them have answers each batch once. That changes no run's numbers, because no
random number depends on what was drawn before (see `kdkit.randomness`), and because whatever would
change a teacher's answers by a rounding makes it another teacher.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from kdkit.contracts.dataset_source import DataInfo
from kdkit.engine.turns import BEGINNING, Place, Stopwatch, Turns
from kdkit.errors import Interrupted, KdkitError, RunError
from kdkit.recipe import Recipe, content_of
from kdkit.runs import training
from kdkit.runs.folder import Result, RunFolder
from kdkit.runs.interrupts import StopRequest
from kdkit.runs.progress import Seldom
from kdkit.runs.spreading import Crew
from kdkit.study.shared import Sharing

# torch tells that memory is out, and much else, by a RuntimeError
FAILURES = (KdkitError, RuntimeError, OSError)


@dataclass(frozen=True)
class Job:
    """A recipe to carry out, and where."""

    recipe: Recipe
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its result, or the reason why there is none."""

    job: Job
    result: Result | None = None
    reason: str | None = None


@dataclass
class _Run:
    """A job on its way."""

    job: Job
    turns: Turns[Result]
    clock: Stopwatch = field(default_factory=Stopwatch)
    place: Place = BEGINNING
    outcome: Outcome | None = None
    stopped: Interrupted | None = None

    @property
    def going(self) -> bool:
        return self.outcome is None and self.stopped is None


def train_together(
    jobs: Sequence[Job],
    *,
    max_parallel: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    crew: Crew | None = None,
) -> list[Outcome]:
    """Carry out recipes, one outcome per job in their order; one that fails does not stop the
    others.

    Teachers that other recipes train are trained first. Finished runs are taken as they are.

    Args:
        jobs: recipes with different folders.
        max_parallel: runs that are in memory at once (None: all of a group).
        say: told of every group that begins and every run that ends.
        crew: processes over which the groups are spread, each training its own alone (None: all
            processes train each group together).

    Raises:
        Interrupted: a signal stopped them; all are saved, and a further call goes on.
    """
    if max_parallel is not None and max_parallel < 1:
        raise RunError(f"at least one run must be in memory at once, not {max_parallel}")
    outcomes = {i: Outcome(job, result) for i, job in enumerate(jobs) if (result := _result(job))}
    # a crew shares out what all of it sees alike
    left = [i for i in range(len(jobs)) if crew or i not in outcomes]
    passes = list(_passes({i: _kind(jobs[i].recipe) for i in left}, max_parallel))
    mine = [
        still
        for part in (crew.share(passes) if crew else passes)
        if (still := [i for i in part if i not in outcomes])
    ]

    def prepare() -> dict[int, training.Prepared | Outcome]:
        sound: dict[str, DataInfo] = {}
        return {i: _prepared(jobs[i], sound, say) for i in itertools.chain(*mine)}

    # or two processes would train one teacher
    prepared = crew.in_turn(prepare) if crew else prepare()
    for number, group in enumerate(mine, 1):
        ready = [(i, run) for i in group if isinstance(run := prepared[i], training.Prepared)]
        outcomes |= {i: run for i in group if isinstance(run := prepared[i], Outcome)}
        say(
            f"pass {number} of {len(mine)}: {len(ready)} run{'s' * (len(ready) > 1)} side by side,"
            f" seed {jobs[group[0]].recipe.spec.seed}"
        )
        trained = _train_group(
            [(jobs[i], run) for i, run in ready], say, f"pass {number} of {len(mine)}"
        )
        outcomes |= zip([i for i, _ in ready], trained, strict=True)
    if crew:
        told = crew.gather({i: outcomes[i].reason for i in itertools.chain(*mine)})
        outcomes |= {
            int(i): Outcome(jobs[int(i)], _result(jobs[int(i)]), reason)
            for one in told
            for i, reason in one.items()
        }
    return [outcomes[i] for i in range(len(jobs))]


def _result(job: Job) -> Result | None:
    """Of a run that is finished already."""
    return RunFolder(job.folder).finished(job.recipe)


def _prepared(
    job: Job, sound: dict[str, DataInfo], say: Callable[[str], None]
) -> training.Prepared | Outcome:
    """What can begin; `sound` are recipes whose plan another seed has shown to be sound."""
    but_for_the_seed = json.dumps({**job.recipe.content(), "seed": None}, sort_keys=True)
    try:
        prepared = training.Prepared.make(
            job.recipe, RunFolder(job.folder), info=sound.get(but_for_the_seed), quiet=True, say=say
        )
        sound[but_for_the_seed] = prepared.info
        return prepared
    except Interrupted:
        raise
    except FAILURES as error:
        return _failed(job, error, say)


def _kind(recipe: Recipe) -> str:
    """What runs must agree in to be trained side by side."""
    spec = recipe.spec
    train = spec.train.device, spec.train.precision, spec.train.accumulate
    # an accelerator tells one run's
    trackers = str(spec.run.folder / spec.name) if spec.run.trackers else None
    dataset = recipe.plugins.datasets[spec.data.dataset.use]
    # plugins may give other images under one name
    made_by = f"{dataset.__module__}.{dataset.__qualname__}"
    return json.dumps(
        [content_of(spec.data), made_by, spec.seed, train, trackers], sort_keys=True, default=str
    )


def passes(recipes: Sequence[Recipe], size: int | None = None) -> list[list[int]]:
    """Which of these recipes are trained side by side, so many at most: positions in `recipes`,
    a list a pass.
    """
    return list(_passes({i: _kind(recipe) for i, recipe in enumerate(recipes)}, size))


def _passes(kinds: dict[int, str], size: int | None) -> Iterator[list[int]]:
    """The runs by kind, in order, so many at a time."""
    for kind in dict.fromkeys(kinds.values()):
        alike = iter([i for i in kinds if kinds[i] == kind])
        while part := list(itertools.islice(alike, size)):
            yield part


def _train_group(
    group: Sequence[tuple[Job, training.Prepared]], say: Callable[[str], None], name: str
) -> list[Outcome]:
    if not group:
        return []
    first = group[0][0]
    try:
        accelerator = training.accelerator_for(first.recipe, RunFolder(first.folder))
        sharing = Sharing(training.read_data(first.recipe, accelerator), accelerator.num_processes)
    except FAILURES as error:
        return [_failed(job, error, say) for job, _ in group]
    with StopRequest() as stop:
        going = [_start(job, prepared, accelerator, stop, sharing) for job, prepared in group]
        try:
            _take_turns(going, sharing, say, name)
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
    job: Job,
    prepared: training.Prepared,
    accelerator: Accelerator,
    stop: StopRequest,
    sharing: Sharing,
) -> _Run:
    clock = Stopwatch()
    return _Run(job, prepared.turns(accelerator, stop, clock, sharing), clock)


def _take_turns(
    group: Sequence[_Run], sharing: Sharing, say: Callable[[str], None], name: str
) -> None:
    """Let the run that is behind all others go on to its next batch, until none is left."""
    tell, told = Seldom(say), 0  # finished epochs of the run that is behind
    for run in group:
        _turn(run, sharing, say)  # each says what it wants before any begins
    while going := [run for run in group if run.going]:
        last = min(going, key=lambda run: run.place)
        if (epoch := last.place[0]) > max(told, 0):
            tell(
                f"{name}: epoch {epoch} is over in all runs, {len(group) - len(going)} of"
                f" {len(group)} have ended"
            )
        told = epoch
        _turn(last, sharing, say)


def _turn(run: _Run, sharing: Sharing, say: Callable[[str], None]) -> None:
    try:
        with sharing.memo.turn(run.place, run.clock):
            run.place = next(run.turns)
    except StopIteration as end:
        run.outcome = Outcome(run.job, end.value)
        say(
            f"{run.job.folder.name}: top-1 {end.value.test['top1']:.2f} %, {run.clock.wall:.1f} s,"
            f" see {run.job.folder}"
        )
    except Interrupted as error:
        run.stopped = error
    except FAILURES as error:
        if sharing.world > 1 and not isinstance(error, KdkitError):
            raise  # the other processes know nothing of it, and would wait for this one
        run.outcome = _failed(run.job, error, say)


def _failed(job: Job, error: Exception, say: Callable[[str], None]) -> Outcome:
    reason = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        reason = (
            "out of memory; `--max-parallel` with a smaller number, or a smaller data.batch_size"
            f" ({reason})"
        )
    say(f"{job.folder.name}: failed: {reason}")
    return Outcome(job, reason=reason)
