"""Builds the recipe's models, observed where its losses look."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kdkit.errors import ModelError, RunError, TapError
from kdkit.folding import fold_batchnorm
from kdkit.layers import expand_pairs
from kdkit.loss_options import LayerPair
from kdkit.models import build_model
from kdkit.providers import DataInfo, ModelOptions, ModelSource
from kdkit.randomness import seeded
from kdkit.recipe import Recipe
from kdkit.recipe_types import source_of
from kdkit.schema import RecipeTeacher, TeacherOptions
from kdkit.tapping import TappedModel

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainedTeacher:
    """The student of another recipe: what it is, and the file of its weights (None: not trained yet)."""

    options: ModelOptions
    file: Path | None


class ModelFactory:
    """Hands out the recipe's models, as `kdkit.Models` promises to schedules.

    Each student's initial weights depend on (seed, its number) alone.

    Args:
        recipe: whose models.
        info: image shape and class count.
        trained: the teacher, where another recipe trains it.
        device: where they live; on the meta device they have shapes, but no weights.
        rehearsal: weights are random and nothing is read, downloaded or folded: only shapes and structure count.
    """

    def __init__(
        self, recipe: Recipe, info: DataInfo, trained: TrainedTeacher | None, *, device: torch.device, rehearsal: bool = False
    ) -> None:
        self.recipe, self.info, self.trained, self.device, self.rehearsal = recipe, info, trained, device, rehearsal
        self.frozen: list[tuple[TappedModel, str]] = []
        self._students = 0

    @functools.cached_property
    def layers(self) -> tuple[list[str], list[str]]:
        """Layers that the losses read of a student and of the teacher; without a teacher, students are read as both."""
        pairs = self.expand([pair for entry in self.recipe.spec.losses for pair in entry.taps()])
        ours, theirs = [pair.student for pair in pairs], [pair.teacher for pair in pairs]
        if self.recipe.spec.teacher is None:
            ours = theirs = ours + theirs
        return list(dict.fromkeys(ours)), list(dict.fromkeys(theirs))

    def expand(self, pairs: Sequence[LayerPair], teacher: str | None = None) -> list[LayerPair]:
        """The pairs with globs written out.

        Raises:
            TapError: a layer that is not there.
        """
        student = self._skeleton_of_student
        return expand_pairs(pairs, student, self._skeleton_of_teacher or student) if pairs else []

    def student(self, options: ModelOptions | None = None) -> TappedModel:
        """A fresh student: the recipe's, or one of the schedule's own options."""
        self._students += 1
        model = self._build("student", options or self.recipe.spec.student, self.layers[0], self._students)
        return model.compile() if self._compiles else model

    def teacher(self, name: str | None = None) -> TappedModel:
        """The frozen teacher, which stops behind its deepest tap if no loss reads its logits."""
        return self._teacher

    def teachers(self) -> dict[str, TappedModel]:
        """All frozen teachers by name."""
        return {"teacher": self._teacher} if self.recipe.spec.teacher is not None else {}

    def whole_teacher(self) -> TappedModel | None:
        """The frozen teacher without taps, for measuring; None without a teacher."""
        return self._teacher.twin() if self.recipe.spec.teacher is not None else None

    def teacher_module(self) -> nn.Module | None:
        """The teacher's network; None without a teacher."""
        return self._teacher.module if self.recipe.spec.teacher is not None else None

    def verify_frozen(self) -> None:
        """Compare every frozen model with what it was.

        Raises:
            RunError: a parameter or buffer of it has changed.
        """
        for model, before in self.frozen:
            if _digest(model.module) != before:
                raise RunError(
                    f"{model.role} is frozen, yet its parameters or buffers have changed; a plugin or schedule must have done it"
                )

    @functools.cached_property
    def _teacher(self) -> TappedModel:
        spec = self.recipe.spec.teacher
        options = self._teacher_options
        if options is None or not isinstance(spec, TeacherOptions):
            raise RunError("this recipe has no teacher")
        losses = [self.recipe.plugins.losses[entry.use] for entry in self.recipe.spec.losses]
        reads_logits = any(loss.knowledge == "response" or loss.needs_teacher_logits for loss in losses)
        model = self._build("teacher", options, self.layers[1], 0)
        model.needs_logits = reads_logits
        model.precision = PRECISIONS[spec.precision] if spec.precision else None
        model.freeze(spec.mode)
        if self._real:
            if spec.fold_batchnorm and not any(loss.needs_networks for loss in losses):
                with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the comparison is finer than TF32
                    model = fold_batchnorm(model, self.info.image_shape, in_place=True)
            self.frozen.append((model, _digest(model.module)))
        return model.compile() if self._compiles else model

    @property
    def _compiles(self) -> bool:
        return self.recipe.spec.train.compile and self._real

    @property
    def _real(self) -> bool:
        return self.device.type != "meta" and not self.rehearsal

    @property
    def _teacher_options(self) -> ModelOptions | None:
        if isinstance(self.recipe.spec.teacher, RecipeTeacher):
            return self.trained.options if self.trained else None
        return self.recipe.spec.teacher

    @functools.cached_property
    def _skeleton_of_student(self) -> nn.Module:
        return self._skeleton("student", self.recipe.spec.student)

    @functools.cached_property
    def _skeleton_of_teacher(self) -> nn.Module | None:
        return self._skeleton("teacher", self._teacher_options) if self._teacher_options else None

    def _skeleton(self, section: str, options: ModelOptions) -> nn.Module:
        try:
            source = self._source(options)
            return build_model(options, source, self.info.num_classes, self.info.image_shape, role=section, weights=False).module
        except ModelError as error:
            raise self.recipe.error([section, "model"], str(error).removeprefix(f"{section}: ")) from error

    def _source(self, options: ModelOptions) -> ModelSource:
        sources = self.recipe.plugins.models
        name, model_name = source_of(options.model, sources)
        return sources[name](options, model_name)

    def _build(self, section: str, options: ModelOptions, layers: Sequence[str], number: int) -> TappedModel:
        spec = self.recipe.spec
        if section == "teacher" and self.trained and not self.rehearsal:
            options = options.model_copy(update={"checkpoint": self.trained.file, "strip_prefix": ""})
        try:
            with seeded(spec.seed, section, number):
                model = build_model(
                    options, self._source(options), self.info.num_classes, self.info.image_shape, layers, section,
                    weights=self.device.type != "meta", load=not self.rehearsal, channels_last=spec.train.channels_last,
                )  # fmt: skip
        except (ModelError, TapError) as error:
            raise self.recipe.error([section, "model"], str(error).removeprefix(f"{section}: ")) from error
        model.module.to(self.device)
        model.adapt.to(self.device)
        return model


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):  # state_dict leaves some buffers out
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
