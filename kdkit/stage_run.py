"""Trains one stage into a run folder: logs, measurements, checkpoints, and going on after a stop."""

from __future__ import annotations

import itertools
import signal
import time
from typing import Any, cast

import torch
from accelerate.utils import gather_object, send_to_device
from safetensors.torch import save

from kdkit.checkpoints import write_atomically
from kdkit.engine import Trainer
from kdkit.ensembles import combined
from kdkit.errors import Interrupted, RunError
from kdkit.evaluate import Predictions, metrics, predict
from kdkit.meter import Meter
from kdkit.setting import Setting
from kdkit.tapping import TappedModel
from kdkit.teaching import Model

Scores = dict[str, dict[str, float]]  # part of the data -> metrics
STEPS_BETWEEN_QUESTIONS = 10


class StageRun:
    """One stage's way through a run."""

    def __init__(self, setting: Setting, number: int, trainer: Trainer) -> None:
        self.setting, self.trainer = setting, trainer
        self.kind = f"stage{number}"
        self.meter = Meter()
        self.scores: list[Scores] = []  # of each student, when last measured
        self.ensemble: Scores = {}  # of all together
        self._finished = False
        self._clock, self._clock_step = time.monotonic(), 0

    def carry_out(self) -> None:
        """Train to the end of the stage from where it was.

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
                self._keep_snapshot()
                if self._finished or trainer.epoch % setting.recipe.spec.run.checkpoint_epochs == 0:
                    self._save()
        trainer.close()

    def _train_epoch(self) -> None:
        setting, trainer, run = self.setting, self.trainer, self.setting.recipe.spec.run
        self._clock, self._clock_step = time.monotonic(), trainer.step
        for values in trainer.train_epoch():
            self.meter.add(trainer.steps, values, len(trainer.learner.objectives))
            logging = trainer.steps % run.log_steps == 0
            saving = bool(run.checkpoint_steps) and trainer.steps % (run.checkpoint_steps or 1) == 0
            stopping = self._must_stop()
            if logging or saving or stopping or setting.reporter.due():
                terms = self._read(together=logging)
                setting.reporter.step(trainer.steps, f"epoch {trainer.epoch + 1}/{trainer.epochs}", terms, self.lr, self._speed())
                if logging and setting.is_main:
                    stage = trainer.stage.name
                    setting.folder.log(kind="step", stage=stage, epoch=trainer.epoch, step=trainer.steps, lr=self.lr, terms=terms)
                    setting.accelerator.log({f"{stage}/{name}": value for name, value in terms.items()}, step=trainer.steps)
            if saving or stopping:
                self._save()
            if stopping:
                self._leave()
        self._read()

    def _close_epoch(self) -> None:
        """Measure, warn, log, and begin to count anew."""
        setting, trainer, spec = self.setting, self.trainer, self.setting.recipe.spec
        means, speed = self._over_processes(self.meter.means()), self._speed(whole_epoch=True)
        for name in (name for name in self.meter.silent() if means[name] == 0):
            place = f"epoch {trainer.epoch} of stage '{trainer.stage.name}'"
            setting.reporter.warn(f"{name} was exactly 0 in all of {place}: nothing is learnt from it")
        measured = trainer.epoch % spec.train.evaluate_every == 0 or trainer.epoch == trainer.epochs
        if trainer.updaters[0].schedule.by_epoch and setting.data.validation is not None:
            measured = True  # its learning rate hangs on it
        if measured:
            trainer.synchronise()
            self._measure()
            self._keep_best()
        validation = self.scores[0].get("validation") if measured else None
        for updater, scores in itertools.zip_longest(trainer.updaters, self.own_scores if validation else []):
            updater.schedule.after_epoch(trainer.epoch, scores["validation"]["top1"] if scores else means["loss"])
        spent, done = setting.spent(), trainer.epoch / trainer.epochs
        test = self.scores[0]["test"] if measured else {}
        label = f"{trainer.stage.name} epoch {trainer.epoch}/{trainer.epochs}"
        setting.reporter.epoch(label, means, self.lr, speed, test, spent / done - spent)
        if setting.is_main:
            line: dict[str, Any] = dict(self.scores[0]) if measured else {}
            if measured and len(self.scores) > 1:
                line["peers"] = self.scores[1:]
            if measured and self.ensemble:
                line["ensemble"] = self.ensemble
            setting.folder.log(
                kind="epoch", stage=trainer.stage.name, epoch=trainer.epoch, step=trainer.steps, seconds=round(spent, 3), lr=self.lr,
                images_per_second=round(speed, 1), train=means, **line,
            )  # fmt: skip
            setting.accelerator.log({f"test/{name}": value for name, value in test.items()}, step=trainer.steps)
        self.meter = Meter()

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.trainer.updaters[0].lr

    @property
    def own_scores(self) -> list[Scores]:
        """Those of this process's students."""
        count = len(self.trainer.stage.students)
        begin = self.setting.accelerator.process_index * count if self.trainer.apart else 0
        return self.scores[begin : begin + count]

    def deployed(self) -> list[Model]:
        """The students as they are measured and exported."""
        pairs = zip(self.trainer.stage.students, self.trainer.deployed(), strict=True)
        return [cast("TappedModel", student).twin(module) for student, module in pairs]

    def _speed(self, *, whole_epoch: bool = False) -> float:
        """Training images per second in this epoch so far, over all processes."""
        steps = (self.trainer.steps_per_epoch if whole_epoch else self.trainer.step) - self._clock_step
        images = steps * self.trainer.spec.accumulate * self.setting.recipe.spec.data.batch_size
        return images / max(time.monotonic() - self._clock, 1e-9)

    def _measure(self) -> None:
        """Each student, and, where there are several models, their ensemble (the mean of their probabilities).

        Processes that train apart measure their own students on the whole data, and tell each other.
        """
        setting, apart = self.setting, self.trainer.apart
        world = 1 if apart else setting.accelerator.num_processes
        models = [*self.deployed(), *(() if apart else self.trainer.stage.company)]
        self.scores = [{} for _ in range(len(self.trainer.stage.students) * (setting.accelerator.num_processes if apart else 1))]
        self.ensemble = {}
        for part, batches in (("test", setting.data.test), ("validation", setting.data.validation)):
            if batches is None:
                continue
            teacher = setting.teacher if part == "test" else None
            found = [predict(model, batches.whole() if apart else batches, world=world) for model in models]
            found = gather_object(found) if apart else found
            for scores, one in zip(self.scores, found, strict=False):  # the company has no scores of its own
                scores[part] = metrics(one, teacher)
            if len(found) > 1:
                self.ensemble[part] = metrics(Predictions(combined([one.logits for one in found]), found[0].labels), teacher)

    @property
    def chosen(self) -> int:
        """Which student the stage leaves, by its number."""
        if self.trainer.stage.result == "first":
            return 0
        return max(range(len(self.scores)), key=lambda i: self.scores[i]["validation"]["top1"])

    def _keep_best(self) -> None:
        """Remember the epoch (and, where the stage leaves the best student, which one it is) that is best on validation, never on test."""
        setting, stage = self.setting, self.trainer.stage.name
        if "validation" not in self.scores[0]:
            return
        scores, student = self.scores[self.chosen], self.trainer.stage.students[self.chosen]
        known = setting.best if setting.best and setting.best["stage"] == stage else None  # an earlier stage trained something else
        if known is None or scores["validation"]["top1"] > known["validation"]["top1"]:
            setting.best = {"stage": stage, "epoch": self.trainer.epoch, **scores}
            if (network := setting.factory.network(student)) is not None:
                setting.best["network"] = network
            if setting.is_main:
                write_atomically(setting.folder.best_file, weights(self.deployed()[self.chosen]))

    def _keep_snapshot(self) -> None:
        every, trainer, setting = self.setting.recipe.spec.run.snapshots, self.trainer, self.setting
        if every and trainer.epoch % every == 0:
            trainer.synchronise()
            if setting.is_main:
                write_atomically(setting.folder.snapshot_file(trainer.stage.name, trainer.epoch), weights(self.deployed()[0]))

    def _read(self, *, together: bool = False) -> dict[str, float]:
        """The last step's terms: this process's, or `together` the mean over all."""
        try:
            terms = self.meter.read()
        except RunError as error:
            raise self._lost(error) from None
        return self._over_processes(terms) if together else terms

    def _lost(self, error: RunError) -> RunError:
        place = self.setting.folder.checkpoints.folder
        return RunError(f"stage '{self.trainer.stage.name}', {error}; the last good checkpoint, if there was one, stays in {place}")

    def _over_processes(self, terms: dict[str, float]) -> dict[str, float]:
        accelerator = self.setting.accelerator
        if accelerator.num_processes == 1:
            return terms
        means = accelerator.reduce(torch.tensor(list(terms.values()), device=accelerator.device), "mean").tolist()
        return dict(zip(terms, means, strict=True))

    def _restore(self) -> None:
        setting, trainer = self.setting, self.trainer
        saved, broken = setting.folder.checkpoints.load_newest(self.kind)
        setting.accelerator.wait_for_everyone()
        if saved is not None:
            self._load(saved)
        for path in broken:
            instead = "using the one before it" if saved else "this stage begins anew"
            setting.reporter.warn(f"checkpoint {path.name} is damaged; {instead}")
        if setting.is_main:
            setting.folder.forget(trainer.stage.name, trainer.epoch, trainer.steps)
        if saved is not None and trainer.epoch < trainer.epochs:
            setting.reporter.say(f"going on with stage '{trainer.stage.name}' at epoch {trainer.epoch + 1}, step {trainer.step}")

    def _load(self, saved: dict[str, Any]) -> None:
        setting = self.setting
        learnt = self._own_part(saved["trainer"])
        try:
            self.trainer.load_state_dict(learnt)
            self.meter.load_state_dict(saved["meter"])
            self.scores, self.ensemble = saved["scores"], saved["ensemble"]
            setting.best, setting.seconds = saved["best"], saved["seconds"]
            setting.reporter.warnings[:] = dict.fromkeys([*saved["warnings"], *setting.reporter.warnings])
        except (KeyError, ValueError, RuntimeError) as error:
            raise RunError(
                f"{setting.folder.path}: the checkpoint of stage '{self.trainer.stage.name}' was written by another version of kdkit or "
                f"of a plugin ({' '.join(str(error).split())[:200]}); `--restart` begins anew"
            ) from None
        setting.began = time.monotonic()

    def _own_part(self, learnt: dict[str, Any]) -> dict[str, Any]:
        """What this process saved, where each trains students of its own."""
        accelerator, saved = self.setting.accelerator, learnt.get("processes", [learnt])
        now = accelerator.num_processes if self.trainer.apart else 1
        if len(saved) != now:
            raise RunError(
                f"{self.setting.folder.path}: stage '{self.trainer.stage.name}' was begun by {len(saved)} process(es), each with students "
                f"of its own, and goes on with as many, not with {accelerator.num_processes}; `--restart` begins anew"
            )
        return cast("dict[str, Any]", saved[accelerator.process_index if self.trainer.apart else 0])

    def _save(self) -> None:
        setting = self.setting
        meter = self.meter.state_dict()
        meter["sums"] = self._over_processes(meter["sums"])
        setting.factory.verify_frozen()  # before, so that nothing learnt from a changed teacher is ever gone on with
        self._refuse_non_finite()
        learnt = self.trainer.state_dict()
        if self.trainer.apart:
            learnt = {"processes": gather_object([send_to_device(learnt, "cpu")])}
        if setting.is_main:
            state = {
                "trainer": learnt, "meter": meter, "scores": self.scores, "ensemble": self.ensemble,
                "best": setting.best,
                "seconds": setting.spent(), "warnings": list(setting.reporter.warnings),
            }  # fmt: skip
            setting.folder.checkpoints.save(self.kind, self.trainer.steps, state, keep=1 if self._finished else 2)

    def _refuse_non_finite(self) -> None:
        told: list[str | None] = [None]
        try:
            self.trainer.refuse_non_finite()
        except RunError as error:
            told = [str(error)]
        everyones = gather_object(told) if self.trainer.apart else told  # or one would leave while the others wait for it
        for says in filter(None, everyones):
            raise self._lost(RunError(says))

    def _must_stop(self) -> bool:
        """Whether a signal came; several processes ask each other, every few steps."""
        here, accelerator = self.setting.stop.signal is not None, self.setting.accelerator
        if accelerator.num_processes == 1:
            return here
        if self.trainer.steps % STEPS_BETWEEN_QUESTIONS:
            return False
        return bool(accelerator.reduce(torch.tensor(float(here), device=accelerator.device)).item() > 0)

    def _leave(self) -> None:
        setting, trainer = self.setting, self.trainer
        setting.accelerator.wait_for_everyone()  # a launcher ends all processes once the first has ended: not while one still saves
        received = setting.stop.signal or signal.SIGTERM  # another process may have got it
        place = f"epoch {trainer.epoch + 1} of stage '{trainer.stage.name}'"
        says = f"stopped by {received.name} in {place}, saved in {setting.folder.path}; the same command goes on from here"
        raise Interrupted(says, received)


def weights(model: Model) -> bytes:
    """A network's weights as safetensors."""
    state = model.module.state_dict()
    return save(
        {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    )  # tied ones apart
