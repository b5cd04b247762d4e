"""Checks of the gradient: it reaches the student and the adapters, and not the teacher."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdkit.contracts.loss import Loss
from kdkit.contracts.loss_options import FeatureOptions
from kdkit.errors import ShapeError
from kdkit.testing.forms import shapes_of
from kdkit.testing.options import TWO_PAIRS
from kdkit.testing.outputs import tensors_by_name, with_noise
from kdkit.testing.probes import (
    Probe,
    leaves_behind,
    observations,
    probe_of_each_kind,
    probe_on,
    probes,
    some_probes,
)
from kdkit.testing.promises import promise


@promise
def check_teaches_the_student(cls: type[Loss], **options: Any) -> None:
    """Check that the gradient reaches every student layer that the loss names, or the logits."""
    for p in probes(cls, options):
        slopes = p.slopes()
        for name in {pair.student for pair in p.loss.options.taps()} or {"logits"}:
            if p.form != "maps of one pixel":  # the attention of one pixel is constant, for example
                p.require(
                    slopes[name].any(),
                    f"no gradient reaches the student's '{name}': detached, or the arguments"
                    " swapped?",
                )


@promise
def check_teaches_every_part(cls: type[Loss], **options: Any) -> None:
    """Check that the gradient reaches every sample and, where it reaches anything, every class or
    channel.
    """
    for p in some_probes(cls, options):
        for name, slope in p.slopes().items():
            if not slope.any():
                continue
            # Tokens (B, N, D) have their channels last, maps and logits second.
            dimensions = {0: "samples"} | (
                {1: "classes" if name == "logits" else "channels"}
                if slope.ndim != 3
                else {2: "channels"}
            )
            for dimension, meaning in dimensions.items():
                silent = ~slope.movedim(dimension, 0).flatten(1).any(1)
                p.require(
                    not silent.any(),
                    f"no gradient reaches {int(silent.sum())} of {len(silent)} {meaning} of the"
                    f" student's '{name}'",
                )


@promise
def check_reads_every_layer(cls: type[Loss], **options: Any) -> None:
    """Check that with several pairs of layers, the gradient reaches each student layer, and each
    teacher layer counts.
    """
    p = _on_two_pairs(cls, options)
    slopes, before = p.slopes(), observations(p)
    for pair in p.loss.options.taps():
        # A loss on labels has both layers of a pair in the student: a pair of one layer compares it
        # with itself.
        if cls.knowledge != "labels" or pair.student != pair.teacher:
            p.require(
                slopes[pair.student].any(),
                f"no gradient reaches the student's '{pair.student}': is the layer ignored?",
            )
    if cls.knowledge == "labels":
        return
    read = (
        [pair.teacher for pair in p.loss.options.taps()]
        if cls.knowledge in ("feature", "relation")
        else ["logits"]
    )
    for name in read:
        changed = observations(replace(p, teacher=with_noise(p.teacher, name)))
        same = all(x.equal(y) for x, y in zip(before, changed, strict=True))
        p.require(
            not same,
            f"other numbers of the teacher's '{name}' change neither value nor gradient: is it"
            " ignored?",
        )


def _on_two_pairs(cls: type[Loss], options: dict[str, Any]) -> Probe:
    """Set the loss up on two pairs, whose four layers have four names, if it takes two and the
    options name none.
    """
    if "layers" not in options and issubclass(cls.Options, FeatureOptions):
        for form in (p.form for p in probes(cls, options)):
            with contextlib.suppress(ShapeError):
                return probe_on(cls, {**options, "layers": TWO_PAIRS}, form, shapes_of(form))
    return some_probes(cls, options)[0]


@promise
def check_adapters_learn(cls: type[Loss], **options: Any) -> None:
    """Check that all learnable parts are among `parameters()`, and that each of them changes within
    three steps.
    """
    for original in probe_of_each_kind(cls, options):
        p, loss = original.learning(), original.copy_of_loss()
        known = {
            id(x)
            for x in [
                *loss.parameters(),
                *p.context.student.parameters(),
                *tensors_by_name(p.student).values(),
            ]
        }
        value = p.value(loss)
        p.require(value.requires_grad, "the value has no gradient")
        # Leaves that a backward pass would reach, but no optimizer knows.
        strangers = [tuple(leaf.shape) for leaf in leaves_behind(value) if id(leaf) not in known]
        p.require(
            not strangers,
            f"a tensor {strangers[:1]} learns but is not among parameters(); an adapter's place is"
            " an nn.Module attribute",
        )
        weights = {name: weight for name, weight in loss.named_parameters() if weight.requires_grad}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        # Behind a layer that begins at zero, the first step has no gradient yet.
        for seed in range(3 if weights else 0):
            _descend(p.value(loss, seed), list(weights.values()))
        still = [name for name, weight in weights.items() if torch.equal(weight, before[name])]
        p.require(not still, f"no gradient reaches its parameters {still}")


def _descend(value: Tensor, weights: list[nn.Parameter]) -> None:
    """Take a step of gradient descent."""
    slopes = torch.autograd.grad(value, weights, allow_unused=True)
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            if slope is not None:
                weight.sub_(slope, alpha=0.1)


@promise
def check_leaves_the_teacher_alone(cls: type[Loss], **options: Any) -> None:
    """Check that the teacher gets no gradient, and that its network is not part of the loss."""
    for p in probe_of_each_kind(cls, options):
        network = p.context.teacher or nn.Module()
        # By identity: a copy of a part of the teacher may be the loss's own.
        inside = {id(module) for module in p.loss.modules()} & {
            id(module) for module in network.modules()
        }
        p.require(
            not inside,
            "it holds the teacher's network as a submodule, to be trained and saved with it; keep"
            " it in a tuple",
        )
        given = p.copied()
        # On the tensors themselves: a copy would not show that `requires_grad` was switched on.
        given.value(copies=False)
        tensors = [*tensors_by_name(given.teacher).values(), *network.parameters()]
        p.require(
            not any(x.requires_grad for x in tensors),
            "it asks for a gradient of the teacher (requires_grad was switched on)",
        )


@promise
def check_the_gradient_is_that_of_the_value(cls: type[Loss], **options: Any) -> None:
    """Check that value and gradient are consistent, by finite differences: nothing on the way is
    detached.
    """
    for original in some_probes(cls, options):
        wide = replace(original.in_type(torch.float64), form=f"{original.form}, in fp64")
        p = wide.learning()
        inputs = [
            x
            for name, x in tensors_by_name(p.student).items()
            # A layer called `logits` is the same tensor as the logits, and would be moved twice.
            if name == "logits" or x is not p.student.logits
        ]
        slopes = torch.autograd.grad(p.value(), inputs, allow_unused=True)
        gaps = []
        # Along one direction the value may happen to have a kink; a detached term shows along all.
        for seed in range(3):
            moves = {
                id(x): torch.randn(
                    x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype
                )
                for x in inputs
            }
            expected = sum(
                float((slope * moves[id(x)]).sum())
                for x, slope in zip(inputs, slopes, strict=True)
                if slope is not None
            )
            measured = _difference(p, moves)
            # The floor keeps directions in which the value hardly changes from counting as errors.
            gaps.append(abs(measured - expected) / max(abs(measured), abs(expected), 1e-6))
        says = f"the gradient is off by {min(gaps):.0%} of what the value does: is a term detached?"
        p.require(min(gaps) < 0.01, f"{says} If that is meant, say so in `exceptions`")


def _difference(p: Probe, moves: dict[int, Tensor], step: float = 1e-6) -> float:
    """Measure how fast the value changes as the student's tensors move so, by a central
    difference.
    """

    def value(sign: int) -> Tensor:
        moved = p.student.map(lambda x: x.detach() + sign * step * moves[id(x)])
        return replace(p, student=moved).value().detach()

    # In fp64 a step of 1e-6 costs about 1e-12 by curvature and 1e-10 by rounding.
    return float(value(1) - value(-1)) / (2 * step)
