"""Trains one stage into a run folder: logs, measurements, checkpoints, and resuming after a
stop.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object

from kdkit.engine.loop import train_stage
from kdkit.engine.meter import Meter
from kdkit.engine.objective import Value
from kdkit.engine.trainer import Trainer
from kdkit.engine.turns import Place, Turns
from kdkit.errors import Interrupted, RunError
from kdkit.runs import pictures, stage_log
from kdkit.runs.context import RunContext
from kdkit.runs.scoring import Standing

# processes exchange whether a signal came only this often: each exchange synchronises them
STEPS_BETWEEN_QUESTIONS = 10


class StageRun:
    """The execution of one stage of a run."""

    def __init__(self, setting: RunContext, number: int, trainer: Trainer, before: int = 0) -> None:
        self.setting, self.trainer = setting, trainer
        self._before = before  # epochs of the stages before
        self.kind = f"stage{number}"
        self.meter = Meter()
        self.standing = Standing(setting, number, trainer)
        self._clock, self._clock_step = setting.clock.wall, 0
        self._means: dict[str, float] = {}  # of the losses in the last epoch
        self._epoch_speed = 0.0

    def carry_out(self) -> Turns[None]:
        """Train the stage from its current place to its end, yielding before each step and each
        batch that is measured.

        Raises:
            RunError: a loss is not finite.
            Interrupted: a signal stopped it, after saving.
        """
        setting, trainer = self.setting, self.trainer
        self._restore()
        if shortened := setting.recipe.spec.train.lr_schedule.shortened(
            trainer.stage.name, trainer.epochs
        ):
            setting.reporter.warn(shortened)
        trainer.capture(setting.recipe.spec.train.capture, setting.reporter.say)
        with setting.reporter.training(
            trainer.stage.name, trainer.epochs * trainer.steps_per_epoch, trainer.steps
        ):
            yield from train_stage(trainer, self)
        trainer.close()

    def begin_epoch(self) -> None:
        """Record the start time, for the speed of the epoch."""
        self._clock, self._clock_step = self.setting.clock.wall, self.trainer.step

    def after_step(self, values: Sequence[Value]) -> None:
        """Log and save if due, and stop if a signal requests it.

        Raises:
            RunError: a loss is not finite.
            Interrupted: a signal stopped it, after saving.
        """
        setting, trainer = self.setting, self.trainer
        run = setting.recipe.spec.run
        self.meter.add(trainer.steps, values, len(trainer.learner.objectives))
        logging = trainer.steps % run.log_steps == 0
        saving = run.checkpoint_steps is not None and trainer.steps % run.checkpoint_steps == 0
        stopping = self._must_stop()
        # reading is collective with several processes, so it must not depend on one's clock
        showing = setting.reporter.due() and setting.accelerator.num_processes == 1
        if logging or saving or stopping or showing:
            terms = self._read(together=logging)
            stage_log.tell_step(setting, trainer, terms, self._speed(), log=logging)
        if saving or stopping:
            self._save()
        if stopping:
            self._leave()

    @property
    def finished(self) -> bool:
        """True if the stage has ended, or if the run pauses here."""
        return self.paused or self._ended

    @property
    def paused(self) -> bool:
        """True if the run has the epochs after which it pauses, behind a checkpoint."""
        until, trainer = self.setting.until, self.trainer
        return until is not None and trainer.step == 0 and self._before + trainer.epoch >= until

    @property
    def _ended(self) -> bool:
        """True if no epoch is left, or if validation has not improved for long enough."""
        trainer = self.trainer
        best = self.setting.best
        patience = self.setting.recipe.spec.train.patience
        if trainer.epoch == trainer.epochs:
            return True
        if patience is None or best is None or best["stage"] != trainer.stage.name:
            return False
        return (
            self._measures and trainer.step == 0 and trainer.epoch - int(best["epoch"]) >= patience
        )

    @property
    def _measures(self) -> bool:
        """True if the epoch that has just ended is one to measure after."""
        trainer, setting = self.trainer, self.setting
        if self.standing.best_epochs or (
            trainer.updaters[0].schedule.by_epoch and setting.data.validation is not None
        ):
            return True  # the resulting weights, or the learning rate, depend on the score
        return (
            trainer.epoch % setting.recipe.spec.train.evaluate_every == 0
            or trainer.epoch == trainer.epochs
        )

    @property
    def place(self) -> Place:
        """The batch that the next step begins with."""
        return self.trainer.epoch, 0, self.trainer.step * self.trainer.spec.accumulate

    def measure(self) -> Turns[None]:
        """Score the students if due, and keep the best ones so far."""
        self._read()
        self._means = self._over_processes(self.meter.means())
        self._epoch_speed = self._speed(whole_epoch=True)
        trainer, standing = self.trainer, self.standing
        for name in (name for name in self.meter.silent() if self._means[name] == 0):
            place = f"epoch {trainer.epoch} of stage '{trainer.stage.name}'"
            self.setting.reporter.warn(
                f"{name} was exactly 0 in all of {place}: nothing is learnt from it"
            )
        if self._measures:
            trainer.synchronise()
            yield from standing.measure(trainer.epoch)
            standing.keep_best()
            standing.keep_best_epochs()

    def end_epoch(self) -> None:
        """Set the learning rate from the measured scores, log, save."""
        trainer, spec = self.trainer, self.setting.recipe.spec
        self._set_rate()
        standing = self.standing if self._measures else None
        stage_log.tell_epoch(self.setting, trainer, self._means, self._epoch_speed, standing)
        self.meter = Meter()
        if self._ended and trainer.epoch < trainer.epochs:
            best = self.setting.best or {}
            self.setting.reporter.say(
                f"stage '{trainer.stage.name}' ends after epoch {trainer.epoch}: validation"
                f" {self.setting.judge.deciding.title} was best in epoch {best.get('epoch')}"
                " (train.patience)"
            )
        self.standing.keep_snapshot()
        if self.setting.is_main:
            pictures.draw(self.setting.folder.path, trainer.stage.name, trainer.stage.pictures())
        if self.finished or trainer.epoch % spec.run.checkpoint_epochs == 0:
            self._save()

    def _set_rate(self) -> None:
        """Pass the validation score, or the training loss, to the learning-rate schedules."""
        name = self.setting.judge.deciding.name
        is_validated = self._measures and "validation" in self.standing.scores[0]
        scores = self.standing.own_scores if is_validated else []
        for updater, each in itertools.zip_longest(self.trainer.updaters, scores):
            value = each["validation"][name] if each else self._means["loss"]
            updater.schedule.after_epoch(self.trainer.epoch, value)

    def _speed(self, *, whole_epoch: bool = False) -> float:
        """Training images per second in this epoch so far, over all processes."""
        steps = (
            self.trainer.steps_per_epoch if whole_epoch else self.trainer.step
        ) - self._clock_step
        images = steps * self.trainer.spec.accumulate * self.setting.recipe.spec.data.batch_size
        return images / max(self.setting.clock.wall - self._clock, 1e-9)

    def _read(self, *, together: bool = False) -> dict[str, float]:
        """Return the last step's terms: this process's, or `together` the mean over all. Any
        process's error is raised in all.
        """
        terms, told = {}, ""
        try:
            # first: losses of such answers may be finite, and their own error would say less
            self.setting.factory.verify_finite()
            terms = self.meter.read()
        except RunError as error:
            told = str(error)
        if self.setting.accelerator.num_processes > 1:
            told = next(filter(None, gather_object([told])), "")
        if told:
            raise self._lost(RunError(told))
        return self._over_processes(terms) if together else terms

    def _lost(self, error: RunError) -> RunError:
        place = self.setting.folder.checkpoints.folder
        remedy = (
            "a smaller train.optimizer.lr, train.clip_grad or a longer"
            " train.lr_schedule.warmup_epochs may help"
        )
        kept = f"the last good checkpoint, if there was one, stays in {place}"
        return RunError(f"stage '{self.trainer.stage.name}', {error}; {remedy}; {kept}")

    def _over_processes(self, terms: dict[str, float]) -> dict[str, float]:
        accelerator = self.setting.accelerator
        if accelerator.num_processes == 1:
            return terms
        means = accelerator.reduce(
            torch.tensor(list(terms.values()), device=accelerator.device), "mean"
        ).tolist()
        return dict(zip(terms, means, strict=True))

    def _restore(self) -> None:
        setting, trainer = self.setting, self.trainer
        saved, wrong = setting.folder.checkpoints.load_newest(self.kind, setting.recipe.fingerprint)
        setting.accelerator.wait_for_everyone()
        if saved is not None:
            self._load(saved)
        for path, what in wrong.items():
            instead = "using the one before it" if saved else "this stage begins anew"
            setting.reporter.warn(f"checkpoint {path.name} {what}; {instead}")
        if setting.is_main:
            for lost in setting.folder.forget(trainer.stage.name, trainer.epoch, trainer.steps):
                setting.reporter.warn(lost)
        if saved is not None and not self.finished:
            setting.reporter.say(
                f"going on with stage '{trainer.stage.name}' at epoch {trainer.epoch + 1}, step"
                f" {trainer.step}"
            )

    def _load(self, saved: dict[str, Any]) -> None:
        setting = self.setting
        learnt = self._own_part(saved["trainer"])
        try:
            self.trainer.load_state_dict(learnt)
            self.meter.load_state_dict(saved["meter"])
            self.standing.scores, self.standing.ensemble = saved["scores"], saved["ensemble"]
            setting.best = saved["best"]
            setting.folder.digests = dict(saved.get("files", {}))
            if self.standing.best_epochs:
                self.standing.best_epochs.load(
                    saved["best_epochs"], saved.get("best_epoch_files", {})
                )
            setting.clock.set(saved["seconds"], saved["cpu_seconds"])
            setting.reporter.warnings[:] = dict.fromkeys(
                [*saved["warnings"], *setting.reporter.warnings]
            )
        # a checkpoint of other code: missing keys, other lengths, other shapes
        except (KeyError, ValueError, RuntimeError) as error:
            raise RunError(
                f"{setting.folder.path}: the checkpoint of stage '{self.trainer.stage.name}' was"
                " written by another version of kdkit or of a plugin"
                f" ({' '.join(str(error).split())[:200]}); `--restart` begins anew"
            ) from None

    def _own_part(self, learnt: dict[str, Any]) -> dict[str, Any]:
        """Return this process's own state, if each process trains students of its own."""
        try:
            return self.trainer.processes.own_part(learnt)
        except RunError as error:
            raise RunError(
                f"{self.setting.folder.path}: stage '{self.trainer.stage.name}' {error};"
                " `--restart` begins anew"
            ) from None

    def _save(self) -> None:
        setting = self.setting
        meter = self.meter.state_dict()
        meter["sums"] = self._over_processes(meter["sums"])
        # before saving, so that no run resumes from what a changed teacher taught
        setting.factory.verify_frozen()
        self._refuse_non_finite()
        learnt = self.trainer.processes.saved(self.trainer.state_dict())
        kept = self.standing.best_epochs
        if setting.is_main:
            state = {
                "run": setting.recipe.fingerprint,
                "files": setting.folder.digests,
                "trainer": learnt,
                "meter": meter,
                "scores": self.standing.scores,
                "ensemble": self.standing.ensemble,
                "best": setting.best,
                "seconds": setting.clock.wall,
                "cpu_seconds": setting.clock.cpu,
                "warnings": list(setting.reporter.warnings),
                "best_epochs": kept.ranked if kept else {},
                "best_epoch_files": kept.digests if kept else {},
            }
            setting.folder.checkpoints.save(
                self.kind, self.trainer.steps, state, keep=1 if self._ended else 2
            )
            if kept:
                kept.tidy(for_good=self._ended)

    def _refuse_non_finite(self) -> None:
        told: list[str | None] = [None]
        try:
            self.trainer.refuse_non_finite()
        except RunError as error:
            told = [str(error)]
        # otherwise one process would stop while the others wait for it
        for says in filter(None, self.trainer.processes.everyones(told)):
            raise self._lost(RunError(says))

    def _must_stop(self) -> bool:
        """Check whether a signal was received; several processes synchronise this every few
        steps.
        """
        here, accelerator = self.setting.stop.signal is not None, self.setting.accelerator
        if accelerator.num_processes == 1:
            return here
        if self.trainer.steps % STEPS_BETWEEN_QUESTIONS:
            return False
        return bool(
            accelerator.reduce(torch.tensor(float(here), device=accelerator.device)).item() > 0
        )

    def _leave(self) -> None:
        setting, trainer = self.setting, self.trainer
        # a launcher ends all processes once the first has ended: not while one still saves
        setting.accelerator.wait_for_everyone()
        # another process may have received the signal
        received = setting.stop.signal or signal.SIGTERM
        place = f"epoch {trainer.epoch + 1} of stage '{trainer.stage.name}'"
        says = (
            f"stopped by {received.name} in {place}, saved in {setting.folder.path}; the same"
            " command goes on from here"
        )
        raise Interrupted(says, received)
