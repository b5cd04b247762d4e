"""Sets a loss up on the forms of layers that it accepts, evaluates it there, and examines its
gradient.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdkit.contracts.loss import Context, Loss
from kdkit.contracts.records import Batch, Outputs
from kdkit.engine.objective import no_teacher
from kdkit.errors import ShapeError
from kdkit.testing.forms import CLASSES, FORMS, LABEL_WISE, Shape, shapes_of
from kdkit.testing.options import built, reads_layers
from kdkit.testing.outputs import Change, of_texts, random_batch, tensors_by_name
from kdkit.testing.stand_ins import (
    behind,
    labels_for,
    layers_of,
    meaning_of_rows,
    networks_with,
    random_answers,
    random_survey,
)

STEEPEST = 1e6  # slope of a loss whose inputs are not huge


@dataclass(frozen=True)
class Probe:
    """A loss after its setup, the inputs that it is evaluated on, and their name.

    Attributes:
        loss: after `setup`; copies are evaluated, so that its state does not change.
        student, teacher, batch: as in training; a loss on labels still gets no teacher to read.
        context: the context that `setup` received.
        form: for messages.
    """

    loss: Loss
    student: Outputs
    teacher: Outputs
    batch: Batch
    context: Context
    form: str

    def require(self, condition: object, says: str) -> None:
        """Raise an AssertionError that names the loss and the form, unless the condition holds."""
        if not condition:
            raise AssertionError(f"{self.loss.name}: on {self.form}: {says}")

    def copy_of_loss(self) -> Loss:
        """Copy the loss; a layer of the student that it reads is not copied."""
        # As deepcopy's memo: it takes what is in there for copied already.
        layers = {id(layer): layer for layer in self.context.student.modules()}
        try:
            return copy.deepcopy(self.loss, layers)
        except Exception as error:
            raise AssertionError(
                f"{self.loss.name}: copy.deepcopy fails after setup: {error}"
            ) from error

    def value(self, loss: Loss | None = None, seed: int = 0, *, copies: bool = True) -> Tensor:
        """Compute the loss (by default a fresh copy), on copies of the inputs, in which it may
        write.
        """
        loss = loss or self.copy_of_loss()
        given = self.copied() if copies else self
        # seeded, so that two evaluations of a random loss are comparable
        # `devices=[]`, because forking the generators of GPUs would initialise CUDA.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                value = loss(given.student, readable(loss, given.teacher), given.batch)
            except Exception as error:
                raise AssertionError(
                    f"{loss.name}: on {self.form}: forward raises {type(error).__name__}: {error}"
                ) from error
        self.require(
            isinstance(value, Tensor) and value.shape == (),
            f"the value must be a scalar, not {getattr(value, 'shape', value)}",
        )
        return value  # type: ignore[no-any-return]

    def copied(self) -> Probe:
        """Copy the inputs; a gradient reaches the inputs through the copies."""
        student, teacher = self.student.map(torch.clone), self.teacher.map(torch.clone)
        return replace(self, student=student, teacher=teacher, batch=self.batch.map(torch.clone))

    def learning(self) -> Probe:
        """Give it a student that asks for a gradient."""
        return replace(
            self, student=self.student.map(lambda x: x.detach().clone().requires_grad_())
        )

    def in_type(self, dtype: torch.dtype) -> Probe:
        """Convert the loss and its inputs to another type."""
        loss = self.copy_of_loss().to(dtype)
        student, teacher = (
            outputs.map(lambda x: x.to(dtype)) for outputs in (self.student, self.teacher)
        )
        return replace(self, loss=loss, student=student, teacher=teacher)

    def slopes(self) -> dict[str, Tensor]:
        """Compute the gradient for the student's logits and features, zero where the loss does not
        depend on them.
        """
        return self._value_and_slopes()[1]

    def _value_and_slopes(self) -> tuple[float, dict[str, Tensor]]:
        probe = self.learning()
        tensors = tensors_by_name(probe.student)
        value = probe.value()
        self.require(
            value.requires_grad,
            "the value has no gradient: something on the way from the student is detached",
        )
        slopes = gradient(value, list(tensors.values()))
        return float(value.detach()), dict(zip(tensors, slopes, strict=True))

    def require_finite(self, steepest: float = STEEPEST) -> None:
        """Require that value and gradient are finite, the gradient within bounds."""
        value, slopes = self._value_and_slopes()
        self.require(math.isfinite(value), f"the value is {value}")
        for name, slope in slopes.items():
            gradient = f"the gradient for the student's '{name}'"
            self.require(slope.isfinite().all(), f"{gradient} is not finite")
            largest = float(slope.abs().max())
            self.require(
                largest <= steepest, f"{gradient} reaches {largest:.1e}, above {steepest:.0e}"
            )

    def changed(self, form: str, student: Change, teacher: Change) -> Probe:
        """Change the tensors of the student, and of the teacher."""
        return replace(
            self,
            student=self.student.map(student),
            teacher=self.teacher.map(teacher),
            form=f"{self.form}, {form}",
        )

    def rows(self, form: str, index: list[int]) -> Probe:
        """Choose samples by number, in this order."""
        assert isinstance(self.batch.inputs, Tensor)
        batch = Batch(self.batch.inputs[index], self.batch.labels[index], self.batch.index[index])
        student, teacher = (
            _rows(outputs, index, len(self.batch.labels))
            for outputs in (self.student, self.teacher)
        )
        return replace(
            self, student=student, teacher=teacher, batch=batch, form=f"{self.form}, {form}"
        )


def _rows(outputs: Outputs, index: list[int], size: int) -> Outputs:
    """Choose samples of an answer to `size` of them; a view holds a copy of all, then the next."""
    own = replace(outputs, views={}).map(
        lambda x: torch.cat([copy[index] for copy in torch.split(x, size)])
    )
    return replace(
        own, views={name: _rows(view, index, size) for name, view in outputs.views.items()}
    )


def readable(loss: Loss, teacher: Outputs) -> Outputs:
    """Reduce the teacher to what the loss may read: nothing, if it is on labels."""
    return no_teacher() if loss.knowledge == "labels" else teacher


def observations(p: Probe) -> list[Tensor]:
    """Compute everything that a loss can change: its value, the gradient, the next value, and what
    is learnt.
    """
    probe, loss = p.learning(), p.copy_of_loss()
    value = probe.value(loss)
    weights = [weight for weight in loss.parameters() if weight.requires_grad]
    inputs = list(tensors_by_name(probe.student).values())
    slopes = gradient(value, [*inputs, *weights]) if value.requires_grad else []
    return [value.detach(), *weights, *slopes, probe.value(loss, seed=1).detach()]


def gradient(value: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Compute the gradient for tensors, zero where the value does not depend on them."""
    slopes = torch.autograd.grad(value, tensors, allow_unused=True)
    return [
        torch.zeros_like(x) if slope is None else slope
        for x, slope in zip(tensors, slopes, strict=True)
    ]


def leaves_behind(value: Tensor) -> list[Tensor]:
    """Find the tensors that a backward pass from `value` would give a gradient."""
    waiting = [value.grad_fn]
    seen = set()
    leaves = []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # Only the nodes that add up a leaf's gradient have a `variable`.
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        waiting += [parent for parent, _ in node.next_functions]
    return leaves


COUNT_KNOWN = 4  # sets of probes that are kept


def probe_on(
    cls: type[Loss],
    options: Mapping[str, Any],
    form: str,
    shapes: tuple[Shape, Shape],
    teacher_classes: int | None = None,
    *,
    classes: int = CLASSES,
    texts: bool = False,
) -> Probe:
    """Set a loss up on four samples, for a batch of six; of `texts` that are as long as the shapes
    say, or shorter.

    Raises:
        ShapeError: the loss refuses the form.
    """
    loss = cls(built(cls, options))
    layers = layers_of(loss, shapes)
    networks = networks_with(layers, classes)
    labels = labels_for(loss, 64, classes)
    context = Context(
        networks[0],
        networks[1].eval().requires_grad_(False),
        classes,
        64,
        labels,
        behind,
        functools.partial(random_survey, labels),
    )
    outputs = classes, classes if teacher_classes is None else teacher_classes
    # Set up on four samples and evaluated on six: a loss must not depend on the size of the batch
    # that `setup` saw.
    few, more = (random_answers(cls, layers, outputs, size) for size in (4, 6))
    if texts:
        few, more = ((of_texts(s, shapes[0][0]), of_texts(t, shapes[1][0])) for s, t in (few, more))
    if cls.needs_networks:
        few, more = ((networks[0].answer(s), networks[1].answer(t)) for s, t in (few, more))
    set_up(loss, *few, context, form)
    batch = replace(random_batch(6, classes), labels=labels_for(loss, 6, classes))
    # the teacher classifies two of three samples correctly
    if meaning_of_rows(loss) == "classes" and batch.labels.ndim == 1:
        predicted = more[1].logits.argmax(1)
        labels = torch.where(torch.arange(6) % 3 == 0, torch.arange(6), predicted) % classes
        batch = replace(batch, labels=labels)
    return Probe(loss, *more, batch, context, form)


def set_up(
    loss: Loss, student: Outputs, teacher: Outputs, context: Context, form: str, seed: int = 0
) -> None:
    """Call a loss's `setup`.

    Raises:
        ShapeError: the loss refuses the form.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            loss.setup(student, readable(loss, teacher), context)
        except ShapeError:
            raise
        except Exception as error:
            raise AssertionError(
                f"{loss.name}: on {form}: setup raises {type(error).__name__}, not"
                f" kdkit.ShapeError: {error}"
            ) from error


# every check uses the same probes
_known: dict[tuple[type[Loss], str], list[Probe]] = {}


def probes(cls: type[Loss], options: Mapping[str, Any]) -> list[Probe]:
    """Set a loss up on every form that it accepts, at least one."""
    key = cls, repr(sorted(options.items()))
    if key not in _known:
        accepted = list(_accepted(cls, options))
        # The oldest goes first: tests check one loss after another.
        while len(_known) >= COUNT_KNOWN:
            del _known[next(iter(_known))]
        _known[key] = accepted
    return _known[key]


def _accepted(cls: type[Loss], options: Mapping[str, Any]) -> Iterator[Probe]:
    forms = FORMS if reads_layers(cls, options) else {"logits": ((), ())}
    if forms is FORMS and meaning_of_rows(cls(built(cls, options))) == "labels":
        forms = {**FORMS, **LABEL_WISE}
    refusals = []
    for form, shapes in forms.items():
        try:
            accepted = probe_on(cls, options, form, shapes)
        except ShapeError as error:
            refusals.append(str(error))
            continue
        yield accepted
    if len(refusals) == len(forms):
        raise AssertionError(
            f"{cls.name}: setup refuses every form tried; the last: {refusals[-1]}"
        )


def some_probes(cls: type[Loss], options: Mapping[str, Any]) -> list[Probe]:
    """Set a loss up on the first two forms, because a map of one pixel is too weak a test."""
    accepted = probes(cls, options)
    return [p for p in accepted if p.form != "maps of one pixel"][:2] or accepted[:1]


def probe_of_each_kind(cls: type[Loss], options: Mapping[str, Any]) -> list[Probe]:
    """Set a loss up on the first form of each kind: maps, maps of one pixel, tokens, vectors."""
    kinds: dict[tuple[int, bool], Probe] = {}
    for p in probes(cls, options):
        kinds.setdefault((len(shapes_of(p.form)[0]), p.form == "maps of one pixel"), p)
    return list(kinds.values())
