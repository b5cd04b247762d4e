"""How good a stage's models are, and which of them are kept."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from safetensors.torch import save

from kdkit.contracts.ensembles import combined
from kdkit.contracts.schedule import Model
from kdkit.engine.evaluate import Predictions, metrics, predicting
from kdkit.engine.trainer import Trainer
from kdkit.engine.turns import Turns
from kdkit.models.tapped import TappedModel
from kdkit.runs.best_epochs import BestEpochs
from kdkit.runs.context import Setting

Scores = dict[str, dict[str, float]]  # part of the data -> metrics


class Standing:
    """Where a stage's students stand.

    Attributes:
        scores: of each student, when last measured; of all processes' where they train apart.
        ensemble: of all together.
        best_epochs: whose mean each student is to be in the end, where the recipe says so.
        last: scores after the last epoch, where those above are of the mean.
    """

    def __init__(self, setting: Setting, number: int, trainer: Trainer) -> None:
        self.setting, self.trainer = setting, trainer
        self.scores: list[Scores] = []
        self.ensemble: Scores = {}
        self.last: list[Scores] = []
        count = setting.recipe.spec.train.average_best
        self.best_epochs = BestEpochs(setting.folder.best_epochs(number), count) if count else None

    def line(self) -> dict[str, Any]:
        """Row for metrics.jsonl."""
        told: dict[str, Any] = dict(self.scores[0])
        if len(self.scores) > 1:
            told["peers"] = self.scores[1:]
        if self.ensemble:
            told["ensemble"] = self.ensemble
        if self.best_epochs:
            told["best_epochs"] = self.best_epochs.epochs(self.chosen)
        return told

    @property
    def own_scores(self) -> list[Scores]:
        """Those of this process's students."""
        return [self.scores[number] for number in self._own]

    @property
    def _own(self) -> range:
        """The numbers of this process's students among all."""
        count = len(self.trainer.stage.students)
        begin = self.setting.accelerator.process_index * count if self.trainer.apart else 0
        return range(begin, begin + count)

    def deployed(self) -> list[Model]:
        """The students as they are measured and exported."""
        pairs = zip(self.trainer.stage.students, self.trainer.deployed(), strict=True)
        return [cast("TappedModel", student).twin(module) for student, module in pairs]

    def measure(self, epoch: int) -> Turns[None]:
        """Measure each student, and, where there are several models, their ensemble (the mean of
        their probabilities).

        Processes that train apart measure their own students on the whole data, and tell each
        other. Runs that are trained side by side meet by the number of the epoch.
        """
        setting, apart = self.setting, self.trainer.apart
        world = 1 if apart else setting.accelerator.num_processes
        models = [*self.deployed(), *(() if apart else self.trainer.stage.company)]
        self.scores = [
            {}
            for _ in range(
                len(self.trainer.stage.students)
                * (setting.accelerator.num_processes if apart else 1)
            )
        ]
        self.ensemble = {}
        for number, (part, batches) in enumerate(
            (("test", setting.data.test), ("validation", setting.data.validation)), -2
        ):
            if batches is None:
                continue
            teacher = setting.teacher if part == "test" else None
            place = (epoch, number)
            found = yield from predicting(
                models, batches.whole() if apart else batches, world=world, place=place
            )
            found = gather_object(found) if apart else found
            # the company has no scores of its own
            for scores, one in zip(self.scores, found, strict=False):
                scores[part] = metrics(one, teacher)
                for name in (
                    name for name, value in scores[part].items() if not math.isfinite(value)
                ):
                    setting.reporter.warn(
                        f"{name} of the student on {part} data is not finite; the files have null"
                        " for it"
                    )
            if len(found) > 1:
                self.ensemble[part] = metrics(
                    Predictions(combined([one.logits for one in found]), found[0].labels), teacher
                )

    @property
    def chosen(self) -> int:
        """Which student the stage leaves, by its number."""
        if self.trainer.stage.result == "first":
            return 0
        return max(range(len(self.scores)), key=lambda i: self.scores[i]["validation"]["top1"])

    def keep_best(self) -> None:
        """Remember the epoch (and, where the stage leaves the best student, which one it is)
        that is best on validation, never on test.
        """
        setting, stage = self.setting, self.trainer.stage.name
        if "validation" not in self.scores[0]:
            return
        scores, student = self.scores[self.chosen], self.trainer.stage.students[self.chosen]
        # an earlier stage trained something else
        known = setting.best if setting.best and setting.best["stage"] == stage else None
        if known is None or scores["validation"]["top1"] > known["validation"]["top1"]:
            setting.best = {"stage": stage, "epoch": self.trainer.epoch, **scores}
            if (network := setting.factory.network(student)) is not None:
                setting.best["network"] = network
            if setting.is_main:
                setting.folder.keep(setting.folder.best_file, weights(self.deployed()[self.chosen]))

    def keep_best_epochs(self) -> None:
        """Keep the weights that may become a part of the mean."""
        if self.best_epochs is None:
            return
        epoch = self.trainer.epoch
        wanted = [
            self.best_epochs.offer(i, epoch, scores["validation"]["top1"])
            for i, scores in enumerate(self.scores)
        ]
        writes = self.setting.is_main or self.trainer.apart
        written: dict[str, str] = {}
        for number, model in zip(self._own, self.deployed(), strict=True):
            if wanted[number] and writes:
                written |= self.best_epochs.write(number, epoch, weights(model))
        for one in gather_object([written]):  # each process reads all files in the end
            self.best_epochs.digests |= one

    def average(self) -> Turns[None]:
        """Put the mean of its best epochs' weights into each student, and measure them again;
        for the last stage, when it is trained.
        """
        if self.best_epochs is None:
            return
        self.setting.accelerator.wait_for_everyone()  # until the files are there
        if self.setting.is_main:
            self.best_epochs.tidy(for_good=True)
        for number, network in zip(self._own, self.trainer.deployed(), strict=True):
            network.load_state_dict(self.best_epochs.mean(number))
        self.last = self.scores
        yield from self.measure(self.trainer.epoch + 1)

    def keep_snapshot(self) -> None:
        every = self.setting.recipe.spec.run.snapshots
        trainer = self.trainer
        setting = self.setting
        if every and trainer.epoch % every == 0:
            trainer.synchronise()
            if setting.is_main:
                setting.folder.keep(
                    setting.folder.snapshot_file(trainer.stage.name, trainer.epoch),
                    weights(self.deployed()[0]),
                )


def weights(model: Model, metadata: dict[str, str] | None = None) -> bytes:
    """A network's weights as safetensors."""
    state = model.module.state_dict()
    # tied ones apart
    plain = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    return save(plain, metadata)
