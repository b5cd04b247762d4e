"""Reports the progress of a stage: to the terminal, metrics.jsonl, trackers."""

from __future__ import annotations

from collections.abc import Mapping

from kdkit.engine.trainer import Trainer
from kdkit.runs.context import RunContext
from kdkit.runs.scoring import Standing


def tell_step(
    setting: RunContext, trainer: Trainer, terms: Mapping[str, float], speed: float, *, log: bool
) -> None:
    """Show the last step, and write it to the files if `log` is set.

    Args:
        setting: of the run.
        trainer: of the stage.
        terms: of the losses.
        speed: images per second.
        log: whether to write a line to the files too.
    """
    lr, stage = trainer.updaters[0].lr, trainer.stage.name
    label = f"epoch {trainer.epoch + 1}/{trainer.epochs}"
    setting.reporter.step(trainer.steps, label, terms, lr, speed)
    if not log or not setting.is_main:
        return
    setting.folder.log(
        kind="step", stage=stage, epoch=trainer.epoch, step=trainer.steps, lr=lr, terms=terms
    )
    # Trackers have one axis of names: losses of two stages may be called alike.
    shown = {f"{stage}/{name}": value for name, value in terms.items()}
    setting.accelerator.log(shown, step=trainer.steps)


def tell_epoch(
    setting: RunContext,
    trainer: Trainer,
    means: Mapping[str, float],
    speed: float,
    standing: Standing | None,
) -> None:
    """Show and log a finished epoch.

    Args:
        setting: of the run.
        trainer: of the stage.
        means: of the losses' terms.
        speed: images per second.
        standing: the students' scores, if they were measured.
    """
    lr, spent = trainer.updaters[0].lr, setting.clock.wall
    test = standing.scores[0]["test"] if standing else {}
    scores = (*setting.judge.scores, *setting.judge.agreement)
    told = [(score, test[score.name]) for score in scores if score.name in test]
    label = f"{trainer.stage.name} epoch {trainer.epoch}/{trainer.epochs}"
    # By the mean of the epochs so far: measurements and checkpoints are in it.
    left = spent * trainer.epochs / trainer.epoch - spent
    setting.reporter.epoch(label, means, lr, speed, told, left)
    if not setting.is_main:
        return
    setting.folder.log(
        kind="epoch",
        stage=trainer.stage.name,
        epoch=trainer.epoch,
        step=trainer.steps,
        seconds=round(spent, 3),
        lr=lr,
        images_per_second=round(speed, 1),
        train=means,
        **(standing.line() if standing else {}),
    )
    shown = {f"test/{name}": value for name, value in test.items()}
    setting.accelerator.log(shown, step=trainer.steps)
