"""Checks of the value: finite on all inputs, and independent of how a batch is composed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kdkit.contracts.loss import Loss
from kdkit.contracts.records import Outputs
from kdkit.errors import ShapeError
from kdkit.testing.forms import CLASSES, FORMS
from kdkit.testing.operations import ConstantDraws
from kdkit.testing.options import reads_layers
from kdkit.testing.outputs import DEGENERATE, LARGEST, with_other_padding
from kdkit.testing.probes import STEEPEST, probe_of_each_kind, probe_on, probes, some_probes
from kdkit.testing.promises import promise


@promise
def check_is_a_finite_scalar(cls: type[Loss], **options: Any) -> None:
    """Check that the value is one finite number of the student's type, and that the gradient is
    finite too.
    """
    for p in probes(cls, options):
        value = p.value()
        p.require(
            value.dtype == p.student.logits.dtype,
            f"the value is {value.dtype}, the student's outputs are {p.student.logits.dtype}",
        )
        p.require_finite()


@promise
def check_survives_degenerate_inputs(cls: type[Loss], **options: Any) -> None:
    """Check that value and gradient stay finite for degenerate inputs, the gradient below 1e6
    (unless the inputs are huge).
    """
    for p in probe_of_each_kind(cls, options):
        for form, (student, teacher) in DEGENERATE.items():
            p.changed(form, student, teacher).require_finite(
                math.inf if form.startswith(LARGEST) else STEEPEST
            )
        pairs = p.loss.options.taps()
        if all(
            p.student.features[pair.student].shape == p.teacher.features[pair.teacher].shape
            for pair in pairs
        ):
            # A student that is its own teacher: roots and logarithms of differences are at 0.
            alike = _renamed(p.student, {pair.teacher: pair.student for pair in pairs})
            replace(p, teacher=alike, form=f"{p.form}, student and teacher alike").require_finite()


def _renamed(outputs: Outputs, names: dict[str, str]) -> Outputs:
    """Return features under new names: those at the values of `names`, under its keys."""
    views = {name: _renamed(view, names) for name, view in outputs.views.items()}
    return Outputs(
        outputs.logits, {new: outputs.features[name] for new, name in names.items()}, views
    )


@promise
def check_takes_rounded_inputs(cls: type[Loss], **options: Any) -> None:
    """Check that inputs rounded to bf16, as in mixed precision, change the value only slightly."""
    for p in probe_of_each_kind(cls, options):
        rounded = p.changed(
            "rounded to bf16",
            lambda x: x.bfloat16().to(x.dtype),
            lambda x: x.bfloat16().to(x.dtype),
        )
        exact, value = p.value(), rounded.value()
        rounded.require(
            # bf16 has 8 bits of mantissa: a rounding is up to 0.4 %, and differences of features
            # enlarge it.
            torch.allclose(value, exact, rtol=0.05, atol=1e-4),
            f"the value is {value:.6g}, in fp32 {exact:.6g}",
        )


@promise
def check_takes_mixed_labels(cls: type[Loss], **options: Any) -> None:
    """Check that labels that are shares of the classes (R, K), as from mixup, are accepted."""
    for p in probe_of_each_kind(cls, options):
        # As mixup makes them: each sample with the one at the other end of the batch.
        labels = p.batch.labels
        if labels.ndim > 2:  # masks are not mixed
            return
        whole = labels if labels.ndim == 2 else nn.functional.one_hot(labels, CLASSES).float()
        batch = replace(p.batch, labels=0.7 * whole + 0.3 * whole.flip(0))
        replace(p, batch=batch, form=f"{p.form}, labels as shares").require_finite()


@promise
def check_takes_a_batch_of_one(cls: type[Loss], **options: Any) -> None:
    """Check that one sample gives a finite value and gradient."""
    for p in probes(cls, options):
        p.rows("a batch of one", [0]).require_finite()


@promise
def check_averages_over_the_batch(cls: type[Loss], **options: Any) -> None:
    """Check that a batch that contains each sample twice has the same value: a sum over the samples
    would double.

    A loss that relates samples to each other sees new, equal pairs there; its value must only not
    grow by more than 60 %.
    """
    for p in some_probes(cls, options):
        with ConstantDraws():
            one = float(p.value().detach())
            two = float(p.rows("each sample twice", [*range(6), *range(6)]).value().detach())
        # New pairs of equal samples have distance 0 and lower most means; only a sum would double.
        gap, most = (two - one, 0.6) if cls.knowledge == "relation" else (abs(two - one), 0.02)
        says = (
            f"with each sample twice the value is {two:.6g}, not {one:.6g}: divide sums over the"
            " batch by its size"
        )
        p.require(gap <= most * abs(one) + 1e-6, says)


@promise
def check_ignores_the_order_of_samples(cls: type[Loss], **options: Any) -> None:
    """Check that shuffling the batch does not change the value; random draws are equal for all
    samples here.
    """
    for p in probe_of_each_kind(cls, options):
        with ConstantDraws():
            value, shuffled = p.value(), p.rows("shuffled", [3, 0, 5, 1, 4, 2]).value()
        p.require(
            # Sums in another order round otherwise.
            torch.allclose(value, shuffled, rtol=1e-4, atol=1e-6),
            f"shuffling the batch turns {value:.6g} into {shuffled:.6g}",
        )


@promise
def check_ignores_padding(cls: type[Loss], **options: Any) -> None:
    """Check that for texts, the numbers at padding positions change nothing. A loss may refuse
    texts by a ShapeError.
    """
    if not reads_layers(cls, options) or cls.needs_views:  # of images
        return
    try:
        p = probe_on(cls, options, "texts", FORMS["tokens"], texts=True)
    except ShapeError:
        return
    other = replace(p, student=with_other_padding(p.student), teacher=with_other_padding(p.teacher))
    value, changed = p.value(), other.value()
    p.require(
        torch.allclose(value, changed),
        f"other numbers in the padding turn the value from {value:.6g} into {changed:.6g}",
    )


@promise
def check_is_deterministic(cls: type[Loss], **options: Any) -> None:
    """Check that the value is determined by state and seed."""
    for p in probe_of_each_kind(cls, options):
        p.require(
            torch.equal(p.value(), p.value()),
            "two copies give two values under one seed; draw from torch's global generator",
        )
