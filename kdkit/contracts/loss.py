"""The interface of a loss plugin: Loss and Context."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kdkit.contracts.adapters import frozen_copy
from kdkit.contracts.distributed import share_of_mean
from kdkit.contracts.layers import classifier_path, norm_path
from kdkit.contracts.loss_options import LossOptions
from kdkit.contracts.records import Batch, Outputs
from kdkit.contracts.survey import Reduce, Survey
from kdkit.contracts.synonyms import with_synonyms
from kdkit.errors import TapError

Rest = Callable[[Tensor], Outputs]
"""What a network makes of values that stand in the place of a layer's own."""


@with_synonyms
@dataclass(frozen=True)
class Context:
    """Information beyond two outputs that a loss may need during `setup`.

    Attributes:
        student, teacher: the networks themselves (teacher is None without one).
        outputs: K, how many values an answer has in each row (`num_classes` is another name for
            it).
        num_samples: one more than the largest `Batch.index`; 0 where images have none (a stream).
        labels: target by `Batch.index`, (num_samples, ...); -1 where a sample is not trained on.
        behind: returns what stands behind a layer of a network (None: where networks are not the
            engine's, whose inputs it knows).
        survey: surveys a frozen network's answers to the training images (None: where there is no
            engine, which has them).
    """

    student: nn.Module
    teacher: nn.Module | None
    outputs: int
    num_samples: int
    labels: Tensor
    behind: Callable[[nn.Module, str, Sequence[str]], Rest] | None = None
    survey: Callable[[nn.Module, Survey], dict[str, Tensor]] | None = None

    def student_classifier(self) -> nn.Module:
        """Return the student's layer from embedding to logits: the live module. Store it in a
        tuple, so that `nn.Module` does not register it.

        Raises:
            TapError: it has none, or several.
        """
        return self.student.get_submodule(classifier_path(self.student, self.outputs))

    def teacher_classifier(self) -> nn.Module:
        """Return a frozen copy of the teacher's layer from embedding to logits.

        Raises:
            TapError: it has none, or several, or its classes are not those of the data.
        """
        classifier = self._teacher().get_submodule(classifier_path(self._teacher(), self.outputs))
        if (own := getattr(classifier, "out_features", self.outputs)) != self.outputs:
            raise TapError(
                f"the teacher's classifier has {own} classes and the data {self.outputs}, so"
                " that it cannot be read"
            )
        return frozen_copy(classifier)

    def teacher_norm(self, layer: str) -> nn.Module:
        """Return the teacher's batch normalisation that a layer's values come from: the layer
        itself, or the last one in or before it.

        Raises:
            TapError: there is none.
        """
        return self._teacher().get_submodule(norm_path(layer, self._teacher()))

    def teacher_rest(self, layer: str, taps: Sequence[str] = ()) -> Rest:
        """Return what stands behind a layer of the teacher: a function from values in the form of
        the tapped layer to the logits, and to layers behind it.

        The gradient for the values passes through; the teacher stays frozen.

        Raises:
            TapError: there is no such layer, or what stands behind it is more than a function of
                its values.
        """
        return self._rest(self._teacher(), layer, taps)

    def student_rest(self, layer: str, taps: Sequence[str] = ()) -> Rest:
        """Return what stands behind a layer of the student, as `teacher_rest` does of the teacher;
        its live parameters learn.

        Raises:
            TapError: there is no such layer, or what stands behind it is more than a function of
                its values.
        """
        return self._rest(self.student, layer, taps)

    def teacher_statistics(
        self,
        reduce: Reduce,
        layers: Sequence[str] = (),
        images: Tensor | None = None,
        **arguments: Any,
    ) -> dict[str, Tensor]:
        """Return what a function makes of the frozen teacher's answers to the training images.

        Each image is shown once before the first step, as it is measured: in eval mode, without
        augmentation. The result is on the processor. It is kept on disk, and used again as long as
        teacher, images, arguments and the function's file are the same.

        In `kdkit check` the function sees a few random answers, for the shapes of what it gives.

        Args:
            reduce: takes (outputs, batch) of each batch, and the arguments; gives tensors by name
                that add up over images, as each of several processes shows the teacher its share.
            layers: of the teacher, in `outputs.features`; the logits are always there.
            images: their places, ascending (None: all that are trained on).
            arguments: of the function, by name: tensors and plain values.

        Raises:
            TapError: no frozen teacher, or images that cannot be read one by one; no such layer.
        """
        if self.survey is None:
            raise TapError(
                "statistics of the teacher are not known: the context has no `survey`, which shows"
                " it the training images"
            )
        return self.survey(self._teacher(), Survey(reduce, (*layers,), images, arguments))

    def _rest(self, network: nn.Module, layer: str, taps: Sequence[str]) -> Rest:
        if self.behind is None:
            raise TapError(
                f"what stands behind '{layer}' is not known: the context has no `behind`"
            )
        return self.behind(network, layer, taps)

    def _teacher(self) -> nn.Module:
        if self.teacher is None:
            raise TapError("there is no teacher network to take a layer from")
        return self.teacher


class Loss(nn.Module, abc.ABC):
    """One term of the objective, unweighted: the recipe's `weight` multiplies it.

    Tensors arrive in fp32 (or fp64) with autocast off, the teacher's without gradient. A `Rampable`
    option is a plain float here.
    """

    name: ClassVar[str]
    knowledge: ClassVar[Literal["labels", "response", "feature", "relation"]]
    needs_teacher_logits: ClassVar[bool] = False
    """Whether a feature or relation loss also reads `teacher.logits` (response losses always
    may).
    """
    tasks: ClassVar[Set[str] | Literal["any"]] = frozenset()
    """Names of the supported tasks, or the meaning of their rows (`classes`, `labels`,
    `numbers`), or `any`. `classes of samples`: only where a row is a whole sample, not a part of
    it such as a pixel. Default: `classes` for a loss on labels or responses; `classes of samples`
    for another one that reads the teacher's logits, which are then not split into rows; otherwise
    any task.
    """
    whole_answers: ClassVar[bool] = False
    """Whether a loss on labels or responses reads the answers to whole samples, beside their
    targets, where the task splits them into rows.
    """
    needs_networks: ClassVar[bool] = False
    """Whether `setup` reads the networks of its context. `kdkit check` then runs real ones;
    batch norms are not folded away.
    """
    needs_views: ClassVar[Mapping[str, int]] = {}
    """The views it reads in `Outputs.views`, with the number of copies of each image in them;
    `setup` refuses outputs without them.
    """
    capturable: ClassVar[bool] = True
    """False if its values must be computed anew by Python in each step (`train.capture`): it reads
    a tensor's value, or keeps a count of its own. kdkit finds most such losses by itself.
    """
    exceptions: ClassVar[Mapping[str, str]] = {}
    """Checks of `kdkit.testing` that the loss fails on purpose, by name, each with the reason.
    The report of `check_loss` shows them.
    """
    Options: ClassVar[type[LossOptions]] = LossOptions

    def __init__(self, options: LossOptions) -> None:
        super().__init__()
        self.options = options
        # False where each process trains a student of its own
        self.shares_batches = True

    @classmethod
    def for_tasks(cls, options: Any = None) -> Set[str] | Literal["any"]:
        """Return `tasks`, or its default."""
        if cls.tasks:
            return cls.tasks
        if cls.knowledge in ("labels", "response"):
            return frozenset({"classes"})
        return frozenset({"classes of samples"}) if cls.needs_teacher_logits else "any"

    def __getattr__(self, name: str) -> Any:
        """Explain in the error that a missing attribute may be one that `setup` builds."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(
                f"{error}; if `setup` builds it, call `setup(student, teacher)` once before the"
                " loss"
            ) from None

    def setup(self, student: Outputs, teacher: Outputs, context: Context | None = None) -> None:
        """Build learnable parts, sized by a probe batch's outputs. Called once, before the
        optimizer exists.

        The default builds nothing, and checks whether the options can compare the two outputs.

        Raises:
            ShapeError: the two cannot be compared.
        """
        self.options.check(student, teacher)

    @abc.abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the scalar loss."""

    def share(self, count: Tensor | int, device: torch.device, least: int = 0) -> Tensor | float:
        """Return this process's count, divided by the mean over the processes that share a batch;
        of one: 1.

        A loss that is divided by a count of its own, such as of objects, is multiplied by it: then
        several processes learn what one does. All must call it. `least`: what such a loss is
        divided by if the count is smaller.
        """
        return share_of_mean(count, device, least) if self.shares_batches else 1.0

    def deploy(self, student: nn.Module) -> nn.Module:
        """Return the network that is measured and exported in the student's place: the student
        itself, unless the loss adds a part to it.
        """
        return student
