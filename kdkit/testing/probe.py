"""Evaluates a loss after its setup, and examines its gradient."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdkit.contracts.loss import Context, Loss
from kdkit.contracts.records import Batch, Outputs
from kdkit.engine.objective import no_teacher
from kdkit.testing.degenerate import Change
from kdkit.testing.outputs import tensors_by_name

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
        slopes = _gradient(value, list(tensors.values()))
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
    slopes = _gradient(value, [*inputs, *weights]) if value.requires_grad else []
    return [value.detach(), *weights, *slopes, probe.value(loss, seed=1).detach()]


def _gradient(value: Tensor, tensors: list[Tensor]) -> list[Tensor]:
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
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        waiting += [parent for parent, _ in node.next_functions]
    return leaves
