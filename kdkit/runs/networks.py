"""Builds the recipe's models, with taps on the layers that its losses read."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdkit.cache import served, surveys
from kdkit.cache.given import has_answers_alone
from kdkit.contracts.compression import Compression
from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.layers import expand_pairs
from kdkit.contracts.loss_options import LayerPair
from kdkit.contracts.model_source import (
    FIRST_WEIGHTS,
    ModelOptions,
    RecipeTeacher,
    StudentOptions,
    TeacherOptions,
)
from kdkit.contracts.schedule import Model, Stage
from kdkit.contracts.survey import Survey
from kdkit.data.loaders import Data
from kdkit.errors import (
    ModelError,
    RunError,
    TapError,
)
from kdkit.models.build import build_model
from kdkit.models.devices import is_channels_last
from kdkit.models.folding import fold_batchnorm, unfoldable
from kdkit.models.given_answers import Reading
from kdkit.models.seen import refuse_other_places
from kdkit.models.tapped import TappedModel
from kdkit.randomness import seeded
from kdkit.recipe import Recipe, content_of
from kdkit.runs import beginnings, wanted
from kdkit.runs.frozen import FrozenModels
from kdkit.runs.meaning import TeacherClasses
from kdkit.runs.shared import Alone, Demand, Shared
from kdkit.runs.skeletons import Skeletons
from kdkit.runs.trained_teachers import TrainedTeacher, snapshot_of

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ModelFactory:
    """Provides the recipe's models, the implementation of `kdkit.Models` for schedules.

    Each student's initial weights depend on (seed, its number) alone.

    Args:
        recipe: names the models.
        info: image shape and class count.
        trained: teachers by name, where other recipes train them.
        device: device of the models; on the meta device they have shapes, but no weights.
        rehearsal: weights are random and nothing is read, downloaded or folded: only shapes and
            structure count.
        shared: provides frozen teachers (default: built for this run alone).
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
        self.task = recipe.task
        self.info = info
        self.trained = trained
        self.classes = TeacherClasses(recipe, info, trained)
        self.device = device
        self.rehearsal = rehearsal
        self._frozen = FrozenModels()
        # weak: students of finished stages free their memory
        self._students: list[weakref.ref[TappedModel]] = []
        # options of students other than the recipe's `student`
        self._networks: weakref.WeakKeyDictionary[Model, ModelOptions] = weakref.WeakKeyDictionary()
        self._teachers: dict[str, TappedModel] = {}
        self._past: list[weakref.ref[TappedModel]] = []  # teachers at an earlier epoch
        self._skeleton = Skeletons(recipe, info, trained, self._classes)
        self.inherited: list[str] = []  # tensors that the last student has inherited from a teacher
        self.inheriting = 0  # number of its tensors then
        self._shared = shared or Alone()

    def demands(self) -> Iterator[Demand]:
        """Yield what the losses read of each teacher."""
        for number, name in enumerate(self.recipe.spec.all_teachers()):
            yield Demand(
                self._sort_of_teacher(name, number),
                self.teacher_layers(name),
                self._needs_logits(name),
            )

    def teacher_layers(self, name: str) -> list[str]:
        """List the layers that the losses read of a teacher."""
        return wanted.teacher_layers(self.recipe, name, self.expand)

    def expand(
        self, pairs: Sequence[LayerPair], teacher: str | None = None, own: bool = False
    ) -> list[LayerPair]:
        """Return the pairs with globs expanded, for the teacher of that name (default: the first),
        or with both sides in the student itself.

        Raises:
            TapError: a layer does not exist.
        """
        # Without pairs no skeleton is built, which losses on responses do not need.
        if not pairs:
            return []
        teachers = self.recipe.spec.all_teachers()
        student = self._skeleton("student", self.recipe.spec.student)
        # A loss without `teacher:` reads every teacher; its layers are named as in the first one.
        name = teacher or next(iter(teachers), None)
        options = self.teacher_options(name) if name else None
        return expand_pairs(
            pairs,
            student,
            self._skeleton(name, options) if name and options and not own else student,
        )

    def student(self, options: ModelOptions | None = None, taps: Sequence[str] = ()) -> TappedModel:
        """Build a fresh student: the recipe's, or one of the schedule's own options; `taps` are
        layers in addition to those of the losses.
        """
        layers = list(dict.fromkeys([*wanted.student_layers(self.recipe, self.expand), *taps]))
        model = self._build(
            "student", options or self.recipe.spec.student, layers, len(self._students) + 1
        )
        self._inherit(model, options or self.recipe.spec.student)
        beginnings.compress(
            self.recipe,
            model,
            options or self.recipe.spec.student,
            self.device,
            channels_last=self._channels_last,
        )
        self._students.append(weakref.ref(model))
        if options is not None:
            self._networks[model] = options
        return model.compile() if self._compiles else model

    def compressions(self, student: Model) -> list[Compression]:
        """Return the compressions of a student."""
        return self.recipe.compressions(self._networks.get(student, self.recipe.spec.student))

    def network(self, student: Model) -> dict[str, Any] | None:
        """Return the options that a student's network is built from, without weights, in plain
        values; None: the recipe's `student`.
        """
        options = self._networks.get(student)
        return (
            None if options is None else options.model_dump(mode="json", exclude=set(FIRST_WEIGHTS))
        )

    def _inherit(self, student: TappedModel, options: ModelOptions) -> None:
        """Copy a teacher's tensors into a student; the teacher's weights are read again, because
        the teachers in use may be folded.
        """
        begins = options.init if isinstance(options, StudentOptions) else None
        if begins is None:
            return
        number = list(self.recipe.spec.all_teachers()).index(begins.from_)
        known = self.teacher_options(begins.from_)
        assert known is not None
        donor = self._build(begins.from_, known, (), number)
        self.inheriting = len(student.module.state_dict())
        self.inherited = beginnings.inherited(self.recipe, student, options, donor, begins.layers)

    def models(self) -> list[TappedModel]:
        """List all models that were provided and are still in use."""
        return [
            *self._teachers.values(),
            *filter(None, (model() for model in (*self._students, *self._past))),
        ]

    def teacher(self, name: str | None = None, epoch: int | None = None) -> TappedModel:
        """Return the frozen teacher of that name, or the only one; its forward stops after its
        deepest tap if no loss reads its logits.

        Args:
            name: its name in the recipe.
            epoch: weights after that epoch of its own training (None: fully trained).

        Raises:
            RunError: there is none, or there are several; it has no snapshot of that epoch.
        """
        names = list(self.recipe.spec.all_teachers())
        if name is None and len(names) != 1:
            raise RunError(f"this schedule takes one teacher, the recipe has {len(names)}")
        chosen = name or names[0]
        # A snapshot is not kept in `_teachers`: the route's anchors would all stay in memory.
        if epoch is not None:
            file = snapshot_of(self.recipe, self.trained, chosen, epoch)
            model = self._build_teacher(chosen, names.index(chosen), file)
            # Weak: a schedule that follows a route holds one anchor at a time.
            self._past.append(weakref.ref(model))
            return model
        if chosen not in self._teachers:
            self._teachers[chosen] = self._build_teacher(chosen, names.index(chosen))
        return self._teachers[chosen]

    def teachers(self) -> dict[str, TappedModel]:
        """Return all frozen teachers by name."""
        return {name: self.teacher(name) for name in self.recipe.spec.all_teachers()}

    def differentiable(self, model: Model, taps: Sequence[str] = ()) -> TappedModel:
        """Return a view of a model for gradients with respect to its images; see `Models`."""
        assert isinstance(model, TappedModel)
        return model.twin(layers=taps)

    def whole_teachers(self, *, answering: bool = False) -> list[TappedModel]:
        """Return the frozen teachers without taps, for measuring, except those without a network;
        `answering`: only those that have the data's classes.
        """
        return [
            teacher.twin()
            for name, teacher in self.teachers().items()
            # Answers from a file cost nothing and have no network to measure.
            if not has_answers_alone(self.recipe, name)
            # One that is served costs nothing here.
            and (self.classes.are_known(name) if answering else teacher.elsewhere is None)
        ]

    def teacher_modules(self) -> dict[str, nn.Module]:
        """Return the teachers' networks by name."""
        return {name: teacher.module for name, teacher in self.teachers().items()}

    def teaching(self, stage: Stage, number: int = 0) -> nn.Module | None:
        """Return the network that losses of a stage's student may inspect: the stage's own, or the
        recipe's first teacher.
        """
        return (
            stage.teachers[number].module
            if stage.teachers
            else next(iter(self.teacher_modules().values()), None)
        )

    def surveyed(self, survey: Survey, teacher: TappedModel, data: Data) -> dict[str, Tensor]:
        """Survey a frozen teacher's answers to the training images, or read what was found.

        Raises:
            TapError, RunError: see `surveys.found`.
        """
        names = {module: name for name, module in self.teacher_modules().items()}
        return surveys.found(self.recipe, names.get(teacher.module), teacher, survey, data)

    def watch(self, but: Sequence[Model] = ()) -> None:
        """Record digests of the students that are frozen now, except those that a stage changes
        itself (`but`); `verify_frozen` raises if they change.
        """
        # Teachers were recorded when they were built; students may be frozen between stages.
        for model in filter(None, (student() for student in self._students)):
            self._frozen.add(model)
        for changing in but:
            self._frozen.leave_out(changing)

    def verify_frozen(self) -> None:
        """Compare every frozen model with its recorded digest.

        Raises:
            RunError: a parameter or buffer of it has changed.
        """
        self._frozen.verify()

    def verify_finite(self) -> None:
        """Check that all answers of frozen models so far are finite.

        Raises:
            RunError: an answer was not; names the model.
        """
        for model in self.models():
            model.finite.verify()

    def _build_teacher(self, name: str, number: int, file: Path | None = None) -> TappedModel:
        build = functools.partial(self._frozen_teacher, name, number, file)
        layers, needs_logits = self.teacher_layers(name), self._needs_logits(name)
        # Not computed yet: the key needs skeletons of networks, which a run alone can do without.
        key = functools.partial(self._sort_of_teacher, name, number)
        model = self._shared.teacher(key, str(file), layers, needs_logits=needs_logits, build=build)
        # On the meta device there are no bytes to digest, and in a rehearsal nothing is trained.
        if self._real and model.elsewhere is None:
            self._frozen.add(model)
        return model

    def _frozen_teacher(
        self, name: str, number: int, file: Path | None, layers: Sequence[str], needs_logits: bool
    ) -> TappedModel:
        spec, options = self.recipe.spec.all_teachers()[name], self.teacher_options(name)
        # A teacher's recipe was trained before any teacher is built.
        assert options is not None and isinstance(spec, TeacherOptions)
        if self._real and served.addresses(self.recipe, name):
            skeleton = self._skeleton(name, options)
            return beginnings.served_teacher(
                self.recipe, name, skeleton, layers, self._classes(name), needs_logits=needs_logits
            )
        model = self._build(name, options, layers, number, file)
        # A hook on the network itself: a wrapper would change the names of its layers.
        if (chosen := self.classes.chosen(name)) is not None or spec.answers != "logits":
            reading = Reading(spec.answers, chosen, self.task.of_classes)
            model.module.register_forward_hook(reading)
        # Without a reader of its logits, a forward stops after the deepest tap.
        model.needs_logits = needs_logits
        model.precision = PRECISIONS[spec.precision] if spec.precision else None
        model.freeze(spec.mode)
        # After `freeze`, as batch statistics of a network in training mode cannot be folded.
        if self._real and self._folds(name):
            # the comparison needs more precision than TF32
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                model = fold_batchnorm(model, self.info.image_shape, in_place=True)
        return model.compile() if self._compiles else model

    def _needs_logits(self, name: str) -> bool:
        return self.classes.are_known(name) and wanted.needs_logits(self.recipe, name)

    def _folds(self, name: str) -> bool:
        # Answers from a file have no such option, and a loss that inspects the network would find
        # other layers than the recipe names.
        return getattr(
            self.recipe.spec.all_teachers()[name], "fold_batchnorm", False
        ) and not wanted.needs_network(self.recipe, name)

    def _sort_of_teacher(self, name: str, number: int) -> str:
        """Key of a teacher's outputs, down to their rounding; leaves out the file of its weights
        and its taps.
        """
        spec, layers = self.recipe.spec.all_teachers()[name], self.teacher_layers(name)
        options = self.teacher_options(name)
        assert options is not None
        folded = (
            [unfoldable(self._skeleton(name, options), layers, self._classes(name))]
            if self._folds(name)
            else []
        )
        # the compiled code depends on the taps
        compiled = [sorted(layers), self._needs_logits(name)] if self._compiles else []
        # what is drawn for each step is another in each run
        apart = [self.recipe.fingerprint] if options.input and options.input.is_drawn else []
        # a cache holds answers to images that are mixed in one way
        if getattr(spec, "cache", None):
            apart.append(content_of(self.recipe.spec.train.mixup))
        # plugins may build different networks under the same name
        source = type(self.recipe.model_source(options))
        made_by = source.__module__, source.__qualname__
        return json.dumps(
            [content_of(spec), made_by, number, folded, compiled, self._channels_last, *apart],
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

    def teacher_options(self, name: str) -> ModelOptions | None:
        """Return the options that a teacher's network is built from; None: its recipe is not
        trained yet.
        """
        options = self.recipe.spec.all_teachers()[name]
        if not isinstance(options, RecipeTeacher):
            return options
        if name not in self.trained:
            return None
        trained = self.trained[name].options
        # It sees what it saw in its own training, unless this recipe says otherwise.
        return trained.model_copy(update={"input": options.input}) if options.input else trained

    def _classes(self, section: str) -> int:
        return (
            self.classes.own(section)
            if section in self.recipe.spec.all_teachers()
            else self.task.outputs(self.info)
        )

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
            refuse_other_places(options, self.task)
            # A network's first weights must not depend on which others were built before it.
            with seeded(spec.seed, "student" if section == "student" else "teacher", number):
                model = build_model(
                    options,
                    self.recipe.model_source(options),
                    self._classes(section),
                    self.info.image_shape,
                    layers,
                    section,
                    weights=self.device.type != "meta",
                    load=not self.rehearsal,
                    file=file,
                    channels_last=self._channels_last,
                    fields=self.info.fields,
                    # another run has left it
                    compressions=self.recipe.compressions(options)
                    if section in self.trained
                    else (),
                )
        except (ModelError, TapError) as error:
            raise wanted.error_in(
                self.recipe, section, error, options, trained=section in self.trained
            ) from error
        if self.device.type != "meta":  # in a check it stays on the device where it could be built
            model.module.to(self.device)
            model.adapt.to(self.device)
        return model
