"""Checks of what every loss promises, for anyone's plugin.

    from kdkit.testing import check_loss
    check_loss(MyLoss, temperature=2.0)                      # everything at once; options where there are some

    from kdkit.testing import LOSS_CHECKS                    # or, under pytest, a test per promise
    @pytest.mark.parametrize("check", LOSS_CHECKS, ids=lambda check: check.__name__)
    def test_my_loss(check):
        check(MyLoss, temperature=2.0)

A loss that compares layers is tried on maps, tokens and vectors; it may refuse some of them by a ShapeError in `setup`. A failure is an
AssertionError that says which promise is broken, and on what. `assert_agrees` compares a loss with a second derivation of its formula.
"""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdkit.contracts import Loss
from kdkit.errors import ShapeError
from kdkit.probes import CLASSES, DEGENERATE, FORMS, MISFITS, leaves, named, probe, probes, reads_layers, set_up, with_other_padding
from kdkit.probes import random_batch as random_batch
from kdkit.probes import random_outputs as random_outputs
from kdkit.records import Batch, Outputs

Formula = Callable[[Any, Outputs, Outputs, Batch], Tensor]


def check_is_documented(cls: type[Loss], **options: Any) -> None:
    """The class says what it computes, every option what it does."""
    assert cls.__dict__.get("__doc__"), f"{cls.name}: {cls.__name__} has no docstring"
    for key, option in cls.Options.model_fields.items():
        assert option.description, f"{cls.name}: option '{key}' lacks Field(description=...)"


def check_refuses_by_shape_error(cls: type[Loss], **options: Any) -> None:
    """What cannot be compared is refused in `setup`, by a ShapeError."""
    cases = [(form, shapes, CLASSES) for form, shapes in MISFITS.items()] if reads_layers(cls, options) else []
    for form, shapes, classes in [*cases, ("other numbers of classes", FORMS["maps of one shape"], CLASSES + 2)]:
        try:
            accepted = probe(cls, options, form, shapes, classes)
        except ShapeError as error:
            assert str(error), f"{cls.name}: on {form}: the ShapeError says nothing; name both shapes and what would help"
            continue
        try:
            accepted.value()
        except AssertionError as error:
            raise AssertionError(f"{error}; setup must refuse what forward cannot compare, by kdkit.ShapeError") from error


def check_is_a_finite_scalar(cls: type[Loss], **options: Any) -> None:
    """The value is one finite number of the student's type, and so is the gradient."""
    for p in probes(cls, options):
        value = p.value()
        p.require(value.dtype == p.student.logits.dtype, f"the value is {value.dtype}, the student's outputs are {p.student.logits.dtype}")
        p.require_finite()


def check_teaches_the_student(cls: type[Loss], **options: Any) -> None:
    """The gradient reaches every student layer that the loss names, or the logits."""
    for p in probes(cls, options):
        slopes = p.slopes()
        for name in {pair.student for pair in p.loss.options.taps()} or {"logits"}:
            if p.form != "maps of one pixel":  # whose attention, for one, is constant
                p.require(slopes[name].any(), f"no gradient reaches the student's '{name}': detached, or the arguments swapped?")


def check_adapters_learn(cls: type[Loss], **options: Any) -> None:
    """All that learns is among `parameters()`, and each of them moves within three steps."""
    for original in probes(cls, options):
        p, loss = original.learning(), original.copy_of_loss()
        known = {id(x) for x in [*loss.parameters(), *p.context.student.parameters(), *named(p.student).values()]}
        value = p.value(loss)
        p.require(value.requires_grad, "the value has no gradient")
        strangers = [tuple(leaf.shape) for leaf in leaves(value) if id(leaf) not in known]
        p.require(
            not strangers, f"a tensor {strangers[:1]} learns but is not among parameters(); an adapter's place is an nn.Module attribute"
        )
        weights = {name: weight for name, weight in loss.named_parameters() if weight.requires_grad}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        for seed in range(3 if weights else 0):
            slopes = torch.autograd.grad(p.value(loss, seed), list(weights.values()), allow_unused=True)
            with torch.no_grad():
                for weight, slope in zip(weights.values(), slopes, strict=True):
                    if slope is not None:
                        weight.sub_(slope, alpha=0.1)
        still = [name for name, weight in weights.items() if torch.equal(weight, before[name])]
        p.require(not still, f"no gradient reaches its parameters {still}")


def check_leaves_the_teacher_alone(cls: type[Loss], **options: Any) -> None:
    """No gradient for the teacher, and its network is not part of the loss."""
    for p in probes(cls, options):
        network = p.context.teacher or nn.Module()
        inside = {id(module) for module in p.loss.modules()} & {id(module) for module in network.modules()}
        p.require(not inside, "it holds the teacher's network as a submodule, to be trained and saved with it; keep it in a tuple")
        p.value()
        asked = [x for x in [*named(p.teacher).values(), *network.parameters()] if x.requires_grad]
        p.require(not asked, "it asks for a gradient of the teacher (requires_grad was switched on)")


def check_is_complete_after_setup(cls: type[Loss], **options: Any) -> None:
    """Nothing learnable or saved appears in `forward`: the optimizer was made before."""
    for p in probes(cls, options):
        lazy = [name for name, weight in p.loss.named_parameters() if isinstance(weight, nn.parameter.UninitializedParameter)]
        p.require(not lazy, f"{lazy} has no shape after setup; take it from the probe batch's shapes there")
        loss = p.copy_of_loss()
        before = set(loss.state_dict())
        p.value(loss)
        late = sorted(set(loss.state_dict()) - before)
        p.require(not late, f"forward creates {late}; that belongs in setup")


def check_leaves_its_inputs_alone(cls: type[Loss], **options: Any) -> None:
    """Outputs and batch are as they were."""
    for p in probes(cls, options):
        inputs = {"labels": p.batch.labels, "inputs": p.batch.inputs}
        for side, outputs in (("student", p.student), ("teacher", p.teacher)):
            inputs |= {f"{side}'s {name}": x for name, x in named(outputs).items()}
        before = copy.deepcopy(inputs)
        p.value()
        written = [name for name, x in inputs.items() if isinstance(x, Tensor) and not x.equal(before[name])]  # type: ignore[arg-type]
        p.require(not written, f"forward writes into its inputs: {', '.join(written)}")


def check_is_deterministic(cls: type[Loss], **options: Any) -> None:
    """One state, one seed, one value."""
    for p in probes(cls, options):
        p.require(torch.equal(p.value(), p.value()), "two copies give two values under one seed; draw from torch's global generator")


def check_ignores_the_order_of_samples(cls: type[Loss], **options: Any) -> None:
    """Shuffling the batch leaves the value (not asked of a loss that draws at random)."""
    for p in probes(cls, options):
        one, other = p.value(), p.rows("shuffled", [3, 0, 5, 1, 4, 2]).value()
        draws = not torch.equal(one, p.value(seed=1))
        p.require(draws or torch.allclose(one, other, rtol=1e-4, atol=1e-6), f"shuffling the batch turns {one:.6g} into {other:.6g}")


def check_takes_a_batch_of_one(cls: type[Loss], **options: Any) -> None:
    """One sample gives a finite value and gradient."""
    for p in probes(cls, options):
        p.rows("a batch of one", [0]).require_finite()


def check_survives_degenerate_inputs(cls: type[Loss], **options: Any) -> None:
    """Value and gradient stay finite, the gradient below 1e6, whatever the inputs."""
    for p in probes(cls, options):
        for form, (student, teacher) in DEGENERATE.items():
            p.changed(form, student, teacher).require_finite()
        pairs = p.loss.options.taps()
        if all(p.student.features[pair.student].shape == p.teacher.features[pair.teacher].shape for pair in pairs):
            alike = _renamed(p.student, {pair.teacher: pair.student for pair in pairs})
            replace(p, teacher=alike, form=f"{p.form}, student and teacher alike").require_finite()


def _renamed(outputs: Outputs, names: dict[str, str]) -> Outputs:
    views = {name: _renamed(view, names) for name, view in outputs.views.items()}
    return Outputs(outputs.logits, {new: outputs.features[name] for new, name in names.items()}, views)


def check_takes_rounded_inputs(cls: type[Loss], **options: Any) -> None:
    """Inputs rounded to bf16, as mixed precision gives them, change the value by little."""
    for p in probes(cls, options):
        rounded = p.changed("rounded to bf16", lambda x: x.bfloat16().to(x.dtype), lambda x: x.bfloat16().to(x.dtype))
        exact, value = p.value(), rounded.value()
        rounded.require(torch.allclose(value, exact, rtol=0.05, atol=1e-4), f"the value is {value:.6g}, in fp32 {exact:.6g}")


def check_takes_mixed_labels(cls: type[Loss], **options: Any) -> None:
    """Labels that are shares of the classes (B, K), as mixup makes them, are understood."""
    for p in probes(cls, options):
        one_hot = nn.functional.one_hot(p.batch.labels, CLASSES).float()
        batch = replace(p.batch, labels=0.7 * one_hot + 0.3 * one_hot.flip(0))
        replace(p, batch=batch, form=f"{p.form}, labels as shares (B, K)").require_finite()


def check_is_restored_from_its_state(cls: type[Loss], **options: Any) -> None:
    """A second loss that loads the state goes on with the same values; the state is tensors and plain values."""
    for p in probes(cls, options):
        loss = p.copy_of_loss()
        p.value(loss)  # a memory or a moving average has something in it then
        torch.save(loss.state_dict(), file := io.BytesIO())
        file.seek(0)
        try:
            state = torch.load(file, weights_only=True)
        except Exception as error:
            raise AssertionError(f"{cls.name}: its state_dict holds more than tensors and plain values: {error}") from error
        other = type(loss)(loss.options)
        set_up(other, p.student, p.teacher, p.context, p.form, seed=1)
        try:
            other.load_state_dict(state)
        except RuntimeError as error:
            raise AssertionError(f"{cls.name}: after setup it cannot load the state of one that was used: {error}") from error
        one, two = p.value(loss), p.value(other)
        p.require(torch.equal(one, two), f"with its state loaded it gives {two:.6g}, not {one:.6g}; what it remembers must be a buffer")


def check_ignores_padding(cls: type[Loss], **options: Any) -> None:
    """Of texts, what stands where there is no token changes nothing. A loss may refuse texts by a ShapeError."""
    if not reads_layers(cls, options) or cls.needs_views:  # of images
        return
    try:
        p = probe(cls, options, "texts", FORMS["tokens"], texts=True)
    except ShapeError:
        return
    value, changed = p.value(), replace(p, student=with_other_padding(p.student), teacher=with_other_padding(p.teacher)).value()
    p.require(torch.allclose(value, changed), f"other numbers in the padding turn the value from {value:.6g} into {changed:.6g}")


LOSS_CHECKS: list[Callable[..., None]] = [check for name, check in list(globals().items()) if name.startswith("check_")]


def check_loss(cls: type[Loss], **options: Any) -> None:
    """Check every promise of a loss that is built with these options.

    Raises:
        AssertionError: with a line for each broken promise.
    """
    broken = []
    for check in LOSS_CHECKS:
        try:
            check(cls, **options)
        except AssertionError as error:
            broken.append(f"{check.__name__}: {error}")
    if broken:
        raise AssertionError("\n".join(broken))


def assert_agrees(loss: Loss, formula: Formula, student: Outputs, teacher: Outputs, batch: Batch) -> None:
    """Compare value and gradients (for student and adapters) with `formula(loss, student, teacher, batch)`, a naive second derivation.

    The formula is computed in fp64; the loss must agree within 1e-6 in fp64 and 1e-4 in fp32, relative to the largest entry.
    """
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        ours = copy.deepcopy(loss).to(dtype)
        naive = copy.deepcopy(ours).double()
        s, t = (x.map(lambda value: value.detach().to(dtype)) for x in (student, teacher))  # noqa: B023
        got = _value_and_slopes(ours, ours, s, t, batch)
        wanted = _value_and_slopes(naive, functools.partial(formula, naive), s.map(Tensor.double), t.map(Tensor.double), batch)
        for name, exact in wanted.items():
            error, size = float((got[name] - exact).abs().max()), max(float(exact.abs().max()), 1e-6)
            assert error <= tolerance * size, f"{loss.name}: {name} is off by {error:.2e} of {size:.2e} in {dtype}"


def _value_and_slopes(loss: Loss, compute: Callable[..., Tensor], student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
    student = student.map(lambda x: x.clone().requires_grad_())
    if batch.labels.is_floating_point():
        batch = replace(batch, labels=batch.labels.to(student.logits.dtype))
    value = compute(student, teacher, batch)
    inputs = {**named(student), **{name: weight for name, weight in loss.named_parameters() if weight.requires_grad}}
    slopes = torch.autograd.grad(value, list(inputs.values()), allow_unused=True)
    found = {f"the gradient for {k}": torch.zeros_like(x) if g is None else g for (k, x), g in zip(inputs.items(), slopes, strict=True)}
    return {"the value": value.detach(), **found}
