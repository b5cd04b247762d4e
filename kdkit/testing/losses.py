"""The promises that every loss keeps, as functions that check them."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from kdkit.contracts.loss import Loss
from kdkit.contracts.loss_options import FeatureOptions
from kdkit.contracts.records import Batch, Outputs
from kdkit.errors import ShapeError
from kdkit.testing.operations import ConstantDraws, Operations, run_elsewhere
from kdkit.testing.probes import (
    CLASSES,
    DEGENERATE,
    FORMS,
    LARGEST,
    MISFITS,
    NO_LAYERS,
    STEEPEST,
    TWO_PAIRS,
    Probe,
    a_probe_of_each_kind,
    is_valid,
    leaves,
    named,
    observed,
    other_values,
    probe,
    probes,
    readable,
    reads_layers,
    set_up,
    some_probes,
    twice_as_high,
    varied_options,
    with_impossible,
    with_noise,
    with_other_padding,
)

Formula = Callable[[Any, Outputs, Outputs, Batch], Tensor]
Check = Callable[..., list[str]]

LOSS_CHECKS: list[Check] = []
"""A check for each promise: called with the loss's class and options, it gives what it could not
verify.
"""


def promise(check: Callable[..., list[str] | None]) -> Check:
    """Make a function one of the checks; it is not asked of a loss that declares it among its
    `exceptions`.
    """

    @functools.wraps(check)
    def asked(cls: type[Loss], **options: Any) -> list[str]:
        if check.__name__ in cls.exceptions:
            return []
        try:
            return check(cls, **options) or []
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(
                f"{cls.name}: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error

    LOSS_CHECKS.append(asked)
    return asked


@promise
def check_is_documented(cls: type[Loss], **options: Any) -> None:
    """The class says what it computes, every option what it does."""
    assert cls.__dict__.get("__doc__"), f"{cls.name}: {cls.__name__} has no docstring"
    for key, option in cls.Options.model_fields.items():
        assert option.description, f"{cls.name}: option '{key}' lacks Field(description=...)"
    for name, reason in cls.exceptions.items():
        assert name in [check.__name__ for check in LOSS_CHECKS], (
            f"{cls.name}: exceptions: there is no '{name}'"
        )
        assert reason.strip(), f"{cls.name}: exceptions: '{name}' lacks its reason"


@promise
def check_refuses_by_shape_error(cls: type[Loss], **options: Any) -> None:
    """What cannot be compared is refused in `setup`, by a ShapeError."""
    cases = (
        [(form, shapes, CLASSES) for form, shapes in MISFITS.items()]
        if reads_layers(cls, options)
        else []
    )
    for form, shapes, classes in [
        *cases,
        ("other numbers of classes", FORMS["maps of one shape"], CLASSES + 2),
    ]:
        try:
            accepted = probe(cls, options, form, shapes, classes)
        except ShapeError as error:
            assert str(error), (
                f"{cls.name}: on {form}: the ShapeError says nothing; name both shapes and what"
                " would help"
            )
            continue
        try:
            accepted.value()
        except AssertionError as error:
            raise AssertionError(
                f"{error}; setup must refuse what forward cannot compare, by kdkit.ShapeError"
            ) from error


@promise
def check_is_a_finite_scalar(cls: type[Loss], **options: Any) -> None:
    """The value is one finite number of the student's type, and so is the gradient."""
    for p in probes(cls, options):
        value = p.value()
        p.require(
            value.dtype == p.student.logits.dtype,
            f"the value is {value.dtype}, the student's outputs are {p.student.logits.dtype}",
        )
        p.require_finite()


@promise
def check_teaches_the_student(cls: type[Loss], **options: Any) -> None:
    """The gradient reaches every student layer that the loss names, or the logits."""
    for p in probes(cls, options):
        slopes = p.slopes()
        for name in {pair.student for pair in p.loss.options.taps()} or {"logits"}:
            if p.form != "maps of one pixel":  # whose attention, for one, is constant
                p.require(
                    slopes[name].any(),
                    f"no gradient reaches the student's '{name}': detached, or the arguments"
                    " swapped?",
                )


@promise
def check_adapters_learn(cls: type[Loss], **options: Any) -> None:
    """All that learns is among `parameters()`, and each of them moves within three steps."""
    for original in a_probe_of_each_kind(cls, options):
        p, loss = original.learning(), original.copy_of_loss()
        known = {
            id(x)
            for x in [
                *loss.parameters(),
                *p.context.student.parameters(),
                *named(p.student).values(),
            ]
        }
        value = p.value(loss)
        p.require(value.requires_grad, "the value has no gradient")
        strangers = [tuple(leaf.shape) for leaf in leaves(value) if id(leaf) not in known]
        p.require(
            not strangers,
            f"a tensor {strangers[:1]} learns but is not among parameters(); an adapter's place is"
            " an nn.Module attribute",
        )
        weights = {name: weight for name, weight in loss.named_parameters() if weight.requires_grad}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        for seed in range(3 if weights else 0):
            slopes = torch.autograd.grad(
                p.value(loss, seed), list(weights.values()), allow_unused=True
            )
            with torch.no_grad():
                for weight, slope in zip(weights.values(), slopes, strict=True):
                    if slope is not None:
                        weight.sub_(slope, alpha=0.1)
        still = [name for name, weight in weights.items() if torch.equal(weight, before[name])]
        p.require(not still, f"no gradient reaches its parameters {still}")


@promise
def check_leaves_the_teacher_alone(cls: type[Loss], **options: Any) -> None:
    """No gradient for the teacher, and its network is not part of the loss."""
    for p in a_probe_of_each_kind(cls, options):
        network = p.context.teacher or nn.Module()
        inside = {id(module) for module in p.loss.modules()} & {
            id(module) for module in network.modules()
        }
        p.require(
            not inside,
            "it holds the teacher's network as a submodule, to be trained and saved with it; keep"
            " it in a tuple",
        )
        given = p.copied()
        given.value(copies=False)
        asked = [
            x for x in [*named(given.teacher).values(), *network.parameters()] if x.requires_grad
        ]
        p.require(
            not asked, "it asks for a gradient of the teacher (requires_grad was switched on)"
        )


@promise
def check_is_complete_after_setup(cls: type[Loss], **options: Any) -> None:
    """Nothing learnable or saved appears in `forward`: the optimizer was made before."""
    for p in a_probe_of_each_kind(cls, options):
        lazy = [
            name
            for name, weight in p.loss.named_parameters()
            if isinstance(weight, nn.parameter.UninitializedParameter)
        ]
        p.require(
            not lazy,
            f"{lazy} has no shape after setup; take it from the probe batch's shapes there",
        )
        loss = p.copy_of_loss()
        before = set(loss.state_dict())
        p.value(loss)
        late = sorted(set(loss.state_dict()) - before)
        p.require(not late, f"forward creates {late}; that belongs in setup")


@promise
def check_leaves_its_inputs_alone(cls: type[Loss], **options: Any) -> None:
    """Outputs and batch are as they were."""
    for p in a_probe_of_each_kind(cls, options):
        given = p.copied()
        inputs = _inputs(given)
        before = {name: x.clone() for name, x in inputs.items()}
        given.value(copies=False)
        after = _inputs(given)
        written = [
            name for name, x in after.items() if name not in before or not x.equal(before[name])
        ] + [*(before.keys() - after.keys())]
        p.require(not written, f"forward writes into its inputs: {', '.join(written)}")


def _inputs(p: Probe) -> dict[str, Tensor]:
    """All that a loss is given, by name."""
    found = {"labels": p.batch.labels, "index": p.batch.index}
    if isinstance(p.batch.inputs, Tensor):
        found["inputs"] = p.batch.inputs
    for side, outputs in (("student", p.student), ("teacher", p.teacher)):
        found |= {f"{side}'s {name}": x for name, x in named(outputs).items()}
    return found


@promise
def check_is_deterministic(cls: type[Loss], **options: Any) -> None:
    """One state, one seed, one value."""
    for p in a_probe_of_each_kind(cls, options):
        p.require(
            torch.equal(p.value(), p.value()),
            "two copies give two values under one seed; draw from torch's global generator",
        )


@promise
def check_ignores_the_order_of_samples(cls: type[Loss], **options: Any) -> None:
    """Shuffling the batch leaves the value; a loss that draws at random draws the same for every
    sample here.
    """
    for p in a_probe_of_each_kind(cls, options):
        with ConstantDraws():
            one, other = p.value(), p.rows("shuffled", [3, 0, 5, 1, 4, 2]).value()
        p.require(
            torch.allclose(one, other, rtol=1e-4, atol=1e-6),
            f"shuffling the batch turns {one:.6g} into {other:.6g}",
        )


@promise
def check_takes_a_batch_of_one(cls: type[Loss], **options: Any) -> None:
    """One sample gives a finite value and gradient."""
    for p in probes(cls, options):
        p.rows("a batch of one", [0]).require_finite()


@promise
def check_survives_degenerate_inputs(cls: type[Loss], **options: Any) -> None:
    """Value and gradient stay finite whatever the inputs, the gradient below 1e6 (where the
    inputs are not huge).
    """
    for p in a_probe_of_each_kind(cls, options):
        for form, (student, teacher) in DEGENERATE.items():
            p.changed(form, student, teacher).require_finite(
                math.inf if form.startswith(LARGEST) else STEEPEST
            )
        pairs = p.loss.options.taps()
        if all(
            p.student.features[pair.student].shape == p.teacher.features[pair.teacher].shape
            for pair in pairs
        ):
            alike = _renamed(p.student, {pair.teacher: pair.student for pair in pairs})
            replace(p, teacher=alike, form=f"{p.form}, student and teacher alike").require_finite()


def _renamed(outputs: Outputs, names: dict[str, str]) -> Outputs:
    views = {name: _renamed(view, names) for name, view in outputs.views.items()}
    return Outputs(
        outputs.logits, {new: outputs.features[name] for new, name in names.items()}, views
    )


@promise
def check_takes_rounded_inputs(cls: type[Loss], **options: Any) -> None:
    """Inputs rounded to bf16, as mixed precision gives them, change the value by little."""
    for p in a_probe_of_each_kind(cls, options):
        rounded = p.changed(
            "rounded to bf16",
            lambda x: x.bfloat16().to(x.dtype),
            lambda x: x.bfloat16().to(x.dtype),
        )
        exact, value = p.value(), rounded.value()
        rounded.require(
            torch.allclose(value, exact, rtol=0.05, atol=1e-4),
            f"the value is {value:.6g}, in fp32 {exact:.6g}",
        )


@promise
def check_takes_mixed_labels(cls: type[Loss], **options: Any) -> None:
    """Labels that are shares of the classes (B, K), as mixup makes them, are understood."""
    for p in a_probe_of_each_kind(cls, options):
        one_hot = nn.functional.one_hot(p.batch.labels, CLASSES).float()
        batch = replace(p.batch, labels=0.7 * one_hot + 0.3 * one_hot.flip(0))
        replace(p, batch=batch, form=f"{p.form}, labels as shares (B, K)").require_finite()


@promise
def check_is_restored_from_its_state(cls: type[Loss], **options: Any) -> None:
    """A second loss that loads the state goes on with the same values; the state is tensors and
    plain values.
    """
    for p in a_probe_of_each_kind(cls, options):
        loss = p.copy_of_loss()
        p.value(loss)  # a memory or a moving average has something in it then
        torch.save(loss.state_dict(), file := io.BytesIO())
        file.seek(0)
        try:
            state = torch.load(file, weights_only=True)
        except Exception as error:
            raise AssertionError(
                f"{cls.name}: its state_dict holds more than tensors and plain values: {error}"
            ) from error
        other = type(loss)(loss.options)
        set_up(other, p.student, p.teacher, p.context, p.form, seed=1)
        try:
            other.load_state_dict(state)
        except RuntimeError as error:
            raise AssertionError(
                f"{cls.name}: after setup it cannot load the state of one that was used: {error}"
            ) from error
        one, two = p.value(loss), p.value(other)
        p.require(
            torch.equal(one, two),
            f"with its state loaded it gives {two:.6g}, not {one:.6g}; what it remembers must be a"
            " buffer",
        )


@promise
def check_ignores_padding(cls: type[Loss], **options: Any) -> None:
    """Of texts, what stands where there is no token changes nothing. A loss may refuse texts by
    a ShapeError.
    """
    if not reads_layers(cls, options) or cls.needs_views:  # of images
        return
    try:
        p = probe(cls, options, "texts", FORMS["tokens"], texts=True)
    except ShapeError:
        return
    value, changed = (
        p.value(),
        replace(
            p, student=with_other_padding(p.student), teacher=with_other_padding(p.teacher)
        ).value(),
    )
    p.require(
        torch.allclose(value, changed),
        f"other numbers in the padding turn the value from {value:.6g} into {changed:.6g}",
    )


@promise
def check_every_option_has_an_effect(cls: type[Loss], **options: Any) -> list[str]:
    """Another value of an option changes something: the value, a gradient, what is learnt or
    what is deployed.
    """
    unknown = []
    defaults = {
        name: value
        for name, value in options.items()
        if name == "layers" or cls.Options.model_fields[name].is_required()
    }
    # the options may switch off what another one is for
    bases = [options, defaults] if defaults != options else [options]
    for name in varied_options(cls):
        others = list(other_values(cls, options, name))
        if not others:
            unknown.append(
                f"whether option '{name}' has an effect: no other value of it is known to be valid"
            )
        elif not any(
            _differs(cls, base, {**base, name: value}) for base in bases for value in others
        ):
            raise AssertionError(
                f"{cls.name}: option '{name}' changes nothing; tried {', '.join(map(repr, others))}"
            )
    return unknown


def _differs(cls: type[Loss], options: dict[str, Any], changed: dict[str, Any]) -> bool:
    """Whether two sets of options differ in anything on any form."""
    for p in probes(cls, options):
        try:
            other = probe(cls, changed, p.form, FORMS.get(p.form, NO_LAYERS))
        except ShapeError:
            return True
        one, two = observed(p), observed(other)
        if len(one) != len(two) or any(
            x.shape != y.shape or not x.equal(y) for x, y in zip(one, two, strict=True)
        ):
            return True
        if type(p.loss.deploy(p.context.student)) is not type(
            other.loss.deploy(other.context.student)
        ):
            return True
    return False


@promise
def check_options_are_bounded(cls: type[Loss], **options: Any) -> None:
    """An option that may be 0, or negative, has finite values there; one that may not has a
    bound (`gt=0`).
    """
    for name in varied_options(cls):
        for value in (0, -1, (0.0,), (-1.0,)):
            changed = {**options, name: value}
            if not is_valid(cls, changed):
                continue
            for p in some_probes(cls, options)[:1]:
                with contextlib.suppress(ShapeError):
                    tried = probe(cls, changed, p.form, FORMS.get(p.form, NO_LAYERS))
                    try:
                        finite = all(x.isfinite().all() for x in observed(tried))
                    except AssertionError as error:
                        raise AssertionError(
                            f"{error}; `{name}` may be {value}: bound it in its Field"
                        ) from error
                    tried.require(
                        finite,
                        f"value or gradient is not finite, and `{name}` may be {value}: bound it in"
                        " its Field",
                    )


@promise
def check_reads_every_layer(cls: type[Loss], **options: Any) -> None:
    """Of several pairs of layers, the gradient reaches each student layer, and each teacher
    layer counts.
    """
    p = _on_two_pairs(cls, options)
    slopes, before = p.slopes(), observed(p)
    for pair in p.loss.options.taps():
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
        changed = observed(replace(p, teacher=with_noise(p.teacher, name)))
        same = all(x.equal(y) for x, y in zip(before, changed, strict=True))
        p.require(
            not same,
            f"other numbers of the teacher's '{name}' change neither value nor gradient: is it"
            " ignored?",
        )


def _on_two_pairs(cls: type[Loss], options: dict[str, Any]) -> Probe:
    """The loss on two pairs, whose four layers have four names, where it takes two and is not
    told which.
    """
    if "layers" not in options and issubclass(cls.Options, FeatureOptions):
        for form in (p.form for p in probes(cls, options)):
            with contextlib.suppress(ShapeError):
                return probe(cls, {**options, "layers": TWO_PAIRS}, form, FORMS[form])
    return some_probes(cls, options)[0]


@promise
def check_teaches_every_part(cls: type[Loss], **options: Any) -> None:
    """The gradient reaches every sample and every class or channel of what it reaches at all."""
    for p in some_probes(cls, options):
        for name, slope in p.slopes().items():
            if not slope.any():
                continue
            dimensions = {0: "samples"} | (
                {1: "classes" if name == "logits" else "channels"}
                if slope.ndim != 3
                else {2: "channels"}
            )
            for dimension, called in dimensions.items():
                silent = ~slope.movedim(dimension, 0).flatten(1).any(1)
                p.require(
                    not silent.any(),
                    f"no gradient reaches {int(silent.sum())} of {len(silent)} {called} of the"
                    f" student's '{name}'",
                )


@promise
def check_the_gradient_is_that_of_the_value(cls: type[Loss], **options: Any) -> None:
    """Value and gradient belong together, by finite differences: nothing on the way is detached."""
    for original in some_probes(cls, options):
        wide = replace(original.copy_of_loss_as(torch.float64), form=f"{original.form}, in fp64")
        p = wide.learning()
        given = {
            name: x
            for name, x in named(p.student).items()
            if name == "logits" or x is not p.student.logits
        }
        slopes = torch.autograd.grad(p.value(), list(given.values()), allow_unused=True)
        gaps = []
        for seed in range(3):
            moves = {
                id(x): torch.randn(
                    x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype
                )
                for x in given.values()
            }
            expected = sum(
                float((g * moves[id(x)]).sum())
                for x, g in zip(given.values(), slopes, strict=True)
                if g is not None
            )
            found = _difference(p, moves)
            gaps.append(abs(found - expected) / max(abs(found), abs(expected), 1e-6))
        says = f"the gradient is off by {min(gaps):.0%} of what the value does: is a term detached?"
        p.require(min(gaps) < 0.01, f"{says} If that is meant, say so in `exceptions`")


def _difference(p: Probe, moves: dict[int, Tensor], step: float = 1e-6) -> float:
    """How fast the value changes as the student's tensors move so, by a central difference."""

    def value(sign: int) -> Tensor:
        moved = p.student.map(lambda x: x.detach() + sign * step * moves[id(x)])
        return replace(p, student=moved).value().detach()

    return float(value(1) - value(-1)) / (2 * step)


@promise
def check_averages_over_the_batch(cls: type[Loss], **options: Any) -> None:
    """A batch that holds each sample twice has the same value: a sum over the samples would
    double.

    What relates samples to each other sees new, equal pairs there, and must only not grow by more
    than 60 %.
    """
    for p in some_probes(cls, options):
        with ConstantDraws():
            one, two = (
                float(p.value().detach()),
                float(p.rows("each sample twice", [*range(6), *range(6)]).value().detach()),
            )
        gap, most = (two - one, 0.6) if cls.knowledge == "relation" else (abs(two - one), 0.02)
        says = (
            f"with each sample twice the value is {two:.6g}, not {one:.6g}: divide sums over the"
            " batch by its size"
        )
        p.require(gap <= most * abs(one) + 1e-6, says)


@promise
def check_says_its_reduction(cls: type[Loss], **options: Any) -> None:
    """The docstring says over what the value is a mean: classes that neither model deems
    possible, and larger maps, tell.
    """
    says = inspect.getdoc(cls) or ""
    formula = says.partition("Formula:")[2].partition("\n\n")[0] or says
    with contextlib.suppress(ShapeError):
        for growth, of in _growths(cls, options):
            grown = f"{cls.name}: with twice as many {of} the value is {growth:.2f} times as large"
            if growth > 1.8:
                words = re.search(r"\bsum", formula)
                assert words, f"{grown}, and the formula says nothing of a sum"
            if of == "classes" and abs(growth - 0.5) < 0.01:
                words = re.search(r"mean over [^,:;.]*\b(class|element|entr)|/ K\b", formula)
                assert words, f"{grown}, and the formula says nothing of a mean over them"


def _growths(cls: type[Loss], options: dict[str, Any]) -> Iterator[tuple[float, str]]:
    """By which factor the value changes with twice as many classes, the new ones impossible, or
    positions, the same ones again.
    """
    p = some_probes(cls, options)[0]
    if cls.knowledge == "response":
        other = probe(cls, options, p.form, FORMS.get(p.form, NO_LAYERS), classes=2 * CLASSES)
        of, change = "classes", with_impossible
    elif p.form == "maps of one shape" and cls.knowledge == "feature":
        other = probe(cls, options, p.form, ((6, 16, 8), (6, 16, 8)))
        of, change = "positions", twice_as_high
    else:
        return
    more = replace(other, student=change(p.student), teacher=change(p.teacher), batch=p.batch)
    with ConstantDraws():
        yield float(more.value().detach()) / float(p.value().detach()), of


@promise
def check_takes_two_classes(cls: type[Loss], **options: Any) -> None:
    """Two classes will do, or `setup` refuses them by a ShapeError."""
    for p in some_probes(cls, options)[:1]:
        with contextlib.suppress(ShapeError):
            two = probe(cls, options, p.form, FORMS.get(p.form, NO_LAYERS), classes=2)
            replace(two, form=f"{p.form}, two classes").require_finite()


@promise
def check_stays_in_its_type(cls: type[Loss], **options: Any) -> None:
    """Forward makes no doubles of floats, which are slow on GPUs and not there on Apple's."""
    for p in some_probes(cls, options):
        with Operations() as seen:
            p.value()
        p.require(
            not seen.widening,
            f"forward makes fp64 tensors of fp32 ones (in {', '.join(sorted(seen.widening))})",
        )


@promise
def check_does_not_loop_over_the_batch(cls: type[Loss], **options: Any) -> None:
    """A larger batch takes as many operations."""
    p = some_probes(cls, options)[0]
    counts = []
    for some in (p, p.rows("each sample twice", [*range(6), *range(6)])):
        loss = some.copy_of_loss()
        with Operations() as seen:
            some.value(loss)
        counts.append(seen.count)
    says = f"{counts[0]} operations for 6 samples, {counts[1]} for 12: work on all samples at once"
    p.require(counts[1] <= counts[0], says)


@promise
def check_works_on_any_device(cls: type[Loss], **options: Any) -> list[str]:
    """Every tensor that forward uses is on the device of its inputs, or in a parameter or buffer
    that moves there with the loss.
    """
    unknown = []
    for p in some_probes(cls, options)[:1]:
        try:
            why = run_elsewhere(
                p.loss, p.student, readable(p.loss, p.teacher), p.batch, p.context.student
            )
        except RuntimeError as error:
            says = (
                "on an accelerator it mixes devices; make constants on the device of an input, or"
                " buffers of them"
            )
            raise AssertionError(f"{cls.name}: on {p.form}: {says}: {error}") from None
        if why:
            unknown.append(
                "whether it works on an accelerator: forward asks for values, which shapes alone"
                f" do not have ({why})"
            )
    return unknown


@promise
def check_keeps_no_graph(cls: type[Loss], **options: Any) -> None:
    """A second step does not reach back into the first: what is remembered is detached."""
    for original in some_probes(cls, options):
        p, loss = original.learning(), original.copy_of_loss()
        value = p.value(loss)
        own = {id(x) for x in [*p.context.student.parameters(), *loss.parameters()]}
        for module in loss.modules():
            for name, kept in vars(module).items():
                held = [
                    x
                    for x in tree_iter([kept])
                    if isinstance(x, Tensor) and x.grad_fn is not None and id(x) not in own
                ]
                held += [
                    x for x in module._buffers.values() if x is not None and x.grad_fn is not None
                ]
                p.require(
                    not held, f"it keeps the graph of a step, in '{name}': remember `x.detach()`"
                )
        torch.autograd.backward(value)
        try:
            torch.autograd.backward(p.learning().value(loss, seed=1))
        except (AssertionError, RuntimeError) as error:
            p.require(False, f"a second step fails: {' '.join(str(error).split())}")


@dataclass(frozen=True)
class Report:
    """What came of checking a loss that broke no promise.

    Attributes:
        loss: its name.
        kept: names of the checks that passed.
        exceptions: checks that the loss declares itself an exception to, with its reasons.
        not_verified: what nobody has looked at.
    """

    loss: str
    kept: tuple[str, ...]
    exceptions: Mapping[str, str]
    not_verified: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.loss}: {len(self.kept)} checks passed"]
        lines += [f"  exception to {name}: {reason}" for name, reason in self.exceptions.items()]
        return "\n".join([*lines, *(f"  not verified: {what}" for what in self.not_verified)])


FORMULA = (
    "the formula itself, such as the direction of a divergence, constant factors, and whether a"
    " mean over classes or positions is meant; give `reference=` a second, naive form of it"
)
PROCESSES = "the value over several processes (`gather`)"


def check_loss(cls: type[Loss], /, *, reference: Formula | None = None, **options: Any) -> Report:
    """Check every promise of a loss that is built with these options; prints what came of it.

    Args:
        cls: the loss.
        reference: its formula, written down a second time as simply as can be: called with (loss,
            student, teacher, batch), it gives the scalar that the loss should. It may raise
            ShapeError on forms that it leaves out.
        options: of the loss.

    Raises:
        AssertionError: with a line for each broken promise.
    """
    broken, unknown = [], [] if reference else [FORMULA]
    for check in LOSS_CHECKS:
        try:
            unknown += check(cls, **options)
        except AssertionError as error:
            broken.append(f"{check.__name__}: {error}")
    if reference:
        try:
            _compare(cls, reference, options)
        except AssertionError as error:
            broken.append(f"reference: {error}")
    if broken:
        raise AssertionError("\n".join(broken))
    if "gather" in cls.Options.model_fields:
        unknown.append(PROCESSES)
    kept = tuple(check.__name__ for check in LOSS_CHECKS if check.__name__ not in cls.exceptions)
    report = Report(cls.name, kept, dict(cls.exceptions), tuple(unknown))
    print(report)
    return report


def _compare(cls: type[Loss], reference: Formula, options: dict[str, Any]) -> None:
    """Hold the loss against its reference on every form that both take, at least one."""
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


def assert_agrees(
    loss: Loss, formula: Formula, student: Outputs, teacher: Outputs, batch: Batch
) -> None:
    """Compare value and gradients (for student and adapters) with `formula(loss, student,
    teacher, batch)`, a naive second derivation.

    The formula is computed in fp64; the loss must agree within 1e-6 in fp64 and 1e-4 in fp32,
    relative to the largest entry.
    """
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        ours = copy.deepcopy(loss).to(dtype)
        naive = copy.deepcopy(ours).double()
        s, t = (x.map(lambda value: value.detach().to(dtype)) for x in (student, teacher))  # noqa: B023
        got = _value_and_slopes(ours, ours, s, t, batch)
        wanted = _value_and_slopes(
            naive,
            functools.partial(formula, naive),
            s.map(Tensor.double),
            t.map(Tensor.double),
            batch,
        )
        for name, exact in wanted.items():
            error, size = (
                float((got[name] - exact).abs().max()),
                max(float(exact.abs().max()), 1e-6),
            )
            assert error <= tolerance * size, (
                f"{loss.name}: {name} is off by {error:.2e} of {size:.2e} in {dtype}"
            )


def _value_and_slopes(
    loss: Loss, compute: Callable[..., Tensor], student: Outputs, teacher: Outputs, batch: Batch
) -> dict[str, Tensor]:
    student = student.map(lambda x: x.clone().requires_grad_())
    if batch.labels.is_floating_point():
        batch = replace(batch, labels=batch.labels.to(student.logits.dtype))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        value = compute(student, teacher, batch)
    inputs = {
        **named(student),
        **{name: weight for name, weight in loss.named_parameters() if weight.requires_grad},
    }
    slopes = torch.autograd.grad(value, list(inputs.values()), allow_unused=True)
    found = {
        f"the gradient for {k}": torch.zeros_like(x) if g is None else g
        for (k, x), g in zip(inputs.items(), slopes, strict=True)
    }
    return {"the value": value.detach(), **found}
