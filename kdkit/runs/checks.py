"""What a recipe would do, found out without data, weights or training: shapes on the meta
device, losses on random numbers.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdkit.contracts.dataset_source import DataInfo, DatasetSource, Stream
from kdkit.contracts.inputs import is_text, kind_of, random_inputs
from kdkit.contracts.loss import Context
from kdkit.contracts.model_source import AnswersOptions, Meaning, ModelOptions, TeacherOptions
from kdkit.contracts.records import Batch, Inputs
from kdkit.contracts.schedule import Lesson, Schedule, Stage
from kdkit.data import loaders
from kdkit.data.labels import CALLED, NO_LABELS, class_indices, split
from kdkit.data.subsets import images_per_epoch, samples
from kdkit.engine.objective import Objective, build
from kdkit.engine.optim import build_optimizer
from kdkit.engine.reach import names_of, reached
from kdkit.errors import (
    DataError,
    KdkitError,
    ModelError,
    RecipeError,
    RunError,
    ShapeError,
    TapError,
    suggest,
)
from kdkit.models.devices import LEAST_CHANNELS, chosen, trains_on_cpu, unsafe_convolution
from kdkit.models.freezing import freeze_all_but
from kdkit.models.tapped import TappedModel
from kdkit.randomness import seeded
from kdkit.recipe import Recipe, fetching, models_in, teacher_recipes
from kdkit.runs import check_caches as cache_plan
from kdkit.runs.meaning import meaning_of, other_class_names, refuse_other_meaning
from kdkit.runs.networks import ModelFactory, TrainedTeacher
from kdkit.runs.plan import ModelPlan, Plan, StagePlan, adapters, formula
from kdkit.runs.random_batches import batch_of, labels_of, on_random_numbers, shapes_of
from kdkit.runs.step_cost import step_cost

PROBE = 4  # images, of which a schedule may compare only half


def make(recipe: Recipe, fetch: Callable[[str], None] | None = None) -> Plan:
    """Plan a recipe.

    Args:
        recipe: what is to be carried out.
        fetch: told of each thing that is fetched first, as far as the recipe allows it (None:
            nothing is fetched).

    Raises:
        RecipeError: everything that cannot work, one line each with file and line.
    """
    with contextlib.nullcontext() if fetch else fetching.nothing_fetched():
        return _Planner(recipe, fetch).plan()


class _Planner:
    def __init__(self, recipe: Recipe, fetch: Callable[[str], None] | None) -> None:
        self.recipe = recipe
        self.spec = recipe.spec
        self.fetch = fetch
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._used: set[str] = set()
        self._stages: set[str] = set()
        # parameters of a student that no stage so far has trained, by their ids
        self._still: dict[nn.Module, set[int]] = {}

    def plan(self) -> Plan:
        spec = self.spec
        source = self.recipe.plugins.datasets[spec.data.dataset.use](spec.data.dataset)
        with self._problems_at("data", "dataset"):
            info = self._info(source)
            if info.num_classes < 2:
                raise DataError(f"says {info.num_classes} class: there must be two to tell apart")
            with self._problems_at("data"):
                info = replace(info, image_shape=loaders.image_shape(spec.data, info))
                num_train = samples(spec.data, info.num_train)
                if num_train < spec.data.batch_size:
                    raise self.recipe.error(
                        ["data", "batch_size"],
                        f"{spec.data.batch_size} is more than the {num_train} training images",
                    )
            self._check_labels(source, info)
            trained = self._trained(info)
        self._raise_if_any()
        factory = ModelFactory(self.recipe, info, trained, device=torch.device("meta"))
        self._check_answers(factory, info, source)
        with self._problems_at():
            self.notes += factory.compare_checkpoints()
        self._raise_if_any()
        self._check_layers(factory)
        students, planned = self._networks_of(factory, info)
        # perhaps only because a network needs numbers to run: once more, with some
        if self.problems:
            self.problems = []
            factory = ModelFactory(
                self.recipe, info, trained, device=torch.device("cpu"), rehearsal=True
            )
            students, planned = self._networks_of(factory, info)
            if not self.problems:
                self.notes.append(
                    "a network does not run without numbers, so this was found out with random"
                    " weights on the processor"
                )
        self._raise_if_any()
        (student,) = students
        self._compare_meanings(factory, info)
        self._raise_if_any()
        batches = math.ceil(images_per_epoch(spec.data, num_train) / spec.data.batch_size)
        steps = math.ceil(batches / spec.train.accumulate)
        if any(self.recipe.plugins.losses[entry.use].needs_networks for entry in spec.losses):
            factory = ModelFactory(
                self.recipe, info, trained, device=torch.device("cpu"), rehearsal=True
            )
        self._check_caches(
            factory,
            info,
            num_train,
            {
                name: dict(model.taps)
                for name, model in zip(spec.all_teachers(), planned, strict=True)
            },
        )
        self._rehearsal = cache_plan.Rehearsal(self.recipe, factory)
        with self._problems_at("schedule"):
            stages = tuple(
                self._stage(stage, factory, info, num_train, steps)
                for stage in self._schedule().stages(factory)
            )
        self._check_trackers()
        self._check_training(num_train, text=is_text(info.image_shape))
        if not info.labelled:
            self._refuse_labels()
        self._refuse_unused()
        self._raise_if_any()
        self._note_what_stays()
        return Plan(spec.name, info, num_train, student, tuple(planned), stages, tuple(self.notes))

    def _compare_meanings(self, factory: ModelFactory, info: DataInfo) -> None:
        """Whether the networks take classes and tokens for what the data take them for; and what
        else there is to say of teachers.
        """
        spec = self.spec
        with self._problems_at("student"):
            begins = meaning_of(
                spec.student, factory.source(spec.student), factory.student().module
            )
            # classes it learns
            refuse_other_meaning(replace(begins, class_names=()), info, "student")
        for name, one in spec.all_teachers().items():
            self.notes += self._notes_on(name, one, factory)
            if isinstance(one, ModelOptions):
                with self._problems_at(*spec.place_of(name)):
                    self._compare(
                        meaning_of(one, factory.source(one), factory.teacher(name).module),
                        info,
                        name,
                        one,
                    )

    def _refuse_unused(self) -> None:
        """Say which losses no stage uses, where nothing else is wrong."""
        for i, name in enumerate(self.recipe.loss_names()):
            if name not in self._used and not self.problems:
                says = (
                    f"'{name}' is never used: no stage of schedule '{self.spec.schedule.use}' has a"
                    " teacher for it, or asks for it"
                )
                self.problems.append(self.recipe.problem(["losses", i], says))

    def _info(self, source: DatasetSource) -> DataInfo:
        """What is known of the dataset. What it lacks is fetched first, or it is taken down that
        training will.
        """
        if self.fetch:
            fetching.fetch(self.recipe, source, self.fetch)
            return source.info()
        if (lacking := source.lacks()) is None:
            return source.info()
        if lacking.folder is not None:
            fetching.refuse_elsewhere(self.recipe, lacking.folder)
        says = f"training first fetches {lacking}"
        self.notes.append(says)
        try:
            return source.info()
        except DataError as error:
            raise DataError(f"is not there yet, so nothing is known of it; {says}") from error

    @contextlib.contextmanager
    def _problems_at(self, *location: str | int) -> Iterator[None]:
        """Collect what goes wrong inside as problems of that place in the recipe."""
        try:
            yield
        except RecipeError as error:  # knows its place
            self.problems.append(f"{error}{self._hint(error)}")
        except (DataError, ModelError, TapError, ShapeError, RunError) as error:
            self.problems.append(
                self.recipe.problem(self._place(error, location), f"{error}{self._hint(error)}")
            )
        except Exception as error:
            if location != ("schedule",):
                raise
            # a plugin's own mistake, told with its place
            says = f"fails: {type(error).__name__}: {' '.join(str(error).split())}"
            self.problems.append(
                self.recipe.problem(location, f"schedule '{self.spec.schedule.use}' {says}")
            )

    def _hint(self, error: KdkitError) -> str:
        """What helps where something would have to be fetched."""
        return (
            "; a check fetches nothing, `kdkit train` does"
            if not self.fetch and fetching.wanted_to_fetch(error)
            else ""
        )

    def _raise_if_any(self) -> None:
        if self.problems:
            raise RecipeError("\n".join(dict.fromkeys(self.problems)))

    def _place(self, error: KdkitError, location: Sequence[str | int]) -> Sequence[str | int]:
        """Where the layer stands that a TapError names."""
        if isinstance(error, TapError):
            for i, entry in enumerate(self.spec.losses):
                if any(
                    f"'{name}'" in str(error)
                    for pair in entry.taps()
                    for name in (pair.student, pair.teacher)
                ):
                    return ["losses", i, "layers"]
        return location

    def _schedule(self) -> Schedule:
        return self.recipe.plugins.schedules[self.spec.schedule.use](self.spec.schedule)

    def _trained(self, info: DataInfo) -> dict[str, TrainedTeacher]:
        """The teachers of other recipes, whose own plans must be sound and whose classes must be
        ours.
        """
        found = {}
        for name, source in teacher_recipes(self.spec).items():
            with self._problems_at(*self.spec.place_of(name)):
                planned = make(source, self.fetch)
                theirs = planned.info.num_classes
                whose = f"the teacher of {source.source.path.name}"
                one = self.spec.all_teachers()[name]
                assert isinstance(one, TeacherOptions)
                if theirs != info.num_classes and one.classes is None:
                    says = (
                        f"{whose} knows {theirs} classes, this recipe's data has"
                        f" {info.num_classes}; `classes` says which of them they are"
                    )
                    raise ModelError(says)
                self._compare(
                    Meaning(planned.info.class_names, planned.info.tokenizer), info, whose, one
                )
                every = source.spec.run.snapshots
                kept = range(every, planned.stages[-1].epochs + 1, every) if every else ()
                found[name] = TrainedTeacher(
                    source.spec.student, None, dict.fromkeys(kept), num_classes=theirs
                )
        return found

    def _compare(self, theirs: Meaning, info: DataInfo, whose: str, teacher: object) -> None:
        """A teacher's classes and tokens with those of the data: another order is refused, other
        names are noted.
        """
        if (chosen := getattr(teacher, "classes", None)) is not None:
            numbers = (
                [chosen.get(name, -1) for name in info.class_names]
                if isinstance(chosen, Mapping)
                else chosen
            )
            known = dict(enumerate(theirs.class_names))
            theirs = replace(
                theirs, class_names=tuple(known[number] for number in numbers if number in known)
            )
        refuse_other_meaning(theirs, info, whose)
        if name := other_class_names(theirs, info):
            self.notes.append(
                f"{whose} has classes of other names ('{name}'); they are taken in their order"
            )

    def _notes_on(self, name: str, teacher: object, factory: ModelFactory) -> Iterator[str]:
        """What there is to know about a teacher."""
        reading = [
            entry.use
            for entry in factory.looking_at(name)
            if self.recipe.plugins.losses[entry.use].needs_networks
        ]
        if getattr(teacher, "fold_batchnorm", False) and reading:
            yield f"`fold_batchnorm` of {name} has no effect: {reading[0]} reads its layers"
        if getattr(teacher, "new_head", False):
            yield (
                f"the classifier of {name} is random (`new_head`): a `recipe` of its own would"
                " train it"
            )
        elif has_random_weights(teacher) and (which := factory.random_weights(name)):
            yield (
                f"{which} of {name} are random: give it a `checkpoint`, `pretrained: true` or a"
                " `recipe`"
            )

    def _check_labels(self, source: DatasetSource, info: DataInfo) -> None:
        """Read both parts where that is cheap: what is wrong with them is told before anything
        is trained.
        """
        parts: tuple[Literal["train", "test"], ...] = ("train", "test")
        for name in parts if source.split_at_check and source.lacks() is None else ():
            part = split(source, name, info)
            if not isinstance(part, Stream) and (info.labelled or name == "test"):
                class_indices(
                    part.labels, info.num_classes, f"dataset '{source.name}': {CALLED[name]} labels"
                )

    def _check_layers(self, factory: ModelFactory) -> None:
        for i, entry in enumerate(self.spec.losses):
            for j, pair in enumerate(entry.taps()):
                with self._problems_at("losses", i, "layers", j):
                    try:
                        factory.expand(
                            [pair],
                            entry.teacher,
                            self.recipe.plugins.losses[entry.use].knowledge == "labels",
                        )
                    except TapError as error:
                        raise self.recipe.error(["losses", i, "layers", j], str(error)) from None
        self._raise_if_any()

    def _check_answers(self, factory: ModelFactory, info: DataInfo, source: DatasetSource) -> None:
        """Whether teachers that are answers alone can teach what the recipe asks for."""
        is_here = source.split_at_check and source.lacks() is None
        is_stream = is_here and isinstance(split(source, "train", info), Stream)
        for name in self.spec.all_teachers():
            if not cache_plan.has_answers_alone(self.recipe, name):
                continue
            self.problems += cache_plan.refused_answers(self.recipe, factory, name)
            with self._problems_at(*self.spec.place_of(name), "model"):
                if is_stream:
                    raise DataError(cache_plan.STREAM)
                rows = cache_plan.read_answers(
                    self.recipe, name, info.num_train, factory.own_classes(name)
                )
                self.notes += cache_plan.notes_on_answers(self.recipe, name, rows)
        for place, model in models_in(
            {"student": self.spec.student, "schedule": self.spec.schedule}
        ):
            if isinstance(model, AnswersOptions):
                self.problems.append(
                    self.recipe.problem(
                        [*place, "model"], "has answers alone, and no network that could learn"
                    )
                )
        self._raise_if_any()

    def _check_caches(
        self,
        factory: ModelFactory,
        info: DataInfo,
        num_train: int,
        shapes: Mapping[str, cache_plan.Shapes],
    ) -> None:
        self.problems += cache_plan.refused(self.recipe, factory, info)
        self._raise_if_any()
        for note, problem in cache_plan.sizes(self.recipe, factory, info, num_train, shapes):
            self.notes.append(note)
            self.problems += [problem] if problem else []

    def _check_trackers(self) -> None:
        known = [tracker.value for tracker in LoggerType]
        installed = {"all", *map(str, get_available_trackers())}
        for i, name in enumerate(self.spec.run.trackers):
            if name not in known:
                self.problems.append(
                    self.recipe.problem(
                        ["run", "trackers", i], f"unknown '{name}'; {suggest(name, known)}"
                    )
                )
            elif name not in installed:
                says = f"'{name}' is not installed (`pip install {name}`)"
                self.problems.append(self.recipe.problem(["run", "trackers", i], says))

    def _check_training(self, num_train: int, *, text: bool) -> None:
        train, size = self.spec.train, self.spec.data.batch_size
        for key in ("average_best", "patience"):
            if getattr(train, key) and not self.spec.data.validation:
                says = "the epochs are chosen on validation data; set `data.validation`"
                self.problems.append(self.recipe.problem(["train", key], says))
        with self._problems_at("train", "device"):
            chosen(train.device)
        with self._problems_at("train", "optimizer"):
            build_optimizer(train, nn.Linear(PROBE, PROBE), nn.Identity())
        if train.mixup and text:
            self.problems.append(
                self.recipe.problem(["train", "mixup"], "mixes images, and the data are texts")
            )
        elif train.mixup and (size % 2 or (not self.spec.data.drop_last and num_train % size % 2)):
            says = (
                f"mixes pairs, so every batch must be even: batches of {size} of {num_train} images"
            )
            self.problems.append(self.recipe.problem(["train", "mixup"], says))

    def _refuse_labels(self) -> None:
        """Say which keys need labels of training images, where they have none."""
        asked = {
            "validation": self.spec.data.validation,
            "sampling": self.spec.data.sampling == "balanced",
        }
        places: list[list[str | int]] = [["data", key] for key, wanted in asked.items() if wanted]
        for place in places + ([["train", "mixup"]] if self.spec.train.mixup else []):
            self.problems.append(
                self.recipe.problem(
                    place, "needs the labels of training images, and they have none"
                )
            )

    def _student(self, factory: ModelFactory, info: DataInfo) -> ModelPlan:
        built = factory.student()
        if factory.inherited:
            count = len(built.module.state_dict())
            self.notes.append(
                f"the student begins with {len(factory.inherited)} of its {count} tensors from a"
                " teacher"
            )
        planned = self._model(
            f"student {self.spec.student.model}", built, info, factory.device, info.num_classes
        )
        self._count_outputs(
            built, random_inputs(info.image_shape, PROBE, factory.device), info.num_classes
        )
        return planned

    def _count_outputs(self, student: TappedModel, images: Inputs, classes: int) -> None:
        """See what the student gives while it is trained, where some networks give more than one
        tensor.
        """
        student.module.train()
        try:
            with torch.no_grad():
                outputs = student.outputs(images)
        except KdkitError:
            raise
        except Exception as error:  # whatever a network's own code raises
            raise ModelError(
                f"{student.role} does not run in training mode: {' '.join(str(error).split())}"
            ) from error
        finally:
            student.module.eval()
        if outputs[0].shape != (PROBE, classes):
            raise ModelError(
                f"{student.role} gives logits {tuple(outputs[0].shape)} for {PROBE} images in"
                f" training mode, for {classes} classes"
            )
        for i, entry in enumerate(self.spec.losses):
            if entry.output >= len(outputs):
                says = (
                    f"there is no such output: the student gives {len(outputs)} in training mode,"
                    " counted from 0"
                )
                raise self.recipe.error(["losses", i, "output"], says)
        if len(outputs) > 1:
            self.notes.append(
                f"the student gives {len(outputs)} outputs in training mode; losses read the first,"
                " but for those with an `output`"
            )

    def _networks_of(
        self, factory: ModelFactory, info: DataInfo
    ) -> tuple[list[ModelPlan], list[ModelPlan]]:
        """The student, and the teachers; those that cannot be built or run are problems."""
        students, planned = [], []
        with self._problems_at("student"):
            students.append(self._student(factory, info))
        for name, one in self.spec.all_teachers().items():
            with self._problems_at(*self.spec.place_of(name)):
                called = _teacher_name(one, factory.trained.get(name))
                self._refuse_predictions(name, factory)
                classes = info.num_classes if factory.has_classes(name) else None
                planned.append(
                    self._model(
                        f"{name} {called}", factory.teacher(name), info, factory.device, classes
                    )
                )
        return students, planned

    def _refuse_predictions(self, name: str, factory: ModelFactory) -> None:
        """See that no loss compares the predictions of a teacher that has not the data's
        classes.
        """
        if factory.has_classes(name):
            return
        own = factory.own_classes(name)
        what = (
            f"its {own} classes are not the data's: `classes` says which are"
            if own
            else "it has no classes"
        )
        for i, entry in enumerate(self.spec.losses):
            loss = self.recipe.plugins.losses[entry.use]
            if entry in factory.looking_at(name) and (
                loss.knowledge == "response" or loss.needs_teacher_logits
            ):
                self.problems.append(
                    self.recipe.problem(
                        ["losses", i],
                        f"'{entry.use}' compares predictions with those of {name}, and {what}",
                    )
                )

    def _model(
        self,
        role: str,
        model: TappedModel,
        info: DataInfo,
        device: torch.device,
        classes: int | None,
    ) -> ModelPlan:
        """Run a model; `classes` is how many it is to tell apart (None: it need not)."""
        images = random_inputs(info.image_shape, PROBE, device)
        everything = model.view(model.layers, needs_logits=classes is not None, answers=None)
        everything.module.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            try:
                outputs = everything(images)
            except KdkitError:
                raise
            except Exception as error:  # whatever a network's own code raises
                what = f"{kind_of(info.image_shape)} {info.image_shape}"
                raise ModelError(
                    f"{model.role} cannot take {what}: {' '.join(str(error).split())}"
                ) from error
        self._check_layout(model)
        if classes is not None and outputs.logits.shape != (PROBE, classes):
            says = (
                f"{model.role} gives logits {tuple(outputs.logits.shape)} for {PROBE} images; the"
                f" data has {classes} classes"
            )
            more = (
                " (`num_classes`, `classes` say what a teacher's answers are)"
                if model.frozen
                else ""
            )
            raise ModelError(says + more)
        taps = tuple((name, tuple(value.shape[1:])) for name, value in outputs.features.items())
        return ModelPlan(
            role,
            sum(p.numel() for p in model.module.parameters()),
            counter.get_total_flops() // 2 // PROBE,
            taps,
        )

    def _check_layout(self, model: TappedModel) -> None:
        """Whether channels-last is safe for a network where it is trained."""
        if self.spec.train.channels_last is not True or not trains_on_cpu(self.spec.train):
            return
        if (name := unsafe_convolution(model.module)) is not None:
            says = (
                f"on the CPU, the backward pass of '{name}' of {model.role} (1 x 1, strided, fewer"
                f" than {LEAST_CHANNELS} channels) corrupts memory where images are channels-last;"
                " say `auto` or `false`"
            )
            self.problems.append(self.recipe.problem(["train", "channels_last"], says))

    def _stage(
        self, stage: Stage, factory: ModelFactory, info: DataInfo, num_train: int, steps: int
    ) -> StagePlan:
        for student in stage.students:
            student.module.eval()
            self._check_layout(cast("TappedModel", student))
        classes = torch.arange(num_train) % info.num_classes
        if stage.parts is not None:
            stage.parts.to(factory.device)
        images = random_inputs(info.image_shape, PROBE)
        on_device = random_inputs(info.image_shape, PROBE, factory.device)
        shown = functools.partial(batch_of, on_device, info, stage.views)
        batch = self._rehearsal.noting(stage, shown)
        self._check_images(
            stage, classes if info.labelled else NO_LABELS, text=is_text(info.image_shape)
        )
        with torch.no_grad():
            lessons = stage.step(batch(PROBE))
        last = len(stage.students) - 1
        objectives = [
            build(self.recipe, stage.losses, factory.expand, layers=i <= last)
            for i in range(len(lessons))
        ]
        self._check_stage(stage, lessons, objectives)
        objective, network = objectives[0], stage.students[0].module
        self._networks = factory.teacher_modules()
        context = Context(
            network,
            factory.teaching(stage),
            info.num_classes,
            num_train,
            classes if info.labelled else NO_LABELS,
        )
        index = torch.arange(PROBE)
        with seeded("plan"):
            known, random = (
                Batch(images, labels_of(index, info), index % num_train),
                factory.device.type == "meta",
            )
            tried = [on_random_numbers(lesson, info) if random else lesson for lesson in lessons]
            left = self._try_losses(objective, tried[0], known, context)
            cast("TappedModel", stage.students[0]).settle(left)
            for i, (other, lesson) in enumerate(zip(objectives, tried, strict=True)):
                # a peer of another architecture, or no student's
                if shapes_of(lesson) != shapes_of(tried[0]):
                    whose = replace(
                        context,
                        student=stage.students[min(i, last)].module,
                        teacher=factory.teaching(stage, min(i, last)),
                    )
                    self._try_losses(other, lesson, known, whose)
        frozen: list[nn.Parameter] = []
        if stage.train is not None and not self.problems:
            frozen = freeze_all_but(stage.train, network, objective.parts())
            for parameter in frozen:
                parameter.requires_grad_(True)
        if not self.problems:
            with torch.enable_grad():
                answered = stage.step(batch(PROBE))[0]
            self._note_what_learns(stage, objective, answered, tried[0], known, frozen)
        epochs = stage.epochs or self.spec.train.epochs
        if shortened := self.spec.train.lr_schedule.shortened(stage.name, epochs):
            self.notes.append(shortened)
        active = objective.active(lessons[0])
        self._used.update(active)
        entries = {name: objective.entries[name] for name in active}
        cost = step_cost(stage, factory.models(), batch, PROBE)
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
        """Whether its names, numbers and wishes fit the recipe."""
        names, called = self.recipe.loss_names(), f"stage '{stage.name}'"
        if unknown := set(stage.losses or ()) - set(names):
            raise self.recipe.error(
                ["schedule"],
                f"{called} asks for losses that are not there: {suggest(unknown.pop(), names)}",
            )
        if len(lessons) < len(stage.students):
            raise self.recipe.error(
                ["schedule"],
                f"{called} gives {len(lessons)} lessons for {len(stage.students)} students",
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
        """Whether the students can learn from a batch of one, where the recipe gives them one."""
        size, drop_last = self.spec.data.batch_size, self.spec.data.drop_last
        if size > 1 and (drop_last or num_train % size != 1):
            return
        for student in stage.students:
            student.module.train()
        try:
            stage.step(batch(1))
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
            self.problems.append(self.recipe.problem(place, says))
        finally:
            for student in stage.students:
                student.module.eval()

    def _check_images(self, stage: Stage, labels: torch.Tensor, *, text: bool) -> None:
        """Whether the recipe can give the stage its views, and its images in the order that it
        wants.
        """
        mixed, size = self.spec.train.mixup is not None, self.spec.data.batch_size
        if stage.views > 1 and text:
            raise self.recipe.error(
                ["schedule"], f"stage '{stage.name}' compares views of images, and texts have one"
            )
        if stage.views > 1 and mixed:
            raise self.recipe.error(
                ["train", "mixup"],
                f"stage '{stage.name}' compares views of single images; leave mixup out",
            )
        if stage.arrange is not None and mixed:
            raise self.recipe.error(
                ["train", "mixup"],
                f"stage '{stage.name}' chooses which images come together; leave mixup out",
            )
        if stage.arrange is not None and (key := self.spec.data.repeating):
            raise self.recipe.error(
                ["data", key],
                f"stage '{stage.name}' chooses which images come together; leave {key} out",
            )
        if stage.arrange is not None:
            if labels is NO_LABELS:
                raise self.recipe.error(
                    ["schedule"],
                    f"stage '{stage.name}' brings images together by their labels, and they have"
                    " none",
                )
            used = len(labels) - (len(labels) % size if self.spec.data.drop_last else 0)
            stage.arrange(torch.arange(used), labels[:used], size)  # which may refuse their numbers

    def _note_what_learns(
        self,
        stage: Stage,
        objective: Objective,
        answered: Lesson,
        tried: Lesson,
        batch: Batch,
        frozen: Sequence[nn.Parameter],
    ) -> None:
        """Find the part of the student that no loss of this stage, nor of one before it,
        reaches.
        """
        weighed = {
            name: loss
            for name, loss in objective.active(tried).items()
            if objective.entries[name].weight != 0
        }
        if not weighed:
            self.notes.append(f"stage '{stage.name}' learns nothing: all its losses have weight 0")
        counting = Objective(
            {name: (objective.entries[name], loss) for name, loss in weighed.items()}
        )
        found = reached(counting, answered, tried, batch) - {id(parameter) for parameter in frozen}
        network = stage.students[0].module
        learning = {id(p) for p in network.parameters() if p.requires_grad}
        self._still[network] = self._still.pop(network, learning) - found

    def _note_what_stays(self) -> None:
        """Tell which part of the last stage's student no loss of any stage reaches."""
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
        self.notes.append(
            f"no loss reaches {what} ({count:,} parameters): what is there stays as it began"
        )

    def _try_losses(
        self, objective: Objective, lesson: Lesson, batch: Batch, context: Context
    ) -> nn.Module:
        """Set up and evaluate each loss on random numbers of the real shapes; gives the network
        that they leave.
        """
        network = context.student
        for name, loss in objective.active(lesson).items():
            place: list[str | int] = ["losses", self.recipe.loss_names().index(name)]
            alone = Objective({name: (objective.entries[name], loss)})
            try:
                alone.setup(lesson, context, self._networks)
                value = alone(lesson, batch).terms[name]
                if value.shape != ():
                    raise ShapeError(f"{name} gives a tensor {tuple(value.shape)}, not a scalar")
                network = alone.deploy(network)
            except ShapeError as error:
                any_batch = re.sub(rf"\({PROBE},(?=[ )])", "(B,", str(error))
                self.problems.append(self.recipe.problem(place, any_batch))
            except KdkitError as error:
                self.problems.append(self.recipe.problem(place, str(error)))
            except Exception as error:  # a plugin's own mistake, told with its place
                self.problems.append(
                    self.recipe.problem(
                        place,
                        f"fails on the models' shapes: {type(error).__name__}:"
                        f" {' '.join(str(error).split())}",
                    )
                )
        return network


def _teacher_name(options: object, trained: TrainedTeacher | None) -> str:
    return (
        trained.options.model
        if trained
        else options.model
        if isinstance(options, ModelOptions)
        else ""
    )


def has_random_weights(options: object) -> bool:
    """Whether nothing says what a model's first weights, or those of its classifier, are: then
    they follow from the seed.
    """
    if isinstance(options, AnswersOptions):
        return False
    told = isinstance(options, ModelOptions) and (
        options.checkpoint or getattr(options, "pretrained", False)
    )
    return isinstance(options, ModelOptions) and (options.new_head or not told)
