"""Measures how good a stage's models are, and decides which of them to keep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from safetensors.torch import save
from torch import Tensor

from kdkit.contracts.compression import Samples
from kdkit.contracts.schedule import Model
from kdkit.engine import trainer as training
from kdkit.engine.evaluate import measuring
from kdkit.engine.trainer import Trainer
from kdkit.engine.turns import Turns
from kdkit.models.compressing import finished
from kdkit.models.freezing import in_eval_mode
from kdkit.models.tapped import TappedModel
from kdkit.runs.best_epochs import BestEpochs
from kdkit.runs.context import RunContext

Scores = dict[str, dict[str, float]]  # part of the data -> metrics


class Standing:
    """The scores of a stage's students, and their best epochs.

    Attributes:
        scores: of each student at the last measurement; of all processes' students if they train
            apart.
        ensemble: of the ensemble of all models.
        best_epochs: the epochs whose weights are averaged at the end, if the recipe says so.
        last: scores after the last epoch, if `scores` are those of the mean.
    """

    def __init__(self, setting: RunContext, number: int, trainer: Trainer) -> None:
        self.setting, self.trainer = setting, trainer
        self.scores: list[Scores] = []
        self.ensemble: Scores = {}
        self.last: list[Scores] = []
        count = setting.recipe.spec.train.average_best
        self._kept: tuple[int, list[Model]] | None = None  # finished networks after a step
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
        """Return the scores of this process's students."""
        return [self.scores[number] for number in self._own]

    @property
    def _own(self) -> range:
        """Return the numbers of this process's students among all."""
        count = len(self.trainer.stage.students)
        begin = self.trainer.processes.group * count
        return range(begin, begin + count)

    def trained(self) -> list[Model]:
        """Return the networks that training leaves in the students' places, or their averages."""
        pairs = zip(self.trainer.stage.students, self.trainer.deployed(), strict=True)
        return [cast("TappedModel", student).twin(module) for student, module in pairs]

    def deployed(self) -> list[Model]:
        """Return the networks that are measured and exported in the students' places."""
        students, steps = self.trainer.stage.students, self.trainer.steps
        if not any(self.setting.factory.compressions(student) for student in students):
            return self.trained()
        # to finish takes seconds, and each step is asked for several times
        if self._kept is None or self._kept[0] != steps:
            pairs = zip(students, self.trained(), strict=True)
            kept: list[Model] = [
                self._finished(one, cast("TappedModel", model)) for one, model in pairs
            ]
            self._kept = (steps, kept)
        return [*self._kept[1]]

    def _finished(self, student: Model, model: TappedModel) -> TappedModel:
        compressions = self.setting.factory.compressions(student)
        assert model.input_shape is not None
        with in_eval_mode(model.module):
            module = finished(model.module, model.input_shape, compressions, self._samples(model))
        return model.twin(module)

    def _samples(self, model: TappedModel) -> Samples:
        def samples(count: int) -> Iterator[Tensor]:
            for batch in itertools.islice(
                training.batches(self.trainer.loader, self.trainer.stage, 0), count
            ):
                yield model.adapt(batch.inputs)

        return samples

    def measure(self, epoch: int) -> Turns[None]:
        """Measure each student and, if there are several models, their ensemble.

        Processes that train apart measure their own students on the whole data, and exchange the
        scores. Runs that are trained side by side meet by the number of the epoch.
        """
        setting, processes = self.setting, self.trainer.processes
        stage = self.trainer.stage
        models = [*self.deployed(), *(stage.company if processes.groups == 1 else ())]
        self.scores = [{} for _ in range(len(stage.students) * processes.groups)]
        self.ensemble = {}
        for number, (part, batches) in enumerate(
            # Numbers below those of training batches, so that runs in lockstep measure at one place
            # before they go on.
            (("test", setting.data.test), ("validation", setting.data.validation)),
            -2,
        ):
            if batches is None:
                continue
            taught = setting.teacher if part == "test" else None
            found, together = yield from measuring(
                models,
                processes.measured(batches),
                setting.judge,
                taught,
                world=processes.measure_together,
                place=(epoch, number),
                everyones=processes.everyones_answers,
            )
            everyones = processes.everyones(found)
            # company models have no scores of their own
            for scores, values in zip(self.scores, everyones, strict=False):
                scores[part] = values
                self._warn_of_non_finite(values, part)
            if together:
                self.ensemble[part] = together

    def _warn_of_non_finite(self, values: Mapping[str, float], part: str) -> None:
        for name in (name for name, value in values.items() if not math.isfinite(value)):
            self.setting.reporter.warn(
                f"{name} of the student on {part} data is not finite; the files have null for it"
            )

    @property
    def chosen(self) -> int:
        """Number of the student that the stage leaves."""
        if self.trainer.stage.result == "first":
            return 0
        return max(range(len(self.scores)), key=lambda i: self._rank(self.scores[i]))

    def _rank(self, scores: Scores) -> float:
        """Return the deciding score on validation data, with the sign that makes larger better."""
        deciding = self.setting.judge.deciding
        return deciding.rank(scores["validation"][deciding.name])

    def keep_best(self) -> None:
        """Store the epoch (and, if the stage leaves the best student, that student's number) that
        is best on validation, never on test.
        """
        setting, stage = self.setting, self.trainer.stage.name
        # Without validation data there is no best epoch: test data choose nothing.
        if "validation" not in self.scores[0]:
            return
        scores, student = self.scores[self.chosen], self.trainer.stage.students[self.chosen]
        # an earlier stage trained something else
        known = setting.best if setting.best and setting.best["stage"] == stage else None
        # Of equal epochs the first one stays.
        if known is None or self._rank(scores) > self._rank(known):
            setting.best = {"stage": stage, "epoch": self.trainer.epoch, **scores}
            if (network := setting.factory.network(student)) is not None:
                setting.best["network"] = network
            if setting.is_main:
                setting.folder.keep(setting.folder.best_file, weights(self.deployed()[self.chosen]))

    def keep_best_epochs(self) -> None:
        """Store weights that may become a part of the mean."""
        if self.best_epochs is None:
            return
        epoch = self.trainer.epoch
        wanted = [
            self.best_epochs.offer(i, epoch, self._rank(scores))
            for i, scores in enumerate(self.scores)
        ]
        written: dict[str, str] = {}
        for number, model in zip(self._own, self.trained(), strict=True):
            # Students that all processes train together are the same in each: one process writes
            # them.
            if wanted[number] and self.trainer.processes.writes:
                written |= self.best_epochs.write(number, epoch, weights(model))
        for one in gather_object([written]):  # each process reads all files at the end
            self.best_epochs.digests |= one

    def average(self) -> Turns[None]:
        """Load the mean of its best epochs' weights into each student, and measure them again; only
        at the end of the last stage.
        """
        if self.best_epochs is None:
            return
        self.setting.accelerator.wait_for_everyone()  # until all files are written
        if self.setting.is_main:
            self.best_epochs.tidy(for_good=True)
        for number, network in zip(self._own, self.trainer.deployed(), strict=True):
            network.load_state_dict(self.best_epochs.mean(number))
        self.last, self._kept = self.scores, None
        # Another place than the last epoch's own measurement: runs in lockstep share by place.
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
    """Serialise a network's weights as safetensors."""
    state = model.module.state_dict()
    # clone tensors that share memory: safetensors refuses them
    plain = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    return save(plain, metadata)
