"""Trains one stage into a run folder: logs, measurements, checkpoints, and going on after a
stop.
"""

from __future__ import annotations

import itertools
import signal
from typing import Any, cast

import torch
from accelerate.utils import gather_object, send_to_device

from kdkit.engine.meter import Meter
from kdkit.engine.trainer import Trainer
from kdkit.engine.turns import Place, Turns
from kdkit.errors import Interrupted, RunError
from kdkit.runs.context import Setting
from kdkit.runs.scoring import Standing

STEPS_BETWEEN_QUESTIONS = 10


class StageRun:
    """One stage's way through a run."""

    def __init__(self, setting: Setting, number: int, trainer: Trainer) -> None:
        self.setting, self.trainer = setting, trainer
        self.kind = f"stage{number}"
        self.meter = Meter()
        self.standing = Standing(setting, number, trainer)
        self._clock, self._clock_step = setting.clock.wall, 0

    def carry_out(self) -> Turns[None]:
        """Train to the end of the stage from where it was, giving way before each step and each
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
        with setting.reporter.training(
            trainer.stage.name, trainer.epochs * trainer.steps_per_epoch, trainer.steps
        ):
            while not self._finished:
                yield from self._train_epoch()
                yield from self._close_epoch()
                if self._finished and trainer.epoch < trainer.epochs:
                    best = (
                        f"validation top-1 was best in epoch {setting.best['epoch']}"
                        if setting.best
                        else ""
                    )
                    setting.reporter.say(
                        f"stage '{trainer.stage.name}' ends after epoch {trainer.epoch}: {best}"
                        " (train.patience)"
                    )
                self.standing.keep_snapshot()
                if self._finished or trainer.epoch % setting.recipe.spec.run.checkpoint_epochs == 0:
                    self._save()
        trainer.close()

    def _train_epoch(self) -> Turns[None]:
        setting = self.setting
        trainer = self.trainer
        run = self.setting.recipe.spec.run
        self._clock, self._clock_step = setting.clock.wall, trainer.step
        yield self._place
        for values in trainer.train_epoch():
            self.meter.add(trainer.steps, values, len(trainer.learner.objectives))
            logging = trainer.steps % run.log_steps == 0
            saving = bool(run.checkpoint_steps) and trainer.steps % (run.checkpoint_steps or 1) == 0
            stopping = self._must_stop()
            if (
                logging
                or saving
                or stopping
                or (setting.reporter.due() and setting.accelerator.num_processes == 1)
            ):
                terms = self._read(together=logging)
                setting.reporter.step(
                    trainer.steps,
                    f"epoch {trainer.epoch + 1}/{trainer.epochs}",
                    terms,
                    self.lr,
                    self._speed(),
                )
                if logging and setting.is_main:
                    stage = trainer.stage.name
                    setting.folder.log(
                        kind="step",
                        stage=stage,
                        epoch=trainer.epoch,
                        step=trainer.steps,
                        lr=self.lr,
                        terms=terms,
                    )
                    setting.accelerator.log(
                        {f"{stage}/{name}": value for name, value in terms.items()},
                        step=trainer.steps,
                    )
            if saving or stopping:
                self._save()
            if stopping:
                self._leave()
            yield self._place
        self._read()

    @property
    def _finished(self) -> bool:
        """Whether no epoch is left, or validation has not been better for long enough."""
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
        """Whether the epoch that has just ended is one to measure after."""
        trainer, setting = self.trainer, self.setting
        if self.standing.best_epochs or (
            trainer.updaters[0].schedule.by_epoch and setting.data.validation is not None
        ):
            return True  # the weights that are left, or the learning rate, depend on it
        return (
            trainer.epoch % setting.recipe.spec.train.evaluate_every == 0
            or trainer.epoch == trainer.epochs
        )

    @property
    def _place(self) -> Place:
        """The batch that the next step begins with."""
        return self.trainer.epoch, 0, self.trainer.step * self.trainer.spec.accumulate

    def _close_epoch(self) -> Turns[None]:
        """Measure, warn, log, and begin to count anew."""
        setting = self.setting
        trainer = self.trainer
        standing = self.standing
        means, speed = self._over_processes(self.meter.means()), self._speed(whole_epoch=True)
        for name in (name for name in self.meter.silent() if means[name] == 0):
            place = f"epoch {trainer.epoch} of stage '{trainer.stage.name}'"
            setting.reporter.warn(
                f"{name} was exactly 0 in all of {place}: nothing is learnt from it"
            )
        if measured := self._measures:
            trainer.synchronise()
            yield from standing.measure(trainer.epoch)
            standing.keep_best()
            standing.keep_best_epochs()
        validation = standing.scores[0].get("validation") if measured else None
        for updater, scores in itertools.zip_longest(
            trainer.updaters, standing.own_scores if validation else []
        ):
            updater.schedule.after_epoch(
                trainer.epoch, scores["validation"]["top1"] if scores else means["loss"]
            )
        spent, done = setting.clock.wall, trainer.epoch / trainer.epochs
        test = standing.scores[0]["test"] if measured else {}
        label = f"{trainer.stage.name} epoch {trainer.epoch}/{trainer.epochs}"
        setting.reporter.epoch(label, means, self.lr, speed, test, spent / done - spent)
        if setting.is_main:
            setting.folder.log(
                kind="epoch",
                stage=trainer.stage.name,
                epoch=trainer.epoch,
                step=trainer.steps,
                seconds=round(spent, 3),
                lr=self.lr,
                images_per_second=round(speed, 1),
                train=means,
                **(standing.line() if measured else {}),
            )
            setting.accelerator.log(
                {f"test/{name}": value for name, value in test.items()}, step=trainer.steps
            )
        self.meter = Meter()

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return self.trainer.updaters[0].lr

    def _speed(self, *, whole_epoch: bool = False) -> float:
        """Training images per second in this epoch so far, over all processes."""
        steps = (
            self.trainer.steps_per_epoch if whole_epoch else self.trainer.step
        ) - self._clock_step
        images = steps * self.trainer.spec.accumulate * self.setting.recipe.spec.data.batch_size
        return images / max(self.setting.clock.wall - self._clock, 1e-9)

    def _read(self, *, together: bool = False) -> dict[str, float]:
        """The last step's terms: this process's, or `together` the mean over all. Any process's
        error is raised in all.
        """
        terms, told = {}, ""
        try:
            # first, as losses of such answers may be finite, and else say less
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
        if saved is not None and not self._finished:
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
        except (KeyError, ValueError, RuntimeError) as error:
            raise RunError(
                f"{setting.folder.path}: the checkpoint of stage '{self.trainer.stage.name}' was"
                " written by another version of kdkit or of a plugin"
                f" ({' '.join(str(error).split())[:200]}); `--restart` begins anew"
            ) from None

    def _own_part(self, learnt: dict[str, Any]) -> dict[str, Any]:
        """What this process saved, where each trains students of its own."""
        accelerator, saved = self.setting.accelerator, learnt.get("processes", [learnt])
        now = accelerator.num_processes if self.trainer.apart else 1
        if len(saved) != now:
            raise RunError(
                f"{self.setting.folder.path}: stage '{self.trainer.stage.name}' was begun by"
                f" {len(saved)} process(es), each with students of its own, and goes on with as"
                f" many, not with {accelerator.num_processes}; `--restart` begins anew"
            )
        return cast("dict[str, Any]", saved[accelerator.process_index if self.trainer.apart else 0])

    def _save(self) -> None:
        setting = self.setting
        meter = self.meter.state_dict()
        meter["sums"] = self._over_processes(meter["sums"])
        # before, so that nothing learnt from a changed teacher is ever gone on with
        setting.factory.verify_frozen()
        self._refuse_non_finite()
        learnt = self.trainer.state_dict()
        if self.trainer.apart:
            learnt = {"processes": gather_object([send_to_device(learnt, "cpu")])}
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
                self.kind, self.trainer.steps, state, keep=1 if self._finished else 2
            )
            if kept:
                kept.tidy(for_good=self._finished)

    def _refuse_non_finite(self) -> None:
        told: list[str | None] = [None]
        try:
            self.trainer.refuse_non_finite()
        except RunError as error:
            told = [str(error)]
        # or one would leave while the others wait for it
        everyones = gather_object(told) if self.trainer.apart else told
        for says in filter(None, everyones):
            raise self._lost(RunError(says))

    def _must_stop(self) -> bool:
        """Whether a signal came; several processes ask each other, every few steps."""
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
        received = setting.stop.signal or signal.SIGTERM  # another process may have got it
        place = f"epoch {trainer.epoch + 1} of stage '{trainer.stage.name}'"
        says = (
            f"stopped by {received.name} in {place}, saved in {setting.folder.path}; the same"
            " command goes on from here"
        )
        raise Interrupted(says, received)
