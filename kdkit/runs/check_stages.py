"""Checks of a schedule's stages: their first step is tried on random numbers of the real shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn, cast

import torch
from torch import nn

from kdkit.cache.surveys import STREAM
from kdkit.contracts.dataset_source import DataInfo, Stream
from kdkit.contracts.inputs import is_text, random_inputs
from kdkit.contracts.loss import Context
from kdkit.contracts.missing_labels import NO_LABELS
from kdkit.contracts.records import Batch
from kdkit.contracts.schedule import Lesson, Moment, Stage
from kdkit.contracts.survey import Survey
from kdkit.engine.objective import Objective
from kdkit.engine.reach import names_of, reached
from kdkit.engine.setup import rehearse
from kdkit.errors import KdkitError, ShapeError, cause, suggest
from kdkit.models.freezing import freeze_all_but
from kdkit.models.tapped import TappedModel
from kdkit.randomness import seeded
from kdkit.recipe import Recipe
from kdkit.runs import check_caches as cache_plan
from kdkit.runs.check_networks import NetworkChecks
from kdkit.runs.check_report import Checks, Report
from kdkit.runs.networks import ModelFactory
from kdkit.runs.plan import StagePlan, adapters, formula
from kdkit.runs.random_batches import batch_of, on_random_numbers, probe_size, shapes_of
from kdkit.runs.step_cost import step_cost


class StageChecks(Checks):
    """Tries every stage of a schedule."""

    def __init__(self, recipe: Recipe, report: Report, networks: NetworkChecks) -> None:
        super().__init__(recipe, report)
        self.networks = networks
        self.used: set[str] = set()  # losses that some stage uses
        self._stages: set[str] = set()
        # asked for by the losses of the stage, with their teachers
        self._surveys: list[tuple[TappedModel, Survey]] = []
        # parameters of a student that no stage so far has trained, by their ids
        self._still: dict[nn.Module, set[int]] = {}

    def plan(
        self,
        stage: Stage,
        factory: ModelFactory,
        info: DataInfo,
        num_train: int,
        steps: int,
        watching: cache_plan.Rehearsal,
    ) -> StagePlan:
        """Plan one stage; `watching` checks whether its batches can be answered from caches."""
        for student in stage.students:
            self.networks.check_layout(cast("TappedModel", student))
        targets = self.task.random_targets(info, torch.arange(num_train))
        groups = self.task.strata(targets)
        if stage.parts is not None:
            stage.parts.to(factory.device)
        few = probe_size(info)
        images = random_inputs(info.train_shape, few)
        on_device = random_inputs(info.train_shape, few, factory.device)
        views = stage.data.views

        def shown(count: int) -> Batch:
            return batch_of(self.task, on_device, info, views, count).without_labels()

        batch = watching.noting(stage, shown)
        self._check_images(stage, groups if info.labelled else NO_LABELS, info)
        labels = targets if info.labelled else NO_LABELS
        rehearsed = rehearse(self.recipe, factory, stage, batch(few), info, labels)
        lessons = rehearsed.lessons
        objectives = [rehearsed.objective(i) for i in range(len(lessons))]
        self._check_stage(stage, lessons, objectives)
        # The first student stands for its peers, but for those of another architecture below.
        objective, network = objectives[0], stage.students[0].module
        self._networks = factory.teacher_modules()
        self._num_train, self._surveys = num_train, rehearsed.surveys
        context = replace(rehearsed.context(0), num_samples=num_train + info.unlabelled)
        # A check must not change the caller's random state, and gives the same messages each time.
        with seeded("plan"):
            known = batch_of(self.task, images, info, 1, few)
            known = replace(known, index=known.index % max(1, num_train))
            # Answers of networks on the meta device have shapes only, and losses may look at
            # numbers.
            tried = [
                on_random_numbers(self.task, lesson, info)
                if factory.device.type == "meta"
                else lesson
                for lesson in lessons
            ]
            left = self._try_losses(objective, tried[0], known, context)
            # A later stage may freeze this student as its teacher: then it is the deployed network.
            cast("TappedModel", stage.students[0]).settle(left)
            for i, (other, lesson) in enumerate(zip(objectives, tried, strict=True)):
                # a peer of another architecture, or not a student's parameter
                if shapes_of(lesson) != shapes_of(tried[0]):
                    own = rehearsed.context(i)
                    whose = replace(context, student=own.student, teacher=own.teacher)
                    self._try_losses(other, lesson, known, whose)
        frozen: list[nn.Parameter] = []
        # After `setup`: losses may have added parts that the globs are matched with.
        if stage.training.train is not None and not self.report.problems:
            frozen = freeze_all_but(stage.training.train, network, objective.parts())
            for parameter in frozen:
                # Only which parameters would be frozen is asked here; later stages train them
                # perhaps.
                parameter.requires_grad_(True)
        if not self.report.problems:
            with torch.enable_grad():
                # A step with gradients: the one above ran without.
                answered = stage.step(batch(few))[0]
            self._note_what_learns(stage, objective, answered, tried[0], known, frozen)
            # Of large images, the activations of one step may be all that memory holds.
            del answered
        epochs = stage.training.epochs or self.spec.train.epochs
        if shortened := self.spec.train.lr_schedule.shortened(stage.name, epochs):
            self.report.notes.append(shortened)
        active = objective.active(lessons[0])
        self.used.update(active)
        entries = {name: objective.entries[name] for name in active}
        # The last epoch, as some schedules ask no teacher in the first ones.
        late = Moment(epochs - 1, (epochs - 1) * steps)
        cost = step_cost(stage, factory.models(), batch, few, late)
        # Last, as its step in training mode changes running statistics.
        self._check_single(stage, batch, num_train)
        return StagePlan(
            stage.name,
            len(stage.students),
            formula(entries),
            tuple(adapters(active)),
            epochs,
            steps * epochs,
            cost,
        )

    def _check_stage(
        self, stage: Stage, lessons: Sequence[Lesson], objectives: Sequence[Objective]
    ) -> None:
        """Check whether its names, numbers and requirements are valid for the recipe."""
        names, called = self.recipe.loss_names(), f"stage '{stage.name}'"
        if unknown := set(stage.training.losses or ()) - set(names):
            raise self.recipe.error(
                ["schedule"],
                f"{called} asks for losses that are not there: {suggest(unknown.pop(), names)}",
            )
        if not all(
            objective.active(lesson) for objective, lesson in zip(objectives, lessons, strict=True)
        ):
            raise self.recipe.error(
                ["losses"], f"{called} has no teacher, and none of its losses is on labels"
            )
        if stage.result == "best" and not self.spec.data.validation:
            raise self.recipe.error(
                ["schedule"],
                f"{called} leaves the best student on validation data; set `data.validation`",
            )
        if stage.name in self._stages:
            raise self.recipe.error(
                ["schedule"],
                f"two stages are called '{stage.name}'; their logs and random numbers go by that"
                " name",
            )
        self._stages.add(stage.name)

    def _check_single(self, stage: Stage, batch: Callable[[int], Batch], num_train: int) -> None:
        """Check whether the students can learn from a batch of one, if the recipe gives them
        one.
        """
        size, drop_last = self.spec.data.batch_size, self.spec.data.drop_last
        if size > 1 and (drop_last or num_train % size != 1):
            return
        for student in stage.students:
            student.module.train()
        try:
            stage.step(batch(1))
        # torch raises it for batch normalisation in training mode with one value per channel
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            batches = (
                "every batch is"
                if size == 1
                else f"the last of {num_train} images in batches of {size} is"
            )
            place = ["data", "batch_size" if size == 1 else "drop_last"]
            says = (
                f"{batches} a single image, of which a BatchNorm layer of the student gets one"
                " value a channel; it needs two"
            )
            self.report.refuse(place, says)
        finally:
            for student in stage.students:
                student.module.eval()

    def _check_images(self, stage: Stage, groups: torch.Tensor | None, info: DataInfo) -> None:
        """Check whether the recipe can give the stage its views, and its images in the requested
        order.
        """

        def refuse(*place: str, says: str) -> NoReturn:
            raise self.recipe.error(place, f"stage '{stage.name}' {says}")

        mixed, size = self.spec.train.mixup is not None, self.spec.data.batch_size
        if stage.data.views > 1 and is_text(info.image_shape):
            refuse("schedule", says="compares views of images, and texts have one")
        if stage.data.views > 1 and self.recipe.task.moves:
            says = f"compares views of images, and targets of task '{self.recipe.task.name}' move"
            refuse("schedule", says=f"{says} with each view")
        if stage.data.views > 1 and mixed:
            refuse("train", "mixup", says="compares views of single images; leave mixup out")
        if stage.data.arrange is None:
            return
        together = "chooses which images come together; leave"
        if mixed:
            refuse("train", "mixup", says=f"{together} mixup out")
        if self.spec.data.unlabelled is not None:
            refuse("data", "unlabelled", says=f"{together} unlabelled out")
        if key := self.spec.data.repeating:
            refuse("data", key, says=f"{together} {key} out")
        if groups is NO_LABELS or groups is None:
            refuse("schedule", says="brings images together by their labels, and they have none")
        # Images that `drop_last` leaves out are never arranged.
        used = len(groups) - (len(groups) % size if self.spec.data.drop_last else 0)
        # The schedule may refuse these labels, or the size of a batch.
        stage.data.arrange(torch.arange(used), groups[:used], size)

    def _try_losses(
        self, objective: Objective, lesson: Lesson, batch: Batch, context: Context
    ) -> nn.Module:
        """Set up and evaluate each loss on random numbers of the real shapes; return the network
        that they deploy.
        """
        network = context.student
        for name, loss in objective.active(lesson).items():
            place: list[str | int] = ["losses", self.recipe.loss_names().index(name)]
            # One at a time, so that each error is told at its own loss.
            alone = Objective({name: (objective.entries[name], loss)}, self.task)
            self._surveys.clear()
            try:
                alone.setup(lesson, batch, context, self._networks)
                value = alone(lesson, batch).terms[name]
                if value.shape != ():
                    raise ShapeError(f"{name} gives a tensor {tuple(value.shape)}, not a scalar")
                # A loss may deploy the network that the loss before it has deployed.
                network = alone.deploy(network)
            except ShapeError as error:
                # The probe's number of samples would mislead: the user's batches have another.
                any_batch = re.sub(rf"\({len(batch.index)},(?=[ )])", "(B,", str(error))
                self.report.refuse(place, any_batch)
            except KdkitError as error:
                self.report.refuse(place, str(error))
            except Exception as error:  # an error in a plugin's own code
                self.report.refuse(
                    place,
                    f"fails on the models' shapes: {cause(error)}",
                )
            for teacher, survey in self._surveys:
                self._note_survey(name, place, teacher, survey)
        return network

    def _note_survey(
        self, loss: str, place: Sequence[str | int], teacher: TappedModel, survey: Survey
    ) -> None:
        """Note what a loss shows a teacher before the first step, or refuse it on a stream."""
        if self.spec.data.synthetic_batches is not None:
            says = "shows the teacher all training images before the first step, and there are none"
            self.report.refuse(place, f"{loss} {says}")
            return
        source = self.recipe.dataset()
        is_here = source.split_at_check and source.lacks() is None
        if is_here and isinstance(source.split("train"), Stream):
            self.report.refuse(place, f"{loss} {STREAM}")
            return
        count = self._num_train if survey.images is None else len(survey.images)
        says = (
            f"{loss} shows {teacher.role} {count:,} training images before the first step, once"
            f" each (a forward an image); {survey.name} of its answers is kept on disk"
        )
        if says not in self.report.notes:
            self.report.notes.append(says)

    def _note_what_learns(
        self,
        stage: Stage,
        objective: Objective,
        answered: Lesson,
        tried: Lesson,
        batch: Batch,
        frozen: Sequence[nn.Parameter],
    ) -> None:
        """Find the part of the student that no loss of this stage, nor of an earlier one,
        reaches.
        """
        weighed = {
            name: loss
            for name, loss in objective.active(tried).items()
            if objective.entries[name].weight != 0
        }
        if not weighed:
            self.report.notes.append(
                f"stage '{stage.name}' learns nothing: all its losses have weight 0"
            )
        counting = Objective(
            {name: (objective.entries[name], loss) for name, loss in weighed.items()}, self.task
        )
        # Frozen parameters are left out: no gradient is meant to reach them.
        found = reached(counting, answered, tried, batch) - {id(parameter) for parameter in frozen}
        network = stage.students[0].module
        learning = {id(p) for p in network.parameters() if p.requires_grad}
        # Popped and set again, so that the student of the latest stage is the last entry.
        self._still[network] = self._still.pop(network, learning) - found

    def note_what_stays(self) -> None:
        """Note the part of the last stage's student that no loss of any stage reaches."""
        student, still = next(reversed(self._still.items()))
        parts = names_of(still, student)
        if not parts:
            return
        what = (
            "the student"
            if parts == ("",)
            else f"{', '.join(parts[:8])}{', ...' if len(parts) > 8 else ''} of the student"
        )
        count = sum(p.numel() for p in student.parameters() if id(p) in still)
        self.report.notes.append(
            f"no loss reaches {what} ({count:,} parameters): what is there stays as it began"
        )
