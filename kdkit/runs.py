"""Carries out a recipe: its teacher, its stages in order, its result."""

from __future__ import annotations

import contextlib
import copy
import itertools
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from kdkit import data, objective, plan
from kdkit.checkpoints import write_atomically
from kdkit.contracts import Context, Loss
from kdkit.engine import Trainer, batches, build_accelerator
from kdkit.errors import DataError, RunError
from kdkit.evaluate import metrics, predict_together
from kdkit.factory import ModelFactory, TrainedTeacher, options_of
from kdkit.progress import Reporter
from kdkit.randomness import reseed
from kdkit.recipe import Recipe, teacher_recipes
from kdkit.run_folder import Result, RunFolder
from kdkit.setting import Setting
from kdkit.signals import StopRequest
from kdkit.stage_run import StageRun
from kdkit.standing import weights
from kdkit.teaching import Model, Stage

Carried = dict[tuple[Model, int], dict[str, Loss]]  # of each student (and lesson beyond the students'), its losses so far by name


def train(recipe: Recipe, folder: Path | None = None, *, restart: bool = False, quiet: bool = False) -> Result:
    """Carry out a recipe, or what is left of it; a finished run is returned as it is.

    Args:
        recipe: what to do.
        folder: the run folder (default: `run.folder`/`name`).
        restart: throw away what is in the folder and begin anew.
        quiet: print warnings only.

    Raises:
        RecipeError: a layer, shape or class count does not fit.
        RunError: the folder is another recipe's; a loss is not finite.
        Interrupted: a signal stopped it; it is saved, and a further call goes on.
    """
    run_folder = RunFolder(folder or recipe.spec.run.folder / recipe.spec.name)
    if not restart and run_folder.holds(recipe) and (result := run_folder.result()):
        Reporter(quiet=quiet).say(f"{recipe.spec.name}: trained already, see {run_folder.path}")
        return result
    planned = plan.make(recipe)
    run_folder.check(recipe, restart=restart)
    _accelerator(recipe, run_folder)  # refuses what this machine cannot do before a teacher is trained for it
    teachers = trained_teachers(recipe, run_folder.path, quiet=quiet)
    accelerator = _accelerator(recipe, run_folder)  # anew: the teacher's training has had its own
    reporter = Reporter(quiet=quiet or not accelerator.is_main_process)
    if recipe.spec.train.precision == "bf16" and accelerator.device.type == "cpu" and not _multiplies_bf16():
        reporter.warn("train.precision bf16 is slower than fp32 on this processor, which has no AMX")
    with (
        run_folder.claimed(recipe, planned.info, restart=restart) if accelerator.is_main_process else contextlib.nullcontext(),
        StopRequest() as stop,
    ):
        accelerator.wait_for_everyone()
        prepared = open_data(recipe, accelerator)
        factory = ModelFactory(recipe, prepared.info, teachers, device=accelerator.device)
        setting = Setting(recipe, run_folder, reporter, stop, accelerator, prepared, factory)
        return _carry_out(setting)


def _accelerator(recipe: Recipe, folder: RunFolder) -> Accelerator:
    wanted = list(recipe.spec.run.trackers)
    try:
        accelerator = build_accelerator(recipe.spec.train, **({"log_with": wanted, "project_dir": str(folder.path)} if wanted else {}))
    except ValueError as error:
        raise recipe.error(["run", "trackers"], str(error)) from None
    if absent := set(wanted) - {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}:
        raise recipe.error(["run", "trackers"], f"{', '.join(sorted(absent))} is not installed")
    return accelerator


def _multiplies_bf16() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_bf16")) if hasattr(torch.cpu, "get_capabilities") else True


def trained_teachers(recipe: Recipe, student_folder: Path, *, quiet: bool = False) -> dict[str, TrainedTeacher]:
    """The teachers that other recipes train, by name; trains those that are not there yet."""
    teachers = {}
    for name, source in teacher_recipes(recipe.spec).items():
        folder = folder_for(source, recipe.spec.run.folder, source.spec.name, taken=student_folder)
        if not RunFolder(folder).result():
            Reporter(quiet=quiet).say(f"{source.spec.name}: the teacher is trained first, in {folder}")
        build_accelerator(source.spec.train).wait_for_everyone()  # all have looked before one of them makes it
        result = train(source, folder, quiet=quiet)
        teachers[name] = TrainedTeacher(options_of(source, result.network), result.student, RunFolder(folder).snapshots())
    return teachers


def folder_for(recipe: Recipe, base: Path, name: str, taken: Path | None = None) -> Path:
    """The folder `name` in `base`; if another recipe's run is there, or it is `taken`, one with the recipe's fingerprint in its name."""
    named = base / name
    free = not named.exists() and (taken is None or named.resolve() != taken.resolve())
    return named if free or RunFolder(named).holds(recipe) else base / f"{name}-{recipe.fingerprint[:8]}"


def open_data(recipe: Recipe, accelerator: Accelerator) -> data.Data:
    """The recipe's data, this process's share of it."""
    spec = recipe.spec
    source = recipe.plugins.datasets[spec.data.dataset.use](spec.data.dataset)
    rank, world = accelerator.process_index, accelerator.num_processes
    try:
        with accelerator.local_main_process_first():  # it may have to download
            return data.prepare(spec.data, source, seed=spec.seed, device=accelerator.device, rank=rank, world=world)
    except DataError as error:
        raise recipe.error(["data"], str(error)) from error


def _carry_out(setting: Setting) -> Result:
    spec, factory = setting.recipe.spec, setting.factory
    if spec.run.trackers:
        setting.accelerator.init_trackers(spec.name)
    _measure_teacher(setting)
    schedule = setting.recipe.plugins.schedules[spec.schedule.use](spec.schedule)
    last: StageRun | None = None
    carried: Carried = {}
    stages = iter(schedule.stages(factory))
    for number in itertools.count():
        reseed(spec.seed, "stage", number)  # from which a schedule draws the first values of what it learns itself
        if (stage := next(stages, None)) is None:
            break
        factory.watch(but=stage.buffers)
        trainer = build_trainer(setting.recipe, setting.data, factory, setting.accelerator, number, stage, carried)
        last = StageRun(setting, number, trainer)
        last.carry_out()
    if last is None:
        raise RunError(f"schedule '{spec.schedule.use}' has no stage")
    for tracker in setting.accelerator.trackers:
        tracker.finish()  # end_training would also part the processes, which may only have trained a teacher so far
    return _result(setting, last)


def _measure_teacher(setting: Setting) -> None:
    teachers, classes = setting.factory.whole_teachers(), setting.data.info.num_classes
    setting.teacher = predict_together(teachers, setting.data.test, world=setting.accelerator.num_processes)
    if setting.teacher is None:
        return
    found = metrics(setting.teacher)
    setting.reporter.say(
        f"{'teacher' if len(teachers) == 1 else f'{len(teachers)} teachers together'}  "
        + "  ".join(f"{name} {value:.2f}" for name, value in found.items())
    )
    chance = 100 / classes
    if found["top1"] < chance + 0.1 * (100 - chance):
        setting.reporter.warn(
            f"the teacher is right on {found['top1']:.1f} % of the test data, guessing on {chance:.1f} %: was it trained for these classes?"
        )


def build_trainer(
    recipe: Recipe, prepared: data.Data, factory: ModelFactory, accelerator: Accelerator, number: int, stage: Stage,
    carried: Carried | None = None,
) -> Trainer:  # fmt: skip
    """The trainer of the schedule's stage `number`, its losses set up by a probe batch.

    A loss that a student already had in an earlier stage goes on with what it has learnt: `carried` keeps them.
    """
    reseed(recipe.spec.seed, "setup", number)
    for student in stage.students:
        student.module.eval()  # a probe moves no statistics
    parts = stage.parts.to(accelerator.device) if stage.parts is not None else torch.nn.Module()
    remembered = copy.deepcopy(parts.state_dict())  # nor what the schedule remembers
    with torch.no_grad():
        lessons = stage.step(next(batches(prepared.train, stage, 0)))
    parts.load_state_dict(remembered)
    labels = _labels_by_index(prepared.train)
    if len(lessons) < len(stage.students):
        raise RunError(f"stage '{stage.name}' gives {len(lessons)} lessons for {len(stage.students)} students")
    if stage.apart and accelerator.num_processes > 1:
        _refuse_together(recipe, stage)
    objectives, teachers, last = [], factory.teacher_modules(), len(stage.students) - 1
    for i, lesson in enumerate(lessons):
        student = stage.students[i if i <= last else 0]
        built = objective.build(recipe, stage.losses, factory.expand, layers=i <= last)
        context = Context(student.module, factory.teaching(stage, min(i, last)), prepared.info.num_classes, len(labels), labels)
        built.setup(lesson, context, teachers)
        before = (carried if carried is not None else {}).setdefault((student, max(0, i - last)), {})
        for name, loss in built.parts().items():
            if name in before:
                copied = {key: p.detach() for key, p in loss.named_parameters() if not p.requires_grad}  # of whom this stage's teacher is
                loss.load_state_dict({**before[name].state_dict(), **copied})
        before |= built.parts()
        objectives.append(built)
    return Trainer(
        stage, objectives, recipe.spec.train, prepared.train, accelerator,
        seed=recipe.spec.seed, num_classes=prepared.info.num_classes, maximize=prepared.validation is not None,
    )  # fmt: skip


def _refuse_together(recipe: Recipe, stage: Stage) -> None:
    """Say what processes that train students of their own cannot do.

    Raises:
        RecipeError: a loss would compare the answers of different networks.
        RunError: the stage leaves a student that only another process has.
    """
    for i, entry in enumerate(recipe.spec.losses):
        if getattr(entry, "gather", False):
            says = f"in stage '{stage.name}' each process trains a student of its own, whose answers are not to be gathered into one batch"
            raise recipe.error(["losses", i, "gather"], says)
    if stage.result != "first":
        raise RunError(f"stage '{stage.name}' trains apart, so it can only leave the first process's student")


def _labels_by_index(loader: data.TrainLoader) -> Tensor:
    """Class by `Batch.index`, which counts images that are not trained on too: those have -1. Empty for a stream."""
    if not len(loader.indices):
        return loader.labels.cpu()
    labels = torch.full((int(loader.indices.max()) + 1,), -1)
    labels[loader.indices.cpu()] = loader.labels.cpu()
    return labels


def _result(setting: Setting, last: StageRun) -> Result:
    standing, chosen = last.standing, last.standing.chosen
    student, scores = standing.deployed()[chosen], standing.scores[chosen]
    peers = [other for i, other in enumerate(standing.scores) if i != chosen]
    recipe, folder = setting.recipe, setting.folder
    result = Result(
        folder=folder.path, name=recipe.spec.name, seed=recipe.spec.seed, test=scores["test"], validation=scores.get("validation"),
        parameters=sum(p.numel() for p in student.module.parameters()), seconds=round(setting.spent(), 3), epochs=last.trainer.epochs,
        best=setting.best, teacher=metrics(setting.teacher) if setting.teacher else None, peers=tuple(peer["test"] for peer in peers),
        ensemble=standing.ensemble.get("test"), network=setting.factory.network(last.trainer.stage.students[chosen]),
        warnings=tuple(setting.reporter.warnings),
    )  # fmt: skip
    if setting.is_main:
        write_atomically(folder.student_file, weights(student))
        folder.finish(result)
    setting.accelerator.wait_for_everyone()
    setting.reporter.say(f"{recipe.spec.name}: top-1 {result.test['top1']:.2f} % on test data after the last epoch; see {folder.path}")
    return result
