"""Trains one stage into a run folder: logs, measurements, checkpoints, and going on after a stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save

from kdkit.checkpoints import write_atomically
from kdkit.contracts import Model
from kdkit.data import Data
from kdkit.engine import Trainer
from kdkit.errors import Interrupted, RunError
from kdkit.evaluate import Predictions, metrics, predict
from kdkit.factory import ModelFactory, whole
from kdkit.meter import Meter
from kdkit.progress import Reporter
from kdkit.recipe import Recipe
from kdkit.run_folder import RunFolder
from kdkit.signals import StopRequest

Scores = dict[str, dict[str, float]]  # part of the data -> metrics


@dataclass
class Setting:
    """What the stages of a run share."""

    recipe: Recipe
    folder: RunFolder
    reporter: Reporter
    stop: StopRequest
    accelerator: Accelerator
    data: Data
    factory: ModelFactory
    teacher: Predictions | None = None  # on the test data
    seconds: float = 0.0  # trained so far, before `began`
    began: float = field(default_factory=time.monotonic)
    best: dict[str, Any] | None = None  # of the epoch with the best validation accuracy

    def spent(self) -> float:
        """Seconds of training, over all attempts."""
        return self.seconds + time.monotonic() - self.began

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)


class StageRun:
    """One stage's way through a run."""

    def __init__(self, setting: Setting, number: int, trainer: Trainer) -> None:
        self.setting, self.trainer = setting, trainer
        self.kind = f"stage{number}"
        self.meter = Meter()
        self.scores: list[Scores] = []  # of each student, when last measured
        self._finished = False
        self._clock, self._clock_step = time.monotonic(), 0

    def carry_out(self) -> list[Scores]:
        """Train to the end of the stage from where it was; the students' metrics.

        Raises:
            RunError: a loss is not finite.
            Interrupted: a signal stopped it, after saving.
        """
        setting, trainer = self.setting, self.trainer
        self._restore()
        with setting.reporter.training(trainer.stage.name, trainer.epochs * trainer.steps_per_epoch, trainer.steps):
            while trainer.epoch < trainer.epochs:
                self._train_epoch()
                self._close_epoch()
                self._finished = trainer.epoch == trainer.epochs
                if self._finished or trainer.epoch % setting.recipe.spec.run.checkpoint_epochs == 0:
                    self._save()
        return self.scores

    def _train_epoch(self) -> None:
        setting, trainer, run = self.setting, self.trainer, self.setting.recipe.spec.run
        self._clock, self._clock_step = time.monotonic(), trainer.step
        for values in trainer.train_epoch():
            self.meter.add(trainer.steps, values, len(trainer.stage.students))
            logging = trainer.steps % run.log_steps == 0
            saving = bool(run.checkpoint_steps) and trainer.steps % (run.checkpoint_steps or 1) == 0
            stopping = self._must_stop(together=logging)
            if logging or saving or stopping or setting.reporter.due():
                terms = self._read()
                setting.reporter.step(trainer.steps, f"epoch {trainer.epoch + 1}/{trainer.epochs}", terms, self.lr, self._speed())
                if logging and setting.is_main:
                    setting.folder.log(kind="step", stage=trainer.stage.name, epoch=trainer.epoch, step=trainer.steps, lr=self.lr, terms=terms)
                    setting.accelerator.log({f"{trainer.stage.name}/{name}": value for name, value in terms.items()}, step=trainer.steps)
            if saving or stopping:
                self._save()
            if stopping:
                self._leave()
        self._read()

    def _close_epoch(self) -> None:
        """Measure, warn, log, and begin to count anew."""
        setting, trainer, spec = self.setting, self.trainer, self.setting.recipe.spec
        means, speed = self.meter.means(), self._speed(whole_epoch=True)
        for name in self.meter.silent():
            setting.reporter.warn(f"{name} was exactly 0 in all of epoch {trainer.epoch} of stage '{trainer.stage.name}': nothing is learnt from it")
        measured = trainer.epoch % spec.train.evaluate_every == 0 or trainer.epoch == trainer.epochs
        if measured:
            self.scores = [self._measure(model) for model in self.deployed()]
            self._keep_best()
        validation = self.scores[0].get("validation") if measured else None
        trainer.schedule.after_epoch(trainer.epoch, validation["top1"] if validation else means["loss"])
        spent, done = setting.spent(), trainer.epoch / trainer.epochs
        test = self.scores[0]["test"] if measured else {}
        setting.reporter.epoch(f"{trainer.stage.name} epoch {trainer.epoch}/{trainer.epochs}", means, self.lr, speed, test, spent / done - spent)
        if setting.is_main:
            scores = {**self.scores[0], **({"peers": self.scores[1:]} if len(self.scores) > 1 else {})} if measured else {}
            setting.folder.log(kind="epoch", stage=trainer.stage.name, epoch=trainer.epoch, step=trainer.steps, seconds=round(spent, 3), lr=self.lr, images_per_second=round(speed, 1), train=means, **scores)
            setting.accelerator.log({f"test/{name}": value for name, value in test.items()}, step=trainer.steps)
        self.meter = Meter()

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.trainer.optimizer.param_groups[0]["lr"])

    def deployed(self) -> list[Model]:
        """The students as they are measured and exported."""
        return [whole(student, module) for student, module in zip(self.trainer.stage.students, self.trainer.deployed(), strict=True)]

    def _speed(self, *, whole_epoch: bool = False) -> float:
        """Training images per second in this epoch so far, over all processes."""
        steps = (self.trainer.steps_per_epoch if whole_epoch else self.trainer.step) - self._clock_step
        images = steps * self.trainer.spec.accumulate * self.setting.recipe.spec.data.batch_size
        return images / max(time.monotonic() - self._clock, 1e-9)

    def _measure(self, model: Model) -> Scores:
        setting, world = self.setting, self.setting.accelerator.num_processes
        scores = {"test": metrics(predict(model, setting.data.test, world=world), setting.teacher)}
        if setting.data.validation is not None:
            scores["validation"] = metrics(predict(model, setting.data.validation, world=world))
        return scores

    def _keep_best(self) -> None:
        """Remember the epoch that is best on validation, never on test."""
        setting, scores = self.setting, self.scores[0]
        if "validation" in scores and (setting.best is None or scores["validation"]["top1"] > setting.best["validation"]["top1"]):
            setting.best = {"stage": self.trainer.stage.name, "epoch": self.trainer.epoch, **scores}
            if setting.is_main:
                write_atomically(setting.folder.best_file, weights(self.deployed()[0]))

    def _read(self) -> dict[str, float]:
        try:
            return self.meter.read()
        except RunError as error:
            raise RunError(f"stage '{self.trainer.stage.name}', {error}; the last good checkpoint stays in {self.setting.folder.checkpoints.folder}") from None

    def _restore(self) -> None:
        setting, trainer = self.setting, self.trainer
        saved, broken = setting.folder.checkpoints.load_newest(self.kind)
        for path in broken:
            setting.reporter.warn(f"checkpoint {path.name} is damaged; using {'the one before it' if saved else 'none: this stage begins anew'}")
        setting.accelerator.wait_for_everyone()
        if saved is None:
            return
        trainer.load_state_dict(saved["trainer"])
        self.meter, self.scores, setting.best = Meter(saved["means"], saved["meter_steps"]), saved["scores"], saved["best"]
        setting.seconds, setting.began = saved["seconds"], time.monotonic()
        if setting.is_main:
            setting.folder.forget(after=saved["logged"])
        if trainer.epoch < trainer.epochs:
            setting.reporter.say(f"going on with stage '{trainer.stage.name}' at epoch {trainer.epoch + 1}, step {trainer.step}")

    def _save(self) -> None:
        setting = self.setting
        if setting.is_main:
            state = {
                "trainer": self.trainer.state_dict(), "means": self.meter.means(), "meter_steps": self.meter.steps, "scores": self.scores,
                "best": setting.best, "seconds": setting.spent(), "logged": setting.folder.logged(),
            }  # fmt: skip
            setting.folder.checkpoints.save(self.kind, self.trainer.steps, state, keep=1 if self._finished else 2)

    def _must_stop(self, *, together: bool) -> bool:
        """Whether a signal came; several processes ask each other, at the steps where all of them do."""
        here = self.setting.stop.signal is not None
        if self.setting.accelerator.num_processes == 1:
            return here
        if not together:
            return False
        wish = torch.tensor(float(here), device=self.setting.accelerator.device)
        return bool(self.setting.accelerator.reduce(wish).item() > 0)

    def _leave(self) -> None:
        setting, trainer = self.setting, self.trainer
        received = setting.stop.signal or signal.SIGTERM  # another process may have got it
        place = f"epoch {trainer.epoch + 1} of stage '{trainer.stage.name}'"
        raise Interrupted(f"stopped by {received.name} in {place}, saved in {setting.folder.path}; the same command goes on from here", received)


def weights(model: Model) -> bytes:
    """A network's weights as safetensors."""
    return save({name: value.detach().cpu().contiguous() for name, value in model.module.state_dict().items()})


def scores_of(first: Sequence[Scores]) -> tuple[Scores, tuple[dict[str, float], ...]]:
    """The first student's metrics, and the test metrics of its peers."""
    return first[0], tuple(peer["test"] for peer in first[1:])
