"""Builds the recipe's models, observed where its losses look."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn

from kdkit.cache.given import has_answers_alone
from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.layers import expand_pairs
from kdkit.contracts.loss import Loss
from kdkit.contracts.loss_options import LayerPair
from kdkit.contracts.model_source import (
    FIRST_WEIGHTS,
    ModelOptions,
    ModelSource,
    RecipeTeacher,
    StudentOptions,
    TeacherOptions,
)
from kdkit.contracts.schedule import Model, Stage
from kdkit.errors import CheckpointError, ModelError, RecipeError, RunError, TapError, suggest
from kdkit.models.build import build_model, compare_checkpoint, random_weights
from kdkit.models.devices import is_channels_last
from kdkit.models.folding import fold_batchnorm, unfoldable
from kdkit.models.given_answers import Reading
from kdkit.models.inheritance import inherit
from kdkit.models.tapped import TappedModel
from kdkit.randomness import seeded
from kdkit.recipe import Recipe, code_in, content_of, models_in
from kdkit.recipe.sections import LossEntry
from kdkit.recipe.types import source_of
from kdkit.runs.folder import Result, RunFolder
from kdkit.runs.shared import Alone, Demand, Shared

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainedTeacher:
    """The student of another recipe: what it is, the file of its weights, and those of its
    snapshots by epoch (None: not trained yet).

    `top1` is its accuracy on its own test data, in percent. `run` is the one that trained it.
    `num_classes` counts the classes of its data.
    """

    options: ModelOptions
    file: Path | None
    snapshots: Mapping[int, Path | None] = field(default_factory=dict)
    top1: float | None = None
    run: RunFolder | None = None
    num_classes: int | None = None

    @classmethod
    def of(cls, run: RunFolder, recipe: Recipe, result: Result | None) -> Self:
        """What a run has trained."""
        network, top1 = (result.network, result.test.get("top1")) if result else (None, None)
        return cls(
            options_of(recipe, network),
            run.student_file,
            run.snapshots(),
            top1,
            run,
            run.info().num_classes,
        )

    def checked(self, file: Path | None) -> Path | None:
        """One of its files, compared with the digest that the run recorded.

        Raises:
            RunError: it is damaged.
        """
        if file is not None and self.run is not None:
            self.run.refuse_damaged(file)
        return file


class ModelFactory:
    """Hands out the recipe's models, as `kdkit.Models` promises to schedules.

    Each student's initial weights depend on (seed, its number) alone.

    Args:
        recipe: whose models.
        info: image shape and class count.
        trained: teachers by name, where other recipes train them.
        device: where they live; on the meta device they have shapes, but no weights.
        rehearsal: weights are random and nothing is read, downloaded or folded: only shapes and
            structure count.
        shared: where frozen teachers come from (default: built for this run alone).
    """

    def __init__(
        self,
        recipe: Recipe,
        info: DataInfo,
        trained: Mapping[str, TrainedTeacher],
        *,
        device: torch.device,
        rehearsal: bool = False,
        shared: Shared | None = None,
    ) -> None:
        self.recipe = recipe
        self.info = info
        self.trained = trained
        self.device = device
        self.rehearsal = rehearsal
        # of what must not change
        self._digests: weakref.WeakKeyDictionary[TappedModel, str] = weakref.WeakKeyDictionary()
        self._students: list[weakref.ref[TappedModel]] = []
        # that are not the recipe's `student`
        self._networks: weakref.WeakKeyDictionary[Model, ModelOptions] = weakref.WeakKeyDictionary()
        self._teachers: dict[str, TappedModel] = {}
        self._past: list[weakref.ref[TappedModel]] = []  # teachers as they were
        self._skeletons: dict[str, nn.Module] = {}
        self.inherited: list[str] = []  # tensors that the last student has of a teacher
        self._shared = shared or Alone()

    def demands(self) -> Iterator[Demand]:
        """What the losses read of each teacher."""
        for number, name in enumerate(self.recipe.spec.all_teachers()):
            yield Demand(
                self._sort_of_teacher(name, number),
                self.teacher_layers(name),
                self._needs_logits(name),
            )

    def student_layers(self) -> list[str]:
        """Layers that the losses read of a student: those of teachers too, where students teach."""
        schedule, names = self.recipe.plugins.schedules[self.recipe.spec.schedule.use], []
        for entry in self.recipe.spec.losses:
            teaches = schedule.students_teach or not self.recipe.spec.all_teachers()
            own = self.recipe.plugins.losses[entry.use].knowledge == "labels"
            for pair in self.expand(entry.taps(), entry.teacher, own):
                names += [pair.student, pair.teacher] if teaches or own else [pair.student]
            names += [f"output{entry.output}"] if entry.output else []
        return list(dict.fromkeys(names))

    def teacher_layers(self, name: str) -> list[str]:
        """Layers that the losses read of a teacher."""
        entries = [
            entry
            for entry in self.looking_at(name)
            if self.recipe.plugins.losses[entry.use].knowledge != "labels"
        ]
        return list(
            dict.fromkeys(
                pair.teacher for entry in entries for pair in self.expand(entry.taps(), name)
            )
        )

    def expand(
        self, pairs: Sequence[LayerPair], teacher: str | None = None, own: bool = False
    ) -> list[LayerPair]:
        """The pairs with globs written out, for the teacher of that name (default: the first),
        or both sides for the student's own.

        Raises:
            TapError: a layer that is not there.
        """
        if not pairs:
            return []
        teachers = self.recipe.spec.all_teachers()
        student = self._skeleton("student", self.recipe.spec.student)
        name = teacher or next(iter(teachers), None)
        options = self._teacher_options(name) if name else None
        return expand_pairs(
            pairs,
            student,
            self._skeleton(name, options) if name and options and not own else student,
        )

    def student(self, options: ModelOptions | None = None, taps: Sequence[str] = ()) -> TappedModel:
        """A fresh student: the recipe's, or one of the schedule's own options; `taps` are layers
        beside those of the losses.
        """
        layers = list(dict.fromkeys([*self.student_layers(), *taps]))
        model = self._build(
            "student", options or self.recipe.spec.student, layers, len(self._students) + 1
        )
        self._students.append(weakref.ref(model))
        self._inherit(model, options or self.recipe.spec.student)
        if options is not None:
            self._networks[model] = options
        return model.compile() if self._compiles else model

    def network(self, student: Model) -> dict[str, Any] | None:
        """What a student's network is built from, weights aside, in plain values; None: the
        recipe's `student`.
        """
        options = self._networks.get(student)
        return (
            None if options is None else options.model_dump(mode="json", exclude=set(FIRST_WEIGHTS))
        )

    def _inherit(self, student: TappedModel, options: ModelOptions) -> None:
        """Give a student what it is to have of a teacher, whose weights are read anew: those
        that answer may be folded by now.
        """
        wanted = options.init if isinstance(options, StudentOptions) else None
        if wanted is None:
            return
        names = list(self.recipe.spec.all_teachers())
        known = self._teacher_options(wanted.from_)
        assert known is not None
        donor, source = (
            self._build(wanted.from_, known, (), names.index(wanted.from_)),
            self.source(options),
        )
        try:
            self.inherited = inherit(
                student.module,
                donor.module,
                wanted.layers,
                functools.partial(source.rename, module=student.module),
            )
        except ModelError as error:
            place = next(
                (
                    where
                    for where, model in models_in({"schedule": self.recipe.spec.schedule})
                    if model is options
                ),
                ["student"],
            )
            raise self.recipe.error([*place, "init"], str(error)) from error

    def models(self) -> list[TappedModel]:
        """All that were handed out and are still in use."""
        return [
            *self._teachers.values(),
            *filter(None, (model() for model in (*self._students, *self._past))),
        ]

    def teacher(self, name: str | None = None, epoch: int | None = None) -> TappedModel:
        """The frozen teacher of that name, or the only one; it stops behind its deepest tap if
        no loss reads its logits.

        Args:
            name: what the recipe calls it.
            epoch: as it was after that epoch of its own training (None: trained to the end).

        Raises:
            RunError: there is none, or there are several; it has no snapshot of that epoch.
        """
        names = list(self.recipe.spec.all_teachers())
        if name is None and len(names) != 1:
            raise RunError(f"this schedule takes one teacher, the recipe has {len(names)}")
        chosen = name or names[0]
        if epoch is not None:
            model = self._build_teacher(chosen, names.index(chosen), self._snapshot(chosen, epoch))
            self._past.append(weakref.ref(model))
            return model
        if chosen not in self._teachers:
            self._teachers[chosen] = self._build_teacher(chosen, names.index(chosen))
        return self._teachers[chosen]

    def teachers(self) -> dict[str, TappedModel]:
        """All frozen teachers by name."""
        return {name: self.teacher(name) for name in self.recipe.spec.all_teachers()}

    def whole_teachers(self, *, answering: bool = False) -> list[TappedModel]:
        """The frozen teachers without taps, for measuring, but for those without a network;
        `answering`: that have the data's classes.
        """
        asked = {
            name: teacher
            for name, teacher in self.teachers().items()
            if not has_answers_alone(self.recipe, name)
        }
        return [
            teacher.twin()
            for name, teacher in asked.items()
            if not answering or self.has_classes(name)
        ]

    def own_classes(self, name: str) -> int:
        """How many classes a teacher's network has; 0: it has none."""
        spec = self.recipe.spec.all_teachers()[name]
        said = getattr(spec, "num_classes", None)
        if said is None and isinstance(spec, RecipeTeacher) and name in self.trained:
            said = self.trained[name].num_classes
        return self.info.num_classes if said is None else said

    def chosen_classes(self, name: str) -> list[int] | None:
        """Which of a teacher's classes are those of the data, in the data's order; None: all, as
        they are.

        Raises:
            RecipeError: they are not one of its classes for each of the data's.
        """
        spec = self.recipe.spec.all_teachers()[name]
        chosen = getattr(spec, "classes", None)
        if chosen is None:
            return None
        place = [*self.recipe.spec.place_of(name), "classes"]
        own = self.own_classes(name)
        names = self.info.class_names
        if isinstance(chosen, dict):
            if not names:
                raise self.recipe.error(
                    place, "the data's classes have no names; give a list of numbers"
                )
            if other := set(chosen) ^ set(names):
                raise self.recipe.error(
                    place,
                    f"a number for each class of the data, please: {suggest(other.pop(), names)}",
                )
            chosen = [chosen[one] for one in names]
        if len(chosen) != self.info.num_classes or len(set(chosen)) < len(chosen):
            says = (
                f"{len(set(chosen))} different classes are named, and the data has"
                f" {self.info.num_classes}"
            )
            raise self.recipe.error(place, says)
        if max(chosen) >= own:
            raise self.recipe.error(
                place,
                f"class {max(chosen)} of a network of {own}, counted from 0; see `num_classes`",
            )
        return list(chosen)

    def has_classes(self, name: str) -> bool:
        """Whether a teacher's answers are about the data's classes."""
        return (
            self.chosen_classes(name) is not None or self.own_classes(name) == self.info.num_classes
        )

    def teacher_modules(self) -> dict[str, nn.Module]:
        """The teachers' networks by name."""
        return {name: teacher.module for name, teacher in self.teachers().items()}

    def teaching(self, stage: Stage, number: int = 0) -> nn.Module | None:
        """The network that losses of a stage's student may look into: the stage's own, or the
        recipe's first teacher.
        """
        return (
            stage.teachers[number].module
            if stage.teachers
            else next(iter(self.teacher_modules().values()), None)
        )

    def watch(self, but: Sequence[Model] = ()) -> None:
        """Record digests of the students that are frozen by now; `verify_frozen` raises if one
        changes.

        Not those that a stage changes itself (`but`).
        """
        for model in filter(None, (student() for student in self._students)):
            if model.frozen and model not in self._digests:
                self._digests[model] = _digest(model.module)
        for changing in but:
            self._digests.pop(cast("TappedModel", changing), None)

    def verify_frozen(self) -> None:
        """Compare every frozen model with what it was.

        Raises:
            RunError: a parameter or buffer of it has changed.
        """
        for model, before in self._digests.items():
            if _digest(model.module) != before:
                raise RunError(
                    f"{model.role} is frozen, yet its parameters or buffers have changed; a plugin"
                    " or schedule must have done it"
                )

    def verify_finite(self) -> None:
        """See that what frozen models have said so far is finite.

        Raises:
            RunError: an answer was not; names the model.
        """
        for model in self.models():
            model.finite.verify()

    def looking_at(self, name: str) -> list[LossEntry]:
        """The losses that look at a teacher."""
        return [entry for entry in self.recipe.spec.losses if entry.teacher in (None, name)]

    def _snapshot(self, name: str, epoch: int) -> Path | None:
        """The file of a teacher's weights after an epoch of its training.

        Raises:
            RunError: there is none.
        """
        spec = self.recipe.spec.all_teachers()[name]
        if not isinstance(spec, RecipeTeacher):
            raise RunError(
                f"{name} has no snapshots of its training, which only a teacher of another recipe"
                " has; name it by `recipe:`"
            )
        there, whose = self.trained[name].snapshots, f"the run of {name} ({spec.recipe.name})"
        if not there:
            raise RunError(
                f"{whose} keeps no snapshots; set `run.snapshots: N` in {spec.recipe.name}, and"
                " train it again if it is trained"
            )
        if epoch not in there:
            raise RunError(
                f"{whose} has no snapshot of epoch {epoch}, only of {', '.join(map(str, there))};"
                " see its `run.snapshots`"
            )
        return there[epoch]

    def _build_teacher(self, name: str, number: int, file: Path | None = None) -> TappedModel:
        def build(layers: Sequence[str], needs_logits: bool) -> TappedModel:
            return self._frozen_teacher(name, number, file, layers, needs_logits)

        layers, needs_logits = self.teacher_layers(name), self._needs_logits(name)
        key = functools.partial(self._sort_of_teacher, name, number)
        model = self._shared.teacher(key, str(file), layers, needs_logits=needs_logits, build=build)
        if self._real:
            self._digests[model] = _digest(model.module)
        return model

    def _frozen_teacher(
        self, name: str, number: int, file: Path | None, layers: Sequence[str], needs_logits: bool
    ) -> TappedModel:
        spec, options = self.recipe.spec.all_teachers()[name], self._teacher_options(name)
        assert options is not None and isinstance(spec, TeacherOptions)
        model = self._build(name, options, layers, number, file)
        if (chosen := self.chosen_classes(name)) is not None or spec.answers != "logits":
            model.module.register_forward_hook(Reading(spec.answers, chosen))
        model.needs_logits = needs_logits
        model.precision = PRECISIONS[spec.precision] if spec.precision else None
        model.freeze(spec.mode)
        if self._real and self._folds(name):
            # the comparison is finer than TF32
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                model = fold_batchnorm(model, self.info.image_shape, in_place=True)
        return model.compile() if self._compiles else model

    def _looking_losses(self, name: str) -> list[type[Loss]]:
        return [self.recipe.plugins.losses[entry.use] for entry in self.looking_at(name)]

    def _needs_logits(self, name: str) -> bool:
        # which a schedule may weigh by their logits
        several = len(self.recipe.spec.all_teachers()) > 1
        if not self.has_classes(name):
            return False
        return several or any(
            loss.knowledge == "response" or loss.needs_teacher_logits
            for loss in self._looking_losses(name)
        )

    def _folds(self, name: str) -> bool:
        wanted = getattr(self.recipe.spec.all_teachers()[name], "fold_batchnorm", False)
        return wanted and not any(loss.needs_networks for loss in self._looking_losses(name))

    def _sort_of_teacher(self, name: str, number: int) -> str:
        """Key of a teacher's outputs, down to their rounding; leaves out the file of its weights
        and its taps.
        """
        spec, layers = self.recipe.spec.all_teachers()[name], self.teacher_layers(name)
        options = self._teacher_options(name)
        assert options is not None
        folded = (
            [unfoldable(self._skeleton(name, options), layers, self.info.num_classes)]
            if self._folds(name)
            else []
        )
        # other code for other taps
        compiled = [sorted(layers), self._needs_logits(name)] if self._compiles else []
        source = type(self.source(options))  # plugins may give other networks under one name
        made_by = source.__module__, source.__qualname__
        return json.dumps(
            [content_of(spec), made_by, number, folded, compiled, self._channels_last],
            sort_keys=True,
            default=str,
        )

    @property
    def _channels_last(self) -> bool:
        return self._real and is_channels_last(self.recipe.spec.train, self.device)

    @property
    def _compiles(self) -> bool:
        return self.recipe.spec.train.compile and self._real

    @property
    def _real(self) -> bool:
        return self.device.type != "meta" and not self.rehearsal

    def _teacher_options(self, name: str) -> ModelOptions | None:
        options = self.recipe.spec.all_teachers()[name]
        if isinstance(options, RecipeTeacher):
            return self.trained[name].options if name in self.trained else None
        return options

    def compare_checkpoints(self) -> list[str]:
        """See whether the checkpoints that the recipe names fit their networks, by names and
        shapes; what there is to know about them.

        Raises:
            RecipeError: some do not, a line each.
        """
        spec = self.recipe.spec
        problems = []
        notes = []
        sections = {
            "teacher": spec.teacher,
            "teachers": spec.teachers,
            "student": spec.student,
            "schedule": spec.schedule,
        }
        for place, options in models_in(sections):
            if options.checkpoint is None:
                continue
            source, shape = self.source(options), self.info.image_shape
            try:
                classes = (
                    said
                    if (said := getattr(options, "num_classes", None)) is not None
                    else self.info.num_classes
                )
                built = build_model(options, source, classes, shape, weights=False)
                told = compare_checkpoint(options, source, built.module, classes)
            except ModelError as error:
                key = "checkpoint" if isinstance(error, CheckpointError) else "model"
                problems.append(
                    self.recipe.problem([*place, key], str(error).removeprefix("model: "))
                )
            else:
                notes += [f"{options.checkpoint.name}: {note}" for note in told]
        if problems:
            raise RecipeError("\n".join(problems))
        return notes

    def random_weights(self, name: str) -> str:
        """Which weights of a teacher are random by what its network is built from, in words;
        none if it reads its own.
        """
        options = self._teacher_options(name)
        assert options is not None
        source = self.source(options)
        if type(source).load is not ModelSource.load:  # it has weights, which were not asked for
            return "the weights"
        drawn, read = random_weights(source, self.own_classes(name), self.info.image_shape)
        return (
            f"some weights ({', '.join(drawn[:3])})"
            if drawn and read
            else "the weights"
            if drawn
            else ""
        )

    def _classes(self, section: str) -> int:
        return (
            self.own_classes(section)
            if section in self.recipe.spec.all_teachers()
            else self.info.num_classes
        )

    def _skeleton(self, section: str, options: ModelOptions) -> nn.Module:
        if section not in self._skeletons:
            try:
                source = self.source(options)
                built = build_model(
                    options,
                    source,
                    self._classes(section),
                    self.info.image_shape,
                    role=section,
                    weights=False,
                )
            except ModelError as error:
                raise self._error(section, error) from error
            self._skeletons[section] = built.module
        return self._skeletons[section]

    def _error(
        self, section: str, error: Exception, options: ModelOptions | None = None
    ) -> RecipeError:
        place = ["student"] if section == "student" else self.recipe.spec.place_of(section)
        place = next(
            (
                where
                for where, model in models_in({"schedule": self.recipe.spec.schedule})
                if model is options
            ),
            place,
        )
        key = (
            "recipe"
            if section in self.trained
            else "checkpoint"
            if isinstance(error, CheckpointError)
            else "model"
        )
        return self.recipe.error([*place, key], str(error).removeprefix(f"{section}: "))

    def source(self, options: ModelOptions) -> ModelSource:
        sources = self.recipe.plugins.models
        name, model_name = source_of(options.model, sources)
        return sources[name](options, model_name)

    def _build(
        self,
        section: str,
        options: ModelOptions,
        layers: Sequence[str],
        number: int,
        file: Path | None = None,
    ) -> TappedModel:
        spec = self.recipe.spec
        if section in self.trained and not self.rehearsal:
            trained = self.trained[section]
            file = trained.checked(file or trained.file)
        try:
            with seeded(spec.seed, "student" if section == "student" else "teacher", number):
                model = build_model(
                    options,
                    self.source(options),
                    self._classes(section),
                    self.info.image_shape,
                    layers,
                    section,
                    weights=self.device.type != "meta",
                    load=not self.rehearsal,
                    file=file,
                    channels_last=self._channels_last,
                )
        except (ModelError, TapError) as error:
            raise self._error(section, error, options) from error
        if self.device.type != "meta":  # where it was built, as far as it can be there
            model.module.to(self.device)
            model.adapt.to(self.device)
        return model


def options_of(recipe: Recipe, network: Mapping[str, Any] | None) -> ModelOptions:
    """The options of a network that `ModelFactory.network` took down; None: the recipe's
    `student`.
    """
    if network is None:
        return recipe.spec.student
    source, _ = source_of(network["model"], recipe.plugins.models)
    options = recipe.plugins.models[source].Options(**network)
    if strange := {path for _, path in code_in(options)} - set(recipe.code()):
        raise RunError(
            f"the run of {recipe.source.path} says that its network is made by {min(strange)},"
            " which its recipe does not name"
        )
    return options


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    # state_dict leaves some buffers out
    for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
