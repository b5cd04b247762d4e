"""Compares a loss with a second derivation of its formula."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdkit.contracts.loss import Loss
from kdkit.contracts.records import Batch, Outputs
from kdkit.errors import ShapeError
from kdkit.testing.outputs import tensors_by_name
from kdkit.testing.probes import gradient, probes, readable

Formula = Callable[[Any, Outputs, Outputs, Batch], Tensor]


def assert_agrees(
    loss: Loss, formula: Formula, student: Outputs, teacher: Outputs, batch: Batch
) -> None:
    """Compare value and gradients (for student and adapters) with `formula(loss, student,
    teacher, batch)`, a naive second derivation.

    The formula is computed in fp64; the loss must agree within 1e-6 in fp64 and 1e-4 in fp32,
    relative to the largest entry.
    """
    # In fp64 the formulas must be equal; in fp32 the loss may round otherwise, not more.
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        ours = copy.deepcopy(loss).to(dtype)
        naive = copy.deepcopy(ours).double()
        s, t = (x.map(lambda value: value.detach().to(dtype)) for x in (student, teacher))  # noqa: B023
        values = _value_and_slopes(ours, ours, s, t, batch)
        expected = _value_and_slopes(
            naive,
            functools.partial(formula, naive),
            s.map(Tensor.double),
            t.map(Tensor.double),
            batch,
        )
        for name, exact in expected.items():
            error = float((values[name] - exact).abs().max())
            # A gradient that is zero everywhere has no relative error.
            size = max(float(exact.abs().max()), 1e-6)
            assert error <= tolerance * size, (
                f"{loss.name}: {name} is off by {error:.2e} of {size:.2e} in {dtype}"
            )


def _value_and_slopes(
    loss: Loss, compute: Callable[..., Tensor], student: Outputs, teacher: Outputs, batch: Batch
) -> dict[str, Tensor]:
    """Compute the value, and the gradients for the student's tensors and the loss's weights."""
    student = student.map(lambda x: x.clone().requires_grad_())
    # Shares of classes take part in the arithmetic: fp32 ones would round an fp64 comparison.
    if batch.labels.is_floating_point():
        batch = replace(batch, labels=batch.labels.to(student.logits.dtype))
    with torch.random.fork_rng(devices=[]):
        # Both forms draw the same numbers, if the loss draws any.
        torch.manual_seed(0)
        value = compute(student, teacher, batch)
    inputs = {
        **tensors_by_name(student),
        **{name: weight for name, weight in loss.named_parameters() if weight.requires_grad},
    }
    slopes = gradient(value, list(inputs.values()))
    gradients = {
        f"the gradient for {name}": slope for name, slope in zip(inputs, slopes, strict=True)
    }
    return {"the value": value.detach(), **gradients}


def assert_agrees_on_all_forms(
    cls: type[Loss], reference: Formula, options: dict[str, Any]
) -> None:
    """Compare the loss with its reference on every form that both take, at least one."""
    compared = 0
    for p in probes(cls, options):
        try:
            assert_agrees(p.loss, reference, p.student, readable(p.loss, p.teacher), p.batch)
        except ShapeError:
            continue
        except AssertionError as error:
            raise AssertionError(f"on {p.form}: {error}") from None
        compared += 1
    assert compared, f"{cls.name}: the reference refuses every form that the loss takes"
