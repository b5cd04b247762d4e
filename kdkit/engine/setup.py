"""Sets up a stage: tries its first step to determine the sizes of its losses."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.inputs import random_inputs
from kdkit.contracts.loss import Context, Loss
from kdkit.contracts.loss_options import LayerPair
from kdkit.contracts.missing_labels import NO_LABELS
from kdkit.contracts.records import Batch
from kdkit.contracts.schedule import Lesson, Model, Stage
from kdkit.contracts.survey import Survey
from kdkit.contracts.task import Task
from kdkit.data import loaders
from kdkit.engine import objective
from kdkit.engine.objective import Objective
from kdkit.engine.processes import processes_of
from kdkit.engine.scores import deciding
from kdkit.engine.trainer import Trainer, batches
from kdkit.errors import RunError, TapError
from kdkit.models.devices import device_of
from kdkit.models.rest import Rest
from kdkit.models.surveyed import surveyed
from kdkit.models.tapped import TappedModel
from kdkit.models.weight_files import adopt_shapes
from kdkit.randomness import reseed
from kdkit.recipe import Recipe


class Networks(Protocol):
    """The part of the model factory that the set-up of a stage uses."""

    def verify_finite(self) -> None:
        """Raise an error if a teacher has given a non-finite answer so far."""

    def models(self) -> Sequence[TappedModel]:
        """Return all models that are in use."""

    def teacher_modules(self) -> Mapping[str, nn.Module]:
        """Return the networks by name of those teachers that have one."""

    def teaching(self, stage: Stage, number: int = 0) -> nn.Module | None:
        """Return the network that teaches the stage's student of that number."""

    def expand(
        self, pairs: Sequence[LayerPair], teacher: str | None = None, own: bool = False
    ) -> list[LayerPair]:
        """Return the pairs of layers with globs expanded."""

    def surveyed(
        self, survey: Survey, teacher: TappedModel, data: loaders.Data
    ) -> dict[str, Tensor]:
        """Survey a frozen teacher's answers to the training images, or read what was found."""


SHOWN = 4
"""Random images that a survey sees while a stage is only tried."""


@dataclass(frozen=True)
class Rehearsal:
    """A stage whose first step was tried: the input for setting up its losses in training, in a
    check, and when a deployed network is rebuilt.

    Attributes:
        batch: the probe.
        lessons: the lessons that the stage's step makes of it.
        survey: surveys the training images (None: a few random ones stand for them).
        surveys: those that were asked for, each with the teacher.
    """

    recipe: Recipe
    networks: Networks
    stage: Stage
    info: DataInfo
    labels: Tensor
    batch: Batch
    lessons: Sequence[Lesson]
    survey: Callable[[Survey, TappedModel], dict[str, Tensor]] | None = None
    surveys: list[tuple[TappedModel, Survey]] = field(default_factory=list)

    def student_of(self, number: int) -> Model:
        """Return the student of that lesson; lessons beyond the number of students belong to the
        first.
        """
        students = self.stage.students
        return students[number if number < len(students) else 0]

    def objective(self, number: int, only: Sequence[str] | None = None) -> Objective:
        """Build the losses of that lesson: those of the stage, or `only` these."""
        losses = self.stage.training.losses if only is None else only
        is_students = number < len(self.stage.students)
        return objective.build(self.recipe, losses, self.networks.expand, layers=is_students)

    def context(self, number: int) -> Context:
        """Make the context for the losses of that lesson."""
        last = len(self.stage.students) - 1
        return Context(
            self.student_of(number).module,
            self.networks.teaching(self.stage, min(number, last)),
            self.recipe.task.row_width(self.info),
            len(self.labels),
            self.labels,
            self._behind,
            self._surveyed,
        )

    def _behind(self, network: nn.Module, layer: str, taps: Sequence[str]) -> Rest:
        """Return what stands behind a layer of a network.

        Raises:
            TapError: the network is not one of the recipe's; see `Rest`.
        """
        if (model := self._model_of(network)) is None:
            raise TapError(f"what stands behind '{layer}' is not known of this network")
        return Rest(model, layer, taps)

    def _surveyed(self, network: nn.Module, survey: Survey) -> dict[str, Tensor]:
        """Survey a teacher's answers.

        Raises:
            TapError: it is not one that stays as it is; see `surveyed`.
        """
        model = self._model_of(network)
        if model is None or not model.frozen:
            raise TapError(
                f"{survey.name} needs a teacher that stays as it is, and this stage's learns"
            )
        self.surveys.append((model, survey))
        if self.survey is not None:
            return self.survey(survey, model)
        return surveyed(survey, model, [self._random_batch(survey, device_of(network))])

    def _random_batch(self, survey: Survey, device: torch.device) -> Batch:
        index = torch.arange(SHOWN) if survey.images is None else survey.images[:SHOWN].cpu()
        images = random_inputs(self.info.train_shape, len(index), device)
        if not self.info.labelled:
            return Batch(images, NO_LABELS, index)
        return Batch(images, self.recipe.task.random_targets(self.info, index), index)

    def _model_of(self, network: nn.Module) -> TappedModel | None:
        models = (model for model in self.networks.models() if model.module is network)
        return next(models, None)


def rehearse(
    recipe: Recipe,
    networks: Networks,
    stage: Stage,
    batch: Batch,
    info: DataInfo,
    labels: Tensor,
) -> Rehearsal:
    """Try the stage's first step without a trace: no running statistics change, and no state is
    stored.

    Args:
        recipe: the recipe that names the losses.
        networks: of the recipe.
        stage: the stage to try; its parts are already on the device.
        batch: a probe.
        info: of the data.
        labels: target by `Batch.index`, see `Context`.

    Raises:
        RunError: the step gives fewer lessons than there are students.
    """
    for student in stage.students:
        student.module.eval()
    parts = stage.parts if stage.parts is not None else nn.Module()
    # the step may update the schedule's own buffers (queues, averages)
    remembered = copy.deepcopy(parts.state_dict())
    with torch.no_grad():
        lessons = stage.step(batch.without_labels())
    parts.load_state_dict(remembered)
    if len(lessons) < len(stage.students):
        raise RunError(
            f"stage '{stage.name}' gives {len(lessons)} lessons for {len(stage.students)} students"
        )
    return Rehearsal(recipe, networks, stage, info, labels, batch, lessons)


# for each student (and further lesson), its losses so far by name
Carried = dict[tuple[Model, int], dict[str, Loss]]


def build_trainer(
    recipe: Recipe,
    prepared: loaders.Data,
    networks: Networks,
    accelerator: Accelerator,
    number: int,
    stage: Stage,
    carried: Carried | None = None,
) -> Trainer:
    """Build the trainer of the schedule's stage `number`, with its losses set up by a probe batch.

    A loss that a student already had in an earlier stage continues with its learnt state, which
    `carried` holds.
    """
    reseed(recipe.spec.seed, "setup", number)
    if stage.parts is not None:
        stage.parts.to(accelerator.device)
    batch = next(batches(prepared.train, stage, 0))
    labels = _labels_by_index(prepared.train, recipe.task)
    tried = rehearse(recipe, networks, stage, batch, prepared.info, labels)
    tried = replace(tried, survey=functools.partial(networks.surveyed, data=prepared))
    networks.verify_finite()
    apart = processes_of(stage, accelerator).groups > 1
    if apart:
        _refuse_together(recipe, stage)
    carried = {} if carried is None else carried
    teachers = networks.teacher_modules()
    objectives = []
    for i, lesson in enumerate(tried.lessons):
        built = tried.objective(i)
        if apart:
            built.keep_apart()
        built.setup(lesson, batch, tried.context(i), teachers)
        beyond = max(0, i + 1 - len(stage.students))
        _carry(carried.setdefault((tried.student_of(i), beyond), {}), built.parts())
        objectives.append(built)
    return Trainer(
        stage,
        objectives,
        recipe.spec.train,
        prepared.train,
        accelerator,
        seed=recipe.spec.seed,
        maximize=prepared.validation is not None
        and deciding(recipe, prepared.info).higher_is_better,
        balance=None
        if recipe.spec.balance is None
        else (recipe.plugins.balances[recipe.spec.balance.use], recipe.spec.balance),
    )


def _carry(before: dict[str, Loss], now: Mapping[str, Loss]) -> None:
    """Load the learnt state of an earlier stage's losses, and store the losses for the next
    stage.
    """
    for name, loss in now.items():
        if name not in before:
            continue
        # frozen copies come from this stage's teacher
        copied = {key: p.detach() for key, p in loss.named_parameters() if not p.requires_grad}
        learnt = {**before[name].state_dict(), **copied}
        adopt_shapes(loss, learnt)
        loss.load_state_dict(learnt)
    before.update(now)


def _refuse_together(recipe: Recipe, stage: Stage) -> None:
    """Refuse stages and losses that do not work when each process trains students of its own.

    Raises:
        RecipeError: a loss would compare the answers of different networks.
        RunError: the stage leaves a student that only another process has.
    """
    for i, entry in enumerate(recipe.spec.losses):
        if getattr(entry, "gather", False):
            says = (
                f"in stage '{stage.name}' each process trains a student of its own, whose answers"
                " are not to be gathered into one batch"
            )
            raise recipe.error(["losses", i, "gather"], says)
    if stage.result != "first":
        raise RunError(
            f"stage '{stage.name}' trains apart, so it can only leave the first process's student"
        )


def _labels_by_index(loader: loaders.TrainLoader, task: Task) -> Tensor:
    """Return the target by `Batch.index`, which also counts images that are not trained on: those
    have -1. Empty where they are read with the images, or are in the texts.
    """
    own = loader.labels.cpu()
    if not own.numel():
        return own.new_empty(0)
    if task.rows_are == "classes" and own.is_floating_point():
        own = own.argmax(1)  # of learnt labels, the classes, which losses count
    labels = own.new_full((int(loader.indices.max()) + 1, *own.shape[1:]), -1)
    labels[loader.indices.cpu()] = own
    return labels
