"""Runs a recipe: its teacher, its stages in order, its result."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

from accelerate import Accelerator

from kdkit.cache import served
from kdkit.contracts.dataset_source import DataInfo
from kdkit.data import sizes
from kdkit.engine.accelerator import build_accelerator, multiplies_bf16
from kdkit.engine.evaluate import Judge
from kdkit.engine.setup import Carried, build_trainer
from kdkit.engine.turns import BEGINNING, Stopwatch, Turns, finish
from kdkit.errors import BusyError, RunError
from kdkit.launching import is_first, of_launch
from kdkit.models.compressing import parameters_of
from kdkit.models.tapped import TappedModel
from kdkit.randomness import reseed
from kdkit.recipe import Recipe, teacher_recipes
from kdkit.runs import checks
from kdkit.runs.agreement import agreed
from kdkit.runs.context import RunContext
from kdkit.runs.deployment import rebuilt, unreadable
from kdkit.runs.folder import RunFolder
from kdkit.runs.interrupts import StopRequest
from kdkit.runs.networks import ModelFactory
from kdkit.runs.opening import open_data
from kdkit.runs.progress import Reporter, Seldom
from kdkit.runs.result import Result
from kdkit.runs.scoring import weights
from kdkit.runs.shared import Alone, Shared
from kdkit.runs.stage import StageRun
from kdkit.runs.trained_teachers import TrainedTeacher, options_of

MUCH = 0.1  # share of its score that a teacher may lose on other data without a warning


def train(
    recipe: Recipe,
    folder: Path | None = None,
    *,
    restart: bool = False,
    quiet: bool = False,
    instead: Callable[[str], None] = lambda _: None,
) -> Result:
    """Run a recipe, or what is left of it; a finished run is returned as it is.

    Args:
        recipe: the recipe to run.
        folder: the run folder (default: `run.folder`/`name`).
        restart: delete the content of the folder and start over.
        quiet: print warnings only.
        instead: called with a message for every finished epoch when `quiet` is set.

    Raises:
        RecipeError: a layer, shape or class count does not fit.
        RunError: the folder is another recipe's; a loss is not finite.
        Interrupted: a signal stopped it; the state is saved, and another call resumes.
    """
    run_folder = RunFolder(folder or recipe.spec.run.folder / recipe.spec.name)
    quiet = quiet or not is_first()
    with agreed() as asked:
        result = None if restart else run_folder.finished(recipe, Reporter(quiet=quiet).warn)
        asked |= {**recipe.content(), "--restart": restart, "trained already": result is not None}
    if result is not None:
        Reporter(quiet=quiet).say(f"{recipe.spec.name}: trained already, see {run_folder.path}")
        return result
    prepared = Prepared.make(recipe, run_folder, restart=restart, quiet=quiet, instead=instead)
    # after `make`: training a teacher sets up an accelerator of its own
    accelerator = accelerator_for(recipe, run_folder)
    with StopRequest() as stop, Stopwatch() as clock:
        result = finish(prepared.turns(accelerator, stop, clock))
    assert result is not None  # only a run with `until` pauses
    return result


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to begin: its recipe is valid, its folder free, its teachers are
    trained.
    """

    recipe: Recipe
    folder: RunFolder
    info: DataInfo
    teachers: Mapping[str, TrainedTeacher]
    restart: bool
    quiet: bool
    instead: Callable[[str], None] = lambda _: None

    @classmethod
    def make(
        cls,
        recipe: Recipe,
        folder: RunFolder,
        *,
        info: DataInfo | None = None,
        restart: bool = False,
        quiet: bool = False,
        say: Callable[[str], None] | None = None,
        instead: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Check that everything exists, and train the missing teachers; see `train` for the errors.

        `info` describes the data, if the recipe is known to be valid because another seed's is;
        `say` is called with messages about teachers.
        """
        _, world = of_launch()
        with agreed():
            info = info or checks.make(recipe, say or Reporter(quiet=quiet).say).info
            if problem := sizes.unshared(recipe.spec.data, world):
                key, says = problem
                raise recipe.error(["data", *key.split(".")], says)
            for place, options in recipe.spec.named_models() if world > 1 else ():
                for one in recipe.compressions(options):
                    if one.finishes():
                        says = "is made by one process, and several train here"
                        raise recipe.error([*place, one.name], says)
            folder.check(recipe, restart=restart)
        # refuses what this machine cannot do before a teacher is trained for it
        accelerator_for(recipe, folder)
        return cls(
            recipe,
            folder,
            info,
            trained_teachers(recipe, folder.path, quiet=quiet, say=say),
            restart,
            quiet,
            instead,
        )

    def turns(
        self,
        accelerator: Accelerator,
        stop: StopRequest,
        clock: Stopwatch,
        shared: Shared | None = None,
        until: int | None = None,
    ) -> Turns[Result | None]:
        """Run the recipe, yielding before each turn; the result is None if the run pauses.

        Args:
            accelerator: of the recipe's device and precision.
            stop: whether a signal wants it to end.
            clock: measures the time of its turns.
            shared: provides its data and teachers (default: its own).
            until: epochs of all its stages together after which it pauses: the state is saved, and
                another call resumes (default: it runs to its end).
        """
        recipe, shared = self.recipe, shared or Alone()
        reporter = Reporter(
            quiet=self.quiet or not accelerator.is_main_process, instead=self.instead
        )
        if (
            recipe.spec.train.precision == "bf16"
            and accelerator.device.type == "cpu"
            and not multiplies_bf16()
        ):
            reporter.warn(
                "train.precision bf16 is slower than fp32 on this processor, which has no AMX"
            )
        claimed = self.folder.claimed(recipe, self.info, restart=self.restart)
        with contextlib.ExitStack() as while_training:
            with agreed():
                if accelerator.is_main_process:
                    while_training.enter_context(claimed)
            opened = open_data(recipe, accelerator, shared)
            factory = ModelFactory(
                recipe, opened.info, self.teachers, device=accelerator.device, shared=shared
            )
            shared.expect(factory.demands())
            yield BEGINNING  # until every run of the group has registered what it reads
            with shared.answering(recipe, factory.teachers(), opened, reporter.warn) as known:
                setting = RunContext(
                    recipe,
                    self.folder,
                    reporter,
                    stop,
                    accelerator,
                    known,
                    factory,
                    clock,
                    shared,
                    Judge.of(recipe, opened.info),
                    until=until,
                )
                return (yield from _carry_out(setting))


def accelerator_for(recipe: Recipe, folder: RunFolder) -> Accelerator:
    """Set up the devices and trackers that a recipe asks for.

    Raises:
        RunError: the machine has no such device or precision.
    """
    wanted = list(recipe.spec.run.trackers)
    return build_accelerator(
        recipe.spec.train,
        **({"log_with": wanted, "project_dir": str(folder.path)} if wanted else {}),
    )


def trained_teachers(
    recipe: Recipe,
    student_folder: Path,
    *,
    quiet: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, TrainedTeacher]:
    """Return the teachers that other recipes train, by name; train those that do not exist yet."""
    teachers = {}
    for name, source in teacher_recipes(recipe.spec).items():
        if served.addresses(recipe, name):
            teachers[name] = TrainedTeacher.elsewhere(recipe, name, source)
            continue
        folder = folder_for(source, recipe.spec.run.folder, source.spec.name, taken=student_folder)
        if not RunFolder(folder).finished(source):
            (say or Reporter(quiet=quiet).say)(
                f"{source.spec.name}: the teacher is trained first, in {folder}"
            )
        # all processes check before one of them creates it
        build_accelerator(source.spec.train).wait_for_everyone()
        result = _train_or_wait(source, RunFolder(folder), quiet, say)
        teachers[name] = TrainedTeacher.of(RunFolder(folder), source, result)
    return teachers


def _train_or_wait(
    recipe: Recipe, folder: RunFolder, quiet: bool, say: Callable[[str], None] | None
) -> Result:
    """Train a teacher, unless another process is training it: then wait until that has finished."""
    epochs = Seldom(say) if say else lambda _: None
    while True:
        try:
            return train(recipe, folder.path, quiet=quiet, instead=epochs)
        except BusyError:
            (say or Reporter(quiet=quiet).say)(
                f"{recipe.spec.name}: another process is training the teacher in {folder.path};"
                " waiting for it"
            )
            folder.wait()


def folder_for(recipe: Recipe, base: Path, name: str, taken: Path | None = None) -> Path:
    """Return the folder `name` in `base`; if it holds another recipe's run, or is `taken`, one with
    the recipe's fingerprint in its name.
    """
    named = base / name
    # another process may have locked it only: it is that of this run all the same
    free = RunFolder(named).is_free() and (taken is None or named.resolve() != taken.resolve())
    return (
        named
        if free or RunFolder(named).holds(recipe)
        else base / f"{name}-{recipe.fingerprint[:8]}"
    )


def _carry_out(setting: RunContext) -> Turns[Result | None]:
    spec, factory = setting.recipe.spec, setting.factory
    if spec.run.trackers:
        setting.accelerator.init_trackers(spec.name)
    _measure_teacher(setting)
    schedule = setting.recipe.plugins.schedules[spec.schedule.use](spec.schedule)
    last: StageRun | None = None
    epochs = 0  # of the stages so far
    carried: Carried = {}
    stages = iter(schedule.stages(factory))
    for number in itertools.count():
        # from this seed a schedule draws the initial values of its own parts
        reseed(spec.seed, "stage", number)
        if (stage := next(stages, None)) is None:
            break
        if last is not None and last.standing.best_epochs and setting.is_main:
            last.standing.best_epochs.discard()  # only the last stage's weights are averaged
        factory.watch(but=stage.buffers)
        trainer = build_trainer(
            setting.recipe, setting.data, factory, setting.accelerator, number, stage, carried
        )
        last = StageRun(setting, number, trainer, epochs)
        yield from last.carry_out()
        epochs += trainer.epoch
        if last.paused:
            break
    if last is None:
        raise RunError(f"schedule '{spec.schedule.use}' has no stage")
    if not last.paused:
        yield from last.standing.average()
    for tracker in setting.accelerator.trackers:
        # end_training would also destroy the process group, which the student's training still
        # needs
        tracker.finish()
    return None if last.paused else _result(setting, last)


def _measure_teacher(setting: RunContext) -> None:
    teachers, judge = setting.factory.whole_teachers(answering=True), setting.judge
    setting.teacher = setting.shared.taught_answers(
        teachers, setting.data, judge, world=setting.accelerator.num_processes
    )
    if setting.teacher is None:
        return
    found, seen = setting.teacher.scores, setting.teacher.looks_like
    are_logits = judge.task.rows_are in ("classes", "labels")
    if seen != "logits" and are_logits and len(teachers) == 1:
        setting.reporter.warn(
            "the teacher's answers lie between 0 and"
            f" 1{' and sum to 1' if seen == 'softmax' else ''}, as probabilities do, and are read"
            f" as logits; if they are, say `answers: {seen}`"
        )
    setting.reporter.say(
        f"{'teacher' if len(teachers) == 1 else f'{len(teachers)} teachers together'}  "
        + "  ".join(f"{s.name} {s.text(found[s.name])}" for s in judge.scores if s.name in found)
    )
    _doubt(setting, found, alone=len(teachers) == 1)


def _doubt(setting: RunContext, found: Mapping[str, float], *, alone: bool) -> None:
    """Warn about a teacher that is far worse here than on its own data, or hardly better than
    chance.
    """
    deciding = setting.judge.deciding
    here, chance = found[deciding.name], deciding.chance
    trained = [known.scores.get(deciding.name) for known in setting.factory.trained.values()]
    own = [score for score in trained if score is not None]
    says = f"the teacher has {deciding.title} {deciding.text(here)} on the test data"
    whole = 100.0 if deciding.unit == "%" else None
    if alone and len(own) == 1 and deciding.rank(own[0] - here) > MUCH * (whole or abs(own[0])):
        setting.reporter.warn(
            f"{says}, and {deciding.text(own[0])} on its own: do both mean the same by their"
            " classes, and are images of the same size and range?"
        )
    best = whole if deciding.higher_is_better else 0.0
    if chance is None or best is None:
        return
    if deciding.rank(here - chance) < MUCH * abs(best - chance):
        setting.reporter.warn(
            f"{says}, guessing {deciding.text(chance)}: was it trained for these data?"
        )


def _result(setting: RunContext, last: StageRun) -> Result:
    standing, chosen = last.standing, last.standing.chosen
    student, scores = cast("TappedModel", standing.deployed()[chosen]), standing.scores[chosen]
    peers = [other for i, other in enumerate(standing.scores) if i != chosen]
    recipe = setting.recipe
    folder = setting.folder
    factory = setting.factory
    network = factory.network(last.trainer.stage.students[chosen])
    if setting.is_main:
        folder.keep(folder.student_file, weights(student))
        again = functools.partial(
            rebuilt,
            recipe,
            setting.data.info,
            factory.trained,
            options_of(recipe, network),
            folder.student_file,
            device=setting.accelerator.device,
            channels_last=student.channels_last,
        )
        if reason := unreadable(again, student, setting.data.info.image_shape):
            says = (
                f"the student cannot be built again from {folder.student_file}, so it cannot be"
                " evaluated or exported, nor teach"
            )
            setting.reporter.warn(f"{says}: {reason}")
    result = Result(
        folder=folder.path,
        name=recipe.spec.name,
        seed=recipe.spec.seed,
        test=scores["test"],
        validation=scores.get("validation"),
        parameters=parameters_of(student.module),
        seconds=round(setting.clock.wall, 3),
        cpu_seconds=round(setting.clock.cpu, 3),
        epochs=last.trainer.epoch,
        best=setting.best,
        averaged=standing.best_epochs.epochs(chosen) if standing.best_epochs else (),
        last=standing.last[chosen] if standing.last else None,
        teacher=setting.teacher.scores if setting.teacher else None,
        peers=tuple(peer["test"] for peer in peers),
        ensemble=standing.ensemble.get("test"),
        network=network,
        warnings=tuple(setting.reporter.warnings),
    )
    if setting.is_main:
        result = folder.finish(result)
    setting.accelerator.wait_for_everyone()
    deciding = setting.judge.deciding
    when = f"with the {result.moment}" if result.averaged else "after the last epoch"
    setting.reporter.say(
        f"{recipe.spec.name}: {deciding.title} {deciding.text(result.test[deciding.name])} on test"
        f" data {when}; see {folder.path}"
    )
    return result
