"""Checks of a recipe's networks: layers, shapes, initial weights, meaning of their numbers,
caches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from kdkit.cache.given import STREAM, has_answers_alone, read_answers, read_layers
from kdkit.contracts.dataset_source import DataInfo, DatasetSource, Stream
from kdkit.contracts.inputs import kind_of, random_inputs
from kdkit.contracts.known_answers import AnswersOptions
from kdkit.contracts.layers import OUTPUT
from kdkit.contracts.model_source import OWN_OUTPUTS, Meaning, ModelOptions
from kdkit.contracts.records import Inputs
from kdkit.contracts.task import Task
from kdkit.data import beside
from kdkit.data.labels import split
from kdkit.engine.scores import deciding
from kdkit.errors import (
    DataError,
    KdkitError,
    ModelError,
    TapError,
)
from kdkit.models.compressing import parameters_of
from kdkit.models.devices import LEAST_CHANNELS, trains_on_cpu, unsafe_convolution
from kdkit.models.tapped import TappedModel
from kdkit.recipe import models_in
from kdkit.runs import check_caches as cache_plan
from kdkit.runs.check_report import Checks
from kdkit.runs.check_weights import has_random_weights, random_parts
from kdkit.runs.meaning import meaning_of, other_class_names, refuse_other_meaning
from kdkit.runs.networks import ModelFactory
from kdkit.runs.plan import ModelPlan
from kdkit.runs.random_batches import PROBE
from kdkit.runs.trained_teachers import TrainedTeacher
from kdkit.runs.wanted import looking_at


class NetworkChecks(Checks):
    """Checks the student and the teachers."""

    def check_layers(self, factory: ModelFactory) -> None:
        for i, entry in enumerate(self.spec.losses):
            is_default = "layers" not in entry.model_fields_set
            own = self.recipe.plugins.losses[entry.use].knowledge == "labels"
            for j, pair in enumerate(entry.taps()):
                found = False
                with self.report.at("losses", i, "layers", j):
                    try:
                        factory.expand([pair], entry.teacher, own)
                        found = True
                    # Placed here, at the pair itself: `Report` would look for the layer's name in
                    # all losses.
                    except TapError as error:
                        usual = f"'{entry.use}' reads by default (`layers` says what else): "
                        says = f"{usual if is_default else ''}{error}"
                        raise self.recipe.error(["losses", i, "layers", j], says) from None
                # The recipe does not name the others, and they lack for the same reason.
                if is_default and not found:
                    break
        self.report.raise_if_any()
        for name in self.spec.all_teachers():
            if has_answers_alone(self.recipe, name):
                layers = [layer for layer in factory.teacher_layers(name) if layer != "logits"]
                with self.report.at():
                    read_layers(self.recipe, name, layers)
        self.report.raise_if_any()

    def networks_of(
        self, factory: ModelFactory, info: DataInfo
    ) -> tuple[list[ModelPlan], list[ModelPlan]]:
        """Build the student and the teachers; networks that cannot be built or run are reported as
        problems.
        """
        students, planned = [], []
        with self.report.at("student"):
            students.append(self._student(factory, info))
        for name, one in self.spec.all_teachers().items():
            with self.report.at(*self.spec.place_of(name)):
                called = _teacher_name(one, factory.trained.get(name))
                self._refuse_predictions(name, factory)
                planned.append(
                    self._model(
                        f"{name} {called}",
                        factory.teacher(name),
                        info,
                        factory.device,
                        answering=factory.classes.are_known(name),
                    )
                )
        return students, planned

    def _student(self, factory: ModelFactory, info: DataInfo) -> ModelPlan:
        built = factory.student()
        if factory.inherited:
            self.report.notes.append(
                f"the student begins with {len(factory.inherited)} of its {factory.inheriting}"
                " tensors from a teacher"
            )
        elif has_random_weights(self.spec.student):
            self.report.notes += [
                f"{one.name} begins with random weights: `init` or `checkpoint` gives trained ones"
                for one in factory.compressions(built)
            ]
        planned = self._model(
            f"student {self.spec.student.model}", built, info, factory.device, answering=True
        )
        self._count_outputs(built, random_inputs(info.image_shape, PROBE, factory.device), info)
        return planned

    def _count_outputs(self, student: TappedModel, images: Inputs, info: DataInfo) -> None:
        """Count the outputs of the student in training mode, as some networks give more than one
        tensor there.
        """
        student.module.train()
        try:
            with torch.no_grad(), _told(f"{student.role} does not run in training mode"):
                outputs = student.outputs(images)
        finally:
            student.module.eval()
        if not self.task.fits(outputs[0].shape, info, PROBE):
            raise ModelError(
                f"{student.role} gives {tuple(outputs[0].shape)} for {PROBE} samples in training"
                f" mode, {self._wanted(info)}"
            )
        for i, entry in enumerate(self.spec.losses):
            # The number of outputs is known only after a forward in training mode: auxiliary heads
            # answer only there.
            if entry.output >= len(outputs):
                says = (
                    f"there is no such output: the student gives {len(outputs)} in training mode,"
                    " counted from 0"
                )
                raise self.recipe.error(["losses", i, "output"], says)
        read_later = any(
            entry.output or any(OUTPUT.fullmatch(pair.student) for pair in entry.taps())
            for entry in self.spec.losses
        )
        if len(outputs) > 1 and not read_later:
            self.report.notes.append(
                f"the student gives {len(outputs)} outputs in training mode, and losses read the"
                " first; `output: 1` of a loss names another"
            )

    def _refuse_predictions(self, name: str, factory: ModelFactory) -> None:
        """Check that no loss compares the predictions of a teacher that does not have the data's
        classes.
        """
        if factory.classes.are_known(name):
            return
        own = factory.classes.own(name)
        what = (
            f"its {own} classes are not the data's: `classes` says which are"
            if own
            else "it has no classes"
        )
        for i, entry in enumerate(self.spec.losses):
            loss = self.recipe.plugins.losses[entry.use]
            if entry in looking_at(factory.recipe, name) and (
                loss.knowledge == "response" or loss.needs_teacher_logits
            ):
                self.report.refuse(
                    ["losses", i],
                    f"'{entry.use}' compares predictions with those of {name}, and {what}",
                )

    def _model(
        self,
        role: str,
        model: TappedModel,
        info: DataInfo,
        device: torch.device,
        *,
        answering: bool,
    ) -> ModelPlan:
        """Run a model; `answering`: whether it must give answers in the task's form."""
        images = random_inputs(info.image_shape, PROBE, device)
        # A view without caches, and with all taps: the model itself may stop after its deepest tap.
        everything = model.view(model.layers, needs_logits=answering, answers=None)
        everything.module.eval()
        taken = _told(f"{model.role} cannot take {kind_of(info.image_shape)} {info.image_shape}")
        with torch.no_grad(), FlopCounterMode(display=False) as counter, taken:
            outputs = everything(images)
        self.check_layout(model)
        if answering and not self.task.fits(outputs.logits.shape, info, PROBE):
            given = tuple(outputs.logits.shape)
            says = f"{model.role} gives {given} for {PROBE} samples, {self._wanted(info)}"
            more = (
                f" (`{OWN_OUTPUTS}`, `classes` say what a teacher's answers are)"
                if model.frozen
                else ""
            )
            raise ModelError(says + more)
        taps = tuple((name, tuple(value.shape[1:])) for name, value in outputs.features.items())
        return ModelPlan(
            role,
            parameters_of(model.module),
            # A multiply-accumulate counts as two floating-point operations.
            counter.get_total_flops() // 2 // PROBE,
            taps,
            model.sees if model.sees != info.image_shape else None,
        )

    def _wanted(self, info: DataInfo) -> str:
        """Describe the answers that the data asks for."""
        rows = self.task.rows_are
        if rows == "embeddings":
            return "and not an embedding (B, D)"
        if type(self.task).rows is not Task.rows:  # a network for samples has as many outputs
            wanted = tuple(self.task.random_answer(info, PROBE).logits.shape)
            return f"and task '{self.task.name}' asks for the form of {wanted}"
        return f"and the data has {info.outputs} {rows}"

    def check_layout(self, model: TappedModel) -> None:
        """Check whether channels-last is safe for a network on the device where it is trained."""
        # `auto` is off on the CPU.
        if self.spec.train.channels_last is not True or not trains_on_cpu(self.spec.train):
            return
        if (name := unsafe_convolution(model.module)) is not None:
            says = (
                f"on the CPU, the backward pass of '{name}' of {model.role} (1 x 1, strided, fewer"
                f" than {LEAST_CHANNELS} channels) corrupts memory where images are channels-last;"
                " say `auto` or `false`"
            )
            self.report.refuse(["train", "channels_last"], says)

    def compare_meanings(self, factory: ModelFactory, info: DataInfo) -> None:
        """Check whether the networks' classes and tokens are those of the data; add the notes on
        teachers.
        """
        spec = self.spec
        with self.report.at("student"):
            begins = meaning_of(
                spec.student, factory.recipe.model_source(spec.student), factory.student().module
            )
            # of the classes that it learns
            refuse_other_meaning(replace(begins, class_names=()), info, "student")
        for name, one in spec.all_teachers().items():
            self.report.notes += self._notes_on(name, one, factory)
            if isinstance(one, ModelOptions):
                with self.report.at(*spec.place_of(name)):
                    self.compare(
                        meaning_of(
                            one, factory.recipe.model_source(one), factory.teacher(name).module
                        ),
                        info,
                        name,
                        one,
                    )

    def compare(self, theirs: Meaning, info: DataInfo, whose: str, teacher: object) -> None:
        """Compare a teacher's classes and tokens with those of the data: another order is refused,
        other names are noted.
        """
        if (chosen := getattr(teacher, "classes", None)) is not None:
            numbers = (
                [chosen.get(name, -1) for name in info.class_names]
                if isinstance(chosen, Mapping)
                else chosen
            )
            # Numbers without a name are left out: nothing is known of those classes.
            known = dict(enumerate(theirs.class_names))
            theirs = replace(
                theirs, class_names=tuple(known[number] for number in numbers if number in known)
            )
        refuse_other_meaning(theirs, info, whose)
        if name := other_class_names(theirs, info):
            self.report.notes.append(
                f"{whose} has classes of other names ('{name}'); they are taken in their order"
            )

    def _notes_on(self, name: str, teacher: object, factory: ModelFactory) -> Iterator[str]:
        """Yield notes on a teacher."""
        reading = [
            entry.use
            for entry in looking_at(factory.recipe, name)
            if self.recipe.plugins.losses[entry.use].needs_networks
        ]
        if getattr(teacher, "fold_batchnorm", False) and reading:
            yield f"`fold_batchnorm` of {name} has no effect: {reading[0]} reads its layers"
        if getattr(teacher, "new_head", False):
            yield (
                f"the classifier of {name} is random (`new_head`): a `recipe` of its own would"
                " train it"
            )
        elif has_random_weights(teacher) and (which := random_parts(factory, name)):
            yield (
                f"{which} of {name} are random: give it a `checkpoint`, `pretrained: true` or a"
                " `recipe`"
            )

    def check_answers(self, factory: ModelFactory, info: DataInfo, source: DatasetSource) -> None:
        """Check whether teachers without a network can teach what the recipe asks for."""
        is_here = source.split_at_check and source.lacks() is None
        # Rows of an answers file go by the number of an image, which a stream does not tell.
        is_stream = is_here and isinstance(split(source, "train", info), Stream)
        for name in self.spec.all_teachers():
            if not has_answers_alone(self.recipe, name):
                continue
            with self.report.at(*self.spec.place_of(name), "model"):
                self.report.problems += cache_plan.refused_answers(self.recipe, factory, name)
                if is_stream:
                    raise DataError(STREAM)
                count = beside.indexed(self.spec.data, info)
                rows = read_answers(self.recipe, name, count, factory.classes.own(name))
                self.report.problems += cache_plan.refused_largest(self.recipe, factory, name, rows)
                self.report.notes += cache_plan.notes_on_answers(self.recipe, name, rows)
        for place, model in models_in(
            {"student": self.spec.student, "schedule": self.spec.schedule}
        ):
            if isinstance(model, AnswersOptions):
                self.report.refuse(
                    [*place, "model"], "has answers alone, and no network that could learn"
                )
        self.report.raise_if_any()

    def check_deciding(self, factory: ModelFactory, info: DataInfo) -> None:
        """Check that there is a teacher to compare with if such a score decides."""
        score = deciding(self.recipe, info)
        if not score.of_teacher:
            return
        answering = [
            name
            for name in self.spec.all_teachers()
            if factory.classes.are_known(name) and not has_answers_alone(self.recipe, name)
        ]
        says = f"'{score.name}', which decides, compares with a teacher"
        if not answering:
            self.report.refuse(["task"], f"{says}, and none answers; let another score decide")
        if self.spec.data.validation:
            alone = "which answers no validation images; let another score decide"
            self.report.refuse(["data", "validation"], f"{says}, {alone}")

    def check_caches(
        self,
        factory: ModelFactory,
        info: DataInfo,
        num_train: int,
        shapes: Mapping[str, cache_plan.Shapes],
    ) -> None:
        self.report.problems += cache_plan.refused(self.recipe, factory, info)
        self.report.raise_if_any()
        for note, problem in cache_plan.sizes(self.recipe, factory, info, num_train, shapes):
            self.report.notes.append(note)
            self.report.problems += [problem] if problem else []


@contextlib.contextmanager
def _told(says: str) -> Iterator[None]:
    """Turn whatever a network's own code raises into a ModelError."""
    try:
        yield
    # kdkit's own errors already name the cause
    except KdkitError:
        raise
    except Exception as error:
        raise ModelError(f"{says}: {' '.join(str(error).split())}") from error


def _teacher_name(options: object, trained: TrainedTeacher | None) -> str:
    return (
        trained.options.model
        if trained
        else options.model
        if isinstance(options, ModelOptions)
        else ""
    )
