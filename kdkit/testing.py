"""Checks of what every loss promises, for plugins of anyone.

    from kdkit.testing import check_loss
    check_loss(MyLoss, temperature=2.0)                      # everything; the options are optional

    from kdkit.testing import LOSS_CHECKS                    # or one test per promise, under pytest
    @pytest.mark.parametrize("check", LOSS_CHECKS, ids=lambda check: check.__name__)
    def test_my_loss(check):
        check(MyLoss, temperature=2.0)

A loss that compares layers is tried on maps, tokens and vectors; refusing some of them by a ShapeError in `setup` is fine. A failure is
an AssertionError that says which promise is broken and on what.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdkit.contracts import Batch, Context, FeatureOptions, Loss, Outputs
from kdkit.errors import ShapeError
from kdkit.objective import NoTeacher

Shape = tuple[int, ...]
Check = Callable[..., None]
Formula = Callable[[Any, Outputs, Outputs, Batch], Tensor]

CLASSES = 5
LARGEST_SLOPE = 1e6
"""What LOSSES with bounded gradients stay below on degenerate inputs."""

FORMS: Mapping[str, tuple[Shape, Shape]] = {
    "maps of one shape": ((6, 8, 8), (6, 8, 8)),
    "maps of other channels": ((6, 8, 8), (10, 8, 8)),
    "maps of half the size": ((6, 8, 8), (10, 4, 4)),
    "maps of twice the size": ((6, 4, 4), (10, 8, 8)),
    "maps of a third of the size": ((6, 9, 9), (10, 3, 3)),
    "tokens": ((9, 6), (9, 10)),
    "vectors": ((6,), (10,)),
}
MISFITS: Mapping[str, tuple[Shape, Shape]] = {
    "a map and a vector": ((6, 8, 8), (10,)),
    "tokens and a map": ((9, 6), (10, 3, 3)),
    "other numbers of tokens": ((9, 6), (16, 10)),
    "numbers without a dimension": ((), ()),
}


@dataclass(frozen=True)
class Probe:
    """A loss that was set up, what it is valued on, and in what form."""

    loss: Loss
    student: Outputs
    teacher: Outputs
    batch: Batch
    context: Context
    form: str

    def require(self, condition: object, says: str) -> None:
        if not condition:
            raise AssertionError(f"{self.loss.name}: on {self.form}: {says}")

    def value(self, seed: int = 0) -> Tensor:
        """The loss, by a fresh copy: its state does not change."""
        return self.value_by(self.copy(), seed)

    def copy(self) -> Loss:
        try:
            return copy.deepcopy(self.loss)
        except Exception as error:
            raise AssertionError(f"{self.loss.name}: copy.deepcopy fails after setup: {error}") from error

    def value_by(self, loss: Loss, seed: int = 0) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return loss(self.student, self.teacher, self.batch)  # type: ignore[no-any-return]
            except Exception as error:
                raise AssertionError(f"{loss.name}: on {self.form}: forward raises {type(error).__name__}: {error}") from error

    def slopes(self) -> dict[str, Tensor]:
        """The gradient for the student's logits and features, zero where the loss does not depend on them."""
        probe = replace(self, student=self.student.map(lambda x: x.detach().clone().requires_grad_()))
        tensors = {"logits": probe.student.logits, **probe.student.features}
        value = probe.value()
        self.require(value.requires_grad, "the value has no gradient: something on the way from the student is detached")
        found = torch.autograd.grad(value, list(tensors.values()), allow_unused=True)
        return {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(tensors.items(), found, strict=True)}

    def require_finite(self) -> None:
        value, slopes = self.value(), self.slopes()
        self.require(value.isfinite(), f"the value is {float(value.detach())}")
        for name, slope in slopes.items():
            self.require(slope.isfinite().all(), f"the gradient for the student's '{name}' is not finite")
            largest = float(slope.abs().max())
            self.require(
                largest <= LARGEST_SLOPE, f"the gradient for the student's '{name}' reaches {largest:.1e}, above {LARGEST_SLOPE:.0e}"
            )


class _Network(nn.Module):
    """Layers of the tapped names and a classifier, for losses that look into the networks."""

    def __init__(self, channels: Mapping[str, int]) -> None:
        super().__init__()
        for name, count in channels.items():
            self.add_module(name.replace(".", "_"), nn.BatchNorm2d(count))
        self.classifier = nn.Linear(next(iter(channels.values()), 6), CLASSES)

    def get_classifier(self) -> nn.Module:
        return self.classifier


def random_outputs(features: Mapping[str, Shape] | None = None, *, size: int = 6, classes: int = CLASSES, seed: int = 0) -> Outputs:
    """Normally distributed logits (size, classes) and features (size, *shape); the layer called `logits` is the logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, classes, generator=generator)
    drawn = {name: torch.randn(size, *shape, generator=generator) for name, shape in (features or {}).items()}
    return Outputs(logits, {name: logits if name == "logits" else x for name, x in drawn.items()})


def random_batch(size: int = 6, classes: int = CLASSES, seed: int = 0) -> Batch:
    """Grey noise with labels of every class in turn."""
    inputs = torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Batch(inputs, torch.arange(size) % classes, torch.arange(size))


def probe(cls: type[Loss], options: Mapping[str, Any], form: str, shapes: tuple[Shape, Shape], teacher_classes: int = CLASSES) -> Probe:
    """The loss, set up on a batch of 4 for a batch of 6.

    Raises:
        ShapeError: the loss refuses the form.
    """
    defaults = {"layers": [{"student": "a", "teacher": "a"}]} if issubclass(cls.Options, FeatureOptions) else {}
    loss = cls(cls.Options(**{**defaults, **options}))
    taps = [{pair.student: shapes[0] for pair in loss.options.taps()}, {pair.teacher: shapes[1] for pair in loss.options.taps()}]
    networks = [_Network({name: shape[0] for name, shape in names.items() if shape}).requires_grad_(i == 0) for i, names in enumerate(taps)]
    context = Context(networks[0], networks[1].eval(), CLASSES, 64, torch.arange(64) % CLASSES)

    def answers(size: int, seed: int) -> tuple[Outputs, Outputs]:
        teacher = random_outputs(taps[1], size=size, classes=teacher_classes, seed=seed + 1)
        return random_outputs(taps[0], size=size, seed=seed), NoTeacher() if cls.knowledge == "labels" else teacher

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            loss.setup(*answers(4, seed=10), context)
        except ShapeError:
            raise
        except Exception as error:
            raise AssertionError(f"{cls.name}: on {form}: setup raises {type(error).__name__}, not kdkit.ShapeError: {error}") from error
    return Probe(loss, *answers(6, seed=20), random_batch(), context, form)


def probes(cls: type[Loss], options: Mapping[str, Any]) -> Iterator[Probe]:
    """The loss on every form it accepts, at least one."""
    refusals = []
    for form, shapes in FORMS.items() if issubclass(cls.Options, FeatureOptions) else [("logits", ((), ()))]:
        try:
            accepted = probe(cls, options, form, shapes)
        except ShapeError as error:
            refusals.append(str(error))
            continue
        yield accepted
    if len(refusals) == len(FORMS) or (refusals and not issubclass(cls.Options, FeatureOptions)):
        raise AssertionError(f"{cls.name}: setup refuses every form tried; the last: {refusals[-1]}")


def check_is_documented(cls: type[Loss], **options: Any) -> None:
    """The class says what it computes, every option what it does."""
    assert cls.__dict__.get("__doc__"), f"{cls.name}: {cls.__name__} has no docstring"
    for key, option in cls.Options.model_fields.items():
        assert option.description, f"{cls.name}: option '{key}' lacks Field(description=...)"


def check_refuses_by_shape_error(cls: type[Loss], **options: Any) -> None:
    """What cannot be compared is refused in `setup`, by a ShapeError."""
    cases = [(form, shapes, CLASSES) for form, shapes in MISFITS.items()] if issubclass(cls.Options, FeatureOptions) else []
    for form, shapes, classes in [*cases, ("other numbers of classes", FORMS["maps of one shape"], CLASSES + 2)]:
        try:
            accepted = probe(cls, options, form, shapes, classes)
        except ShapeError as error:
            assert str(error), f"{cls.name}: on {form}: the ShapeError says nothing; name both shapes and what would help"
            continue
        accepted.require(accepted.value().shape == (), "setup accepts it, so the value must be a scalar")


def check_is_a_finite_scalar(cls: type[Loss], **options: Any) -> None:
    """The value is one finite number of the student's type."""
    for p in probes(cls, options):
        value = p.value()
        p.require(
            isinstance(value, Tensor) and value.shape == (), f"the value must be a scalar tensor, not {getattr(value, 'shape', value)}"
        )
        p.require(value.dtype == p.student.logits.dtype, f"the value is {value.dtype}, the student's outputs are {p.student.logits.dtype}")
        p.require_finite()


def check_teaches_the_student(cls: type[Loss], **options: Any) -> None:
    """The gradient reaches every student layer that the loss names, or the logits."""
    for p in probes(cls, options):
        slopes = p.slopes()
        for name in {pair.student for pair in p.loss.options.taps()} or {"logits"}:
            p.require(slopes[name].any(), f"no gradient reaches the student's '{name}': is it detached, or are the arguments swapped?")


def check_adapters_learn(cls: type[Loss], **options: Any) -> None:
    """All that learns is among `parameters()`, and each of them moves within three steps."""
    for p in probes(cls, options):
        loss = p.copy()
        before = {name: weight.detach().clone() for name, weight in loss.named_parameters() if weight.requires_grad}
        known = {id(x) for x in [*loss.parameters(), *p.context.student.parameters()]}
        p = replace(p, student=p.student.map(lambda x: x.detach().clone().requires_grad_()))
        known |= {id(x) for x in [p.student.logits, *p.student.features.values()]}
        strangers = [tuple(leaf.shape) for leaf in _leaves(p.value_by(loss)) if id(leaf) not in known]
        p.require(
            not strangers, f"a tensor of shape {strangers[:1]} learns but is not among parameters(); keep adapters in nn.Module attributes"
        )
        for seed in range(3 if before else 0):
            weights = [weight for weight in loss.parameters() if weight.requires_grad]
            found = torch.autograd.grad(p.value_by(loss, seed), weights, allow_unused=True)
            with torch.no_grad():
                for weight, slope in zip(weights, found, strict=True):
                    weight -= 0.1 * (0 if slope is None else slope)
        for name, weight in loss.named_parameters():
            p.require(name not in before or not torch.equal(weight, before[name]), f"no gradient reaches its parameter '{name}'")


def check_leaves_the_teacher_alone(cls: type[Loss], **options: Any) -> None:
    """No gradient for the teacher, and its network is not part of the loss."""
    for p in probes(cls, options):
        assert p.context.teacher is not None
        inside = {id(module) for module in p.loss.modules()} & {id(module) for module in p.context.teacher.modules()}
        p.require(not inside, "holds the teacher's network as a submodule: it would be trained and saved; keep it in a tuple")
        p.value()
        answers = [] if p.loss.knowledge == "labels" else [p.teacher.logits, *p.teacher.features.values()]
        asked = [x for x in [*answers, *p.context.teacher.parameters()] if x.requires_grad]
        p.require(not asked, "asks for a gradient of the teacher (requires_grad was switched on)")


def check_is_complete_after_setup(cls: type[Loss], **options: Any) -> None:
    """Nothing learnable or saved appears in `forward`: the optimizer was made before."""
    for p in probes(cls, options):
        loss = p.copy()
        lazy = [name for name, weight in loss.named_parameters() if isinstance(weight, nn.parameter.UninitializedParameter)]
        p.require(not lazy, f"{lazy} has no shape after setup; build it there, from the probe batch's shapes")
        before = set(loss.state_dict())
        p.value_by(loss)
        p.require(not (late := sorted(set(loss.state_dict()) - before)), f"forward creates {late}; build it in setup")


def check_leaves_its_inputs_alone(cls: type[Loss], **options: Any) -> None:
    """Outputs and batch are as they were."""
    for p in probes(cls, options):
        teacher = {} if p.loss.knowledge == "labels" else {"teacher's logits": p.teacher.logits, **p.teacher.features}
        inputs = {"student's logits": p.student.logits, **p.student.features, "labels": p.batch.labels, "images": p.batch.inputs}
        tensors = [(name, x, x.clone()) for name, x in [*inputs.items(), *teacher.items()] if isinstance(x, Tensor)]
        p.value()
        for name, now, before in tensors:
            p.require(torch.equal(now, before), f"forward writes into its input '{name}'")


def check_is_deterministic(cls: type[Loss], **options: Any) -> None:
    """One state, one seed, one value."""
    for p in probes(cls, options):
        p.require(torch.equal(p.value(), p.value()), "two copies give two values under one seed; draw from torch's global generator")


def check_ignores_the_order_of_samples(cls: type[Loss], **options: Any) -> None:
    """Shuffling the batch leaves the value (not asked of a loss that draws at random)."""
    for p in probes(cls, options):
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        batch = Batch(p.batch.inputs[order], p.batch.labels[order], p.batch.index[order]) if isinstance(p.batch.inputs, Tensor) else p.batch
        shuffled = replace(p, student=p.student.map(lambda x: x[order]), teacher=_mapped(p, lambda x: x[order]), batch=batch)
        one, other = p.value(), shuffled.value()
        random = not torch.equal(one, p.value(seed=1))
        p.require(random or torch.allclose(one, other, rtol=1e-4, atol=1e-6), f"shuffling the batch turns {one:.6g} into {other:.6g}")


def check_takes_a_batch_of_one(cls: type[Loss], **options: Any) -> None:
    """One sample gives a finite value and gradient."""
    for p in probes(cls, options):
        batch = Batch(p.batch.inputs[:1], p.batch.labels[:1], p.batch.index[:1]) if isinstance(p.batch.inputs, Tensor) else p.batch
        form = f"{p.form}, a batch of one"
        replace(p, student=p.student.map(lambda x: x[:1]), teacher=_mapped(p, lambda x: x[:1]), batch=batch, form=form).require_finite()


def check_survives_degenerate_inputs(cls: type[Loss], **options: Any) -> None:
    """Value and gradient stay finite, the gradient below 1e6."""
    for p in probes(cls, options):
        for name, (change_student, change_teacher) in DEGENERATE.items():
            changed = replace(p, student=p.student.map(change_student), teacher=_mapped(p, change_teacher), form=f"{p.form}, {name}")
            changed.require_finite()
        if p.loss.knowledge != "labels" and all(
            p.teacher.features[k].shape == x.shape for k, x in p.student.features.items() if k in p.teacher.features
        ):
            replace(
                p, teacher=Outputs(p.student.logits, {**p.teacher.features, **p.student.features}), form=f"{p.form}, student = teacher"
            ).require_finite()


def check_takes_rounded_inputs(cls: type[Loss], **options: Any) -> None:
    """Inputs rounded to bf16, as mixed precision gives them, change the value by little."""
    for p in probes(cls, options):
        rounded = replace(p, student=p.student.map(_bf16), teacher=_mapped(p, _bf16), form=f"{p.form}, rounded to bf16")
        exact, value = p.value(), rounded.value()
        rounded.require(torch.allclose(value, exact, rtol=0.05, atol=1e-4), f"the value is {value:.6g}, in fp32 {exact:.6g}")


def check_takes_mixed_labels(cls: type[Loss], **options: Any) -> None:
    """Labels that are shares of the classes (B, K), from mixup, are understood."""
    for p in probes(cls, options):
        shares = nn.functional.one_hot(p.batch.labels, CLASSES).float()
        mixed = replace(p, batch=replace(p.batch, labels=0.7 * shares + 0.3 * shares.flip(0)), form=f"{p.form}, mixed labels (B, K)")
        mixed.require_finite()


def check_is_restored_from_its_state(cls: type[Loss], **options: Any) -> None:
    """A second loss that loads the state goes on with the same values; the state is tensors alone."""
    for p in probes(cls, options):
        loss = p.copy()
        p.value_by(loss)  # so that a memory or a moving average has something in it
        torch.save(loss.state_dict(), file := io.BytesIO())
        file.seek(0)
        try:
            state = torch.load(file, weights_only=True)
        except Exception as error:
            raise AssertionError(f"{cls.name}: its state_dict holds more than tensors and plain values: {error}") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            other = type(loss)(loss.options)
            other.setup(p.student, p.teacher, p.context)
        other.load_state_dict(state)
        one, two = p.value_by(loss), p.value_by(other)
        p.require(
            torch.equal(one, two), f"restored from its state_dict it gives {two:.6g} for {one:.6g}; register what it remembers as a buffer"
        )


def check_loss(cls: type[Loss], **options: Any) -> None:
    """Check every promise of a loss, built with these options.

    Raises:
        AssertionError: one line for each broken promise.
    """
    broken = []
    for check in LOSS_CHECKS:
        try:
            check(cls, **options)
        except AssertionError as error:
            broken.append(f"{check.__name__}: {error}")
    assert not broken, "\n".join(broken)


def assert_agrees(loss: Loss, formula: Formula, student: Outputs, teacher: Outputs, batch: Batch) -> None:
    """Compare value and gradient (student and adapters) with a naive second derivation, `formula(loss, student, teacher, batch)`.

    The formula is taken in fp64, the loss in fp64 (to agree within 1e-6) and fp32 (1e-4), relative to the largest entry.
    """
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        rounded = copy.deepcopy(loss).to(dtype)
        ours = _with_slopes(rounded, rounded, student.map(lambda x: x.to(dtype)), teacher.map(lambda x: x.to(dtype)), batch)  # noqa: B023
        exact = copy.deepcopy(loss).to(dtype).double()
        wide = [outputs.map(lambda x: x.to(dtype).double()) for outputs in (student, teacher)]  # noqa: B023
        truth = _with_slopes(lambda *answers: formula(exact, *answers), exact, *wide, batch)  # noqa: B023
        for (name, got), wanted in zip(ours.items(), truth.values(), strict=True):
            atol = tolerance * max(float(wanted.abs().max()), 1e-6)
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=atol, msg=lambda m: f"{loss.name}, {dtype}, {name}: {m}")  # noqa: B023


def _with_slopes(value: Callable[..., Tensor], loss: Loss, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
    student = student.map(lambda x: x.detach().clone().requires_grad_())
    labels = batch.labels.to(student.logits.dtype) if batch.labels.ndim == 2 else batch.labels
    inputs = {"logits": student.logits, **student.features, **dict(loss.named_parameters())}
    result = value(student, teacher.detach(), replace(batch, labels=labels))
    slopes = torch.autograd.grad(result, list(inputs.values()), allow_unused=True)
    found = {f"gradient for {k}": torch.zeros_like(x) if g is None else g for (k, x), g in zip(inputs.items(), slopes, strict=True)}
    return {"value": result.detach(), **found}


def _leaves(value: Tensor) -> list[Tensor]:
    todo, seen, found = [value.grad_fn], set(), []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.append(leaf)
        todo += [parent for parent, _ in node.next_functions]
    return found


def _mapped(p: Probe, change: Callable[[Tensor], Tensor]) -> Outputs:
    return p.teacher if p.loss.knowledge == "labels" else p.teacher.map(change)


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def _same(x: Tensor) -> Tensor:
    return x


def _first_row_everywhere(x: Tensor) -> Tensor:
    return x[:1].expand_as(x).clone()


def _twins(x: Tensor) -> Tensor:
    return torch.cat([x[:1], x[:1], x[2:]])


def _near_twins(x: Tensor) -> Tensor:
    return torch.cat([x[:1], x[:1] * (1 + 2e-7), x[2:]])


def _first_row_zero(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:1]), x[1:]])


def _dead_channel(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1)


def _huge(x: Tensor) -> Tensor:
    return 1e4 * x.sign() if x.ndim == 2 else x


DEGENERATE: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "equal rows": (_first_row_everywhere, _same),
    "equal rows of the teacher": (_same, _first_row_everywhere),
    "two equal rows": (_twins, _same),
    "two rows equal but for rounding": (_near_twins, _same),
    "a row of zeros": (_first_row_zero, _same),
    "a row of zeros of the teacher": (_same, _first_row_zero),
    "zeros": (torch.zeros_like, _same),
    "zeros of the teacher": (_same, torch.zeros_like),
    "zeros on both sides": (torch.zeros_like, torch.zeros_like),
    "a dead channel": (_dead_channel, _dead_channel),
    "logits of 1e4": (_huge, _same),
    "logits of 1e4 of the teacher": (_same, _huge),
    "logits of 1e4 on both sides, opposed": (_huge, lambda x: -_huge(x)),
}

LOSS_CHECKS: list[Check] = [
    check_is_documented,
    check_refuses_by_shape_error,
    check_is_a_finite_scalar,
    check_teaches_the_student,
    check_adapters_learn,
    check_leaves_the_teacher_alone,
    check_is_complete_after_setup,
    check_leaves_its_inputs_alone,
    check_is_deterministic,
    check_ignores_the_order_of_samples,
    check_takes_a_batch_of_one,
    check_survives_degenerate_inputs,
    check_takes_rounded_inputs,
    check_takes_mixed_labels,
    check_is_restored_from_its_state,
]
