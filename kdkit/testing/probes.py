"""What `kdkit.testing` tries a loss on: layers of many shapes, hard inputs, and how a loss is
valued there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kdkit.contracts.features import as_vectors, is_padded
from kdkit.contracts.loss import Context, Loss
from kdkit.contracts.loss_options import FeatureOptions
from kdkit.contracts.records import Batch, Outputs
from kdkit.engine.objective import no_teacher
from kdkit.errors import ShapeError

Shape = tuple[int, ...]
Change = Callable[[Tensor], Tensor]

CLASSES = 5
ONE_PAIR = {"student": "a", "teacher": "a"}
TWO_PAIRS = [{"student": "a", "teacher": "b"}, {"student": "c", "teacher": "d"}]
NO_LAYERS: tuple[Shape, Shape] = ((), ())
OURS = ("layers", "gather")  # options that kdkit itself carries out
STEEPEST = 1e6

# Shapes of the tapped layers, student's and teacher's, without the batch.
FORMS: Mapping[str, tuple[Shape, Shape]] = {
    "maps of one shape": ((6, 8, 8), (6, 8, 8)),
    "maps of other channels": ((6, 8, 8), (10, 8, 8)),
    "maps of half the size": ((6, 8, 8), (10, 4, 4)),
    "maps of twice the size": ((6, 4, 4), (10, 8, 8)),
    "maps of a third of the size": ((6, 9, 9), (10, 3, 3)),
    "maps of one pixel": ((6, 1, 1), (10, 1, 1)),
    "tokens": ((9, 6), (9, 10)),
    "tokens and a map": ((17, 6), (10, 4, 4)),
    "a map and tokens": ((6, 8, 8), (16, 10)),
    "other numbers of tokens": ((10, 6), (16, 10)),
    "vectors": ((6,), (10,)),
}
MISFITS: Mapping[str, tuple[Shape, Shape]] = {
    "a map and a vector": ((6, 8, 8), (10,)),
    "tokens of no square grid and a map": ((15, 6), (10, 3, 3)),
    "features without a dimension": ((), ()),
}


@dataclass(frozen=True)
class Probe:
    """A loss that was set up, what it is valued on, and the name of that.

    Attributes:
        loss: after `setup`; what is valued are copies, so that its state stays.
        student, teacher, batch: as in training; a loss on labels gets no teacher to read all the
            same.
        context: what `setup` was given.
        form: for messages.
    """

    loss: Loss
    student: Outputs
    teacher: Outputs
    batch: Batch
    context: Context
    form: str

    def require(self, condition: object, says: str) -> None:
        if not condition:
            raise AssertionError(f"{self.loss.name}: on {self.form}: {says}")

    def copy_of_loss(self) -> Loss:
        try:
            # a layer of the student that the loss reads stays that layer
            return copy.deepcopy(
                self.loss, {id(part): part for part in self.context.student.modules()}
            )
        except Exception as error:
            raise AssertionError(
                f"{self.loss.name}: copy.deepcopy fails after setup: {error}"
            ) from error

    def value(self, loss: Loss | None = None, seed: int = 0, *, copies: bool = True) -> Tensor:
        """What the loss (by default a fresh copy) comes to, on copies of the inputs, in which it
        may write.
        """
        loss = loss or self.copy_of_loss()
        given = self.copied() if copies else self
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
        """The same, on copies of the inputs, through which a gradient reaches the inputs."""
        student, teacher = self.student.map(torch.clone), self.teacher.map(torch.clone)
        return replace(self, student=student, teacher=teacher, batch=self.batch.map(torch.clone))

    def learning(self) -> Probe:
        """The same, with a student that asks for a gradient."""
        return replace(
            self, student=self.student.map(lambda x: x.detach().clone().requires_grad_())
        )

    def copy_of_loss_as(self, dtype: torch.dtype) -> Probe:
        """The same in another type."""
        loss = self.copy_of_loss().to(dtype)
        student, teacher = (
            outputs.map(lambda x: x.to(dtype)) for outputs in (self.student, self.teacher)
        )
        return replace(self, loss=loss, student=student, teacher=teacher)

    def slopes(self) -> dict[str, Tensor]:
        """The gradient for the student's logits and features, zero where the loss does not
        depend on them.
        """
        return self._value_and_slopes()[1]

    def _value_and_slopes(self) -> tuple[float, dict[str, Tensor]]:
        probe = self.learning()
        tensors = named(probe.student)
        value = probe.value()
        self.require(
            value.requires_grad,
            "the value has no gradient: something on the way from the student is detached",
        )
        found = torch.autograd.grad(value, list(tensors.values()), allow_unused=True)
        slopes = {
            name: torch.zeros_like(x) if g is None else g
            for (name, x), g in zip(tensors.items(), found, strict=True)
        }
        return float(value.detach()), slopes

    def require_finite(self, steepest: float = STEEPEST) -> None:
        """Value and gradient are finite, the gradient within bounds."""
        value, slopes = self._value_and_slopes()
        self.require(math.isfinite(value), f"the value is {value}")
        for name, slope in slopes.items():
            self.require(
                slope.isfinite().all(), f"the gradient for the student's '{name}' is not finite"
            )
            says = (
                f"the gradient for the student's '{name}' reaches {float(slope.abs().max()):.1e},"
                f" above {steepest:.0e}"
            )
            self.require(float(slope.abs().max()) <= steepest, says)

    def changed(self, form: str, student: Change, teacher: Change) -> Probe:
        return replace(
            self,
            student=self.student.map(student),
            teacher=self.teacher.map(teacher),
            form=f"{self.form}, {form}",
        )

    def rows(self, form: str, index: list[int]) -> Probe:
        """Only those samples, in that order."""
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
    """What is said of those samples; a view holds a copy of all `size` of them, then the next."""
    own = replace(outputs, views={}).map(
        lambda x: torch.cat([copy[index] for copy in torch.split(x, size)])
    )
    return replace(
        own, views={name: _rows(view, index, size) for name, view in outputs.views.items()}
    )


def named(outputs: Outputs) -> dict[str, Tensor]:
    """Its tensors: the logits, the features by layer, those of views with the view's name
    before.
    """
    views = {
        f"{name} {of}": x for name, view in outputs.views.items() for of, x in named(view).items()
    }
    return {"logits": outputs.logits, **outputs.features, **views}


class Network(nn.Module):
    """Stands for a network in the context: batch norms called like the tapped layers, and a
    classifier of the last one's mean.
    """

    def __init__(self, layers: Mapping[str, Shape], classes: int = CLASSES) -> None:
        super().__init__()
        for name, shape in layers.items():
            norm = nn.BatchNorm2d(width(shape))
            nn.init.normal_(norm.bias)
            self.add_module(name.replace(".", "_"), norm)
        self.last = next(reversed(list(layers)), None)
        self.classes, self.classifier = (
            classes,
            nn.Linear(width(layers[self.last]) if self.last else 6, classes),
        )

    def answer(self, outputs: Outputs) -> Outputs:
        """Outputs whose logits are what the classifier makes of the last layer."""
        if self.last is None or outputs.logits.shape[1] != self.classes or self.last == "logits":
            return outputs
        with torch.no_grad():
            return replace(outputs, logits=self.classifier(as_vectors(outputs.features[self.last])))

    def get_classifier(self) -> nn.Module:
        return self.classifier


def width(shape: Shape) -> int:
    """Channels of a map or of tokens or a vector."""
    return as_vectors(torch.empty(1, *shape)).shape[1]


def readable(loss: Loss, teacher: Outputs) -> Outputs:
    """What the loss may read of the teacher: nothing, if it is on labels."""
    return no_teacher() if loss.knowledge == "labels" else teacher


def random_outputs(
    features: Mapping[str, Shape] | None = None,
    *,
    size: int = 6,
    classes: int = CLASSES,
    seed: int = 0,
    views: Mapping[str, int] | None = None,
) -> Outputs:
    """Normally distributed logits (size, classes) and features (size, *shape); a layer called
    `logits` is the logits.

    `views` asks for views of so many copies of each sample.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, classes, generator=generator)
    drawn = {
        name: torch.randn(size, *shape, generator=generator)
        for name, shape in (features or {}).items()
    }
    seen = {
        name: random_outputs(features, size=n * size, classes=classes, seed=seed + 100 * n)
        for name, n in (views or {}).items()
    }
    return Outputs(
        logits, {name: logits if name == "logits" else x for name, x in drawn.items()}, seen
    )


def random_batch(size: int = 6, classes: int = CLASSES, seed: int = 0) -> Batch:
    """Noise images with every class in turn."""
    inputs = torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Batch(inputs, torch.arange(size) % classes, torch.arange(size))


def of_texts(outputs: Outputs, tokens: int) -> Outputs:
    """The same answer, of texts of unequal lengths: the first is full, the others end with
    padding.
    """
    places = torch.arange(len(outputs.logits))[:, None]
    return outputs.masked(torch.arange(tokens) < tokens - places % tokens)


def with_other_padding(outputs: Outputs) -> Outputs:
    """The same answer, with other numbers where there is no token."""
    mask = outputs.mask
    assert mask is not None
    noise = torch.Generator().manual_seed(round(1000 * float(outputs.logits.detach().sum())))
    return outputs.map(
        lambda x: (
            torch.where(mask[:, :, None], x, 7 * torch.randn(x.shape, generator=noise))
            if is_padded(x, mask)
            else x
        )
    )


def probe(
    cls: type[Loss],
    options: Mapping[str, Any],
    form: str,
    shapes: tuple[Shape, Shape],
    teacher_classes: int | None = None,
    *,
    classes: int = CLASSES,
    texts: bool = False,
) -> Probe:
    """The loss, set up on four samples for a batch of six; of `texts` that are as long as the
    shapes say, or shorter.

    Raises:
        ShapeError: the loss refuses the form.
    """
    defaults = {"layers": [ONE_PAIR]} if issubclass(cls.Options, FeatureOptions) else {}
    loss = cls(cls.Options(**{**defaults, **options}))
    # then both sides of a pair are the student's
    pairs, own = loss.options.taps(), cls.knowledge == "labels"
    layers = (
        {pair.student: shapes[0] for pair in pairs},
        {pair.teacher: shapes[1] for pair in pairs},
    )
    if own:
        layers = {**layers[1], **layers[0]}, layers[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks = [
            Network({name: shape for name, shape in names.items() if shape}, classes)
            for names in layers
        ]
    context = Context(
        networks[0],
        networks[1].eval().requires_grad_(False),
        classes,
        64,
        torch.arange(64) % classes,
    )
    theirs = classes if teacher_classes is None else teacher_classes
    few, more = (
        (
            random_outputs(layers[0], size=size, seed=size, views=cls.needs_views, classes=classes),
            random_outputs(
                layers[1], size=size, seed=size + 1, views=cls.needs_views, classes=theirs
            ),
        )
        for size in (4, 6)
    )
    if texts:
        few, more = ((of_texts(s, shapes[0][0]), of_texts(t, shapes[1][0])) for s, t in (few, more))
    if cls.needs_networks:
        few, more = ((networks[0].answer(s), networks[1].answer(t)) for s, t in (few, more))
    set_up(loss, *few, context, form)
    # mostly, as teachers are
    right = (
        torch.where(torch.arange(6) % 3 == 0, torch.arange(6), more[1].logits.argmax(1)) % classes
    )
    return Probe(loss, *more, replace(random_batch(), labels=right), context, form)


def set_up(
    loss: Loss, student: Outputs, teacher: Outputs, context: Context, form: str, seed: int = 0
) -> None:
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


def reads_layers(cls: type[Loss], options: Mapping[str, Any]) -> bool:
    """Whether the loss compares layers always, or by these options."""
    return issubclass(cls.Options, FeatureOptions) or bool(options.get("layers"))


# the last few: every check asks for the same ones
_KNOWN: dict[tuple[type[Loss], str], list[Probe]] = {}


def probes(cls: type[Loss], options: Mapping[str, Any]) -> list[Probe]:
    """The loss on every form that it accepts, at least one."""
    key = cls, repr(sorted(options.items()))
    if key not in _KNOWN:
        found = list(_probes(cls, options))
        while len(_KNOWN) > 3:
            del _KNOWN[next(iter(_KNOWN))]
        _KNOWN[key] = found
    return _KNOWN[key]


def some_probes(cls: type[Loss], options: Mapping[str, Any]) -> list[Probe]:
    """The first two of those forms, of which a map of one pixel says too little."""
    return [p for p in probes(cls, options) if p.form != "maps of one pixel"][:2] or probes(
        cls, options
    )[:1]


def a_probe_of_each_kind(cls: type[Loss], options: Mapping[str, Any]) -> list[Probe]:
    """The first accepted form of each kind: maps, maps of one pixel, tokens, vectors."""
    kinds: dict[tuple[int, bool], Probe] = {}
    for p in probes(cls, options):
        shapes = FORMS.get(p.form, NO_LAYERS)
        kinds.setdefault((len(shapes[0]), p.form == "maps of one pixel"), p)
    return list(kinds.values())


def _probes(cls: type[Loss], options: Mapping[str, Any]) -> Iterator[Probe]:
    forms = FORMS if reads_layers(cls, options) else {"logits": ((), ())}
    refusals = []
    for form, shapes in forms.items():
        try:
            accepted = probe(cls, options, form, shapes)
        except ShapeError as error:
            refusals.append(str(error))
            continue
        yield accepted
    if len(refusals) == len(forms):
        raise AssertionError(
            f"{cls.name}: setup refuses every form tried; the last: {refusals[-1]}"
        )


def varied_options(cls: type[Loss]) -> list[str]:
    """The options that the loss itself has to carry out."""
    return [name for name in cls.Options.model_fields if name not in OURS]


def is_valid(cls: type[Loss], options: Mapping[str, Any]) -> bool:
    defaults = {"layers": [ONE_PAIR]} if issubclass(cls.Options, FeatureOptions) else {}
    try:
        cls.Options(**{**defaults, **options})
    except ValidationError:
        return False
    return True


def other_values(cls: type[Loss], options: Mapping[str, Any], name: str) -> Iterator[Any]:
    """Valid values of an option other than its present one."""
    field = cls.Options.model_fields[name]
    now = options.get(name, field.get_default(call_default_factory=True))
    choices: list[Any] = [
        choice
        for part in (field.annotation, *get_args(field.annotation))
        for choice in get_args(part)
    ]
    found: list[Any] = [choice for choice in choices if isinstance(choice, str | int | float)]
    if isinstance(now, bool):
        found = [not now]
    elif isinstance(now, int | float):
        found += [type(now)(value) for value in (2 * now, now / 2, now + 1, now - 1, 0.3)]
    elif isinstance(now, tuple) and all(isinstance(value, int | float) for value in now):
        found.append(tuple(2 * value for value in now))
    elif now is not None:  # a ramp
        found += [0.3, 0.7]
    for value in dict.fromkeys(found):
        if value != now and is_valid(cls, {**options, name: value}):
            yield value


def observed(p: Probe) -> list[Tensor]:
    """Value, gradient and the value after it, and what is learnt."""
    probe, loss = p.learning(), p.copy_of_loss()
    value = probe.value(loss)
    weights = [weight for weight in loss.parameters() if weight.requires_grad]
    inputs = list(named(probe.student).values())
    found = [value.detach(), *weights]
    if value.requires_grad:
        slopes = torch.autograd.grad(value, [*inputs, *weights], allow_unused=True)
        found += [
            torch.zeros_like(x) if g is None else g
            for x, g in zip([*inputs, *weights], slopes, strict=True)
        ]
    return [*found, probe.value(loss, seed=1).detach()]


def with_noise(outputs: Outputs, name: str) -> Outputs:
    """The same answer, with other numbers of one layer (or the logits), in all views."""

    def other(x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(9))

    views = {of: with_noise(view, name) for of, view in outputs.views.items()}
    logits = other(outputs.logits) if name == "logits" else outputs.logits
    features = {layer: other(x) if layer == name else x for layer, x in outputs.features.items()}
    return Outputs(logits, features, views)


def with_impossible(outputs: Outputs) -> Outputs:
    """The same answer over twice as many classes, the new ones of probability 0."""
    return replace(
        outputs, logits=torch.cat([outputs.logits, torch.full_like(outputs.logits, -1e4)], 1)
    )


def twice_as_high(outputs: Outputs) -> Outputs:
    """The same answer, with maps that hold everything twice, one above the other."""
    return replace(
        outputs, features={name: torch.cat([x, x], 2) for name, x in outputs.features.items()}
    )


def leaves(value: Tensor) -> list[Tensor]:
    """The tensors that a backward pass from `value` would give a gradient."""
    todo = [value.grad_fn]
    seen = set()
    found = []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.append(leaf)
        todo += [parent for parent, _ in node.next_functions]
    return found


def as_it_is(x: Tensor) -> Tensor:
    return x


def equal_rows(x: Tensor) -> Tensor:
    return x[:1].expand_as(x).clone()


def huge_logits(x: Tensor) -> Tensor:
    return 1e4 * x.sign() if x.ndim == 2 else x


def certain(x: Tensor) -> Tensor:
    return 100.0 * (x == x.amax(1, keepdim=True)) if x.ndim == 2 else x


LARGEST = "numbers up to 6e4"  # where a gradient may be large for good reasons


def constant(x: Tensor) -> Tensor:
    return torch.ones_like(x) if x.ndim > 2 else x


def tiny(x: Tensor) -> Tensor:
    return 1e-6 * torch.ones_like(x) if x.ndim > 2 else x


def smallest(x: Tensor) -> Tensor:
    return 1e-8 * x


def largest(x: Tensor) -> Tensor:
    return 6e4 * x.clamp(-1, 1)  # what fp16 holds


# What happens to the student's tensors, and to the teacher's.
DEGENERATE: Mapping[str, tuple[Change, Change]] = {
    "equal rows": (equal_rows, as_it_is),
    "equal rows of the teacher": (as_it_is, equal_rows),
    "two equal rows": (lambda x: torch.cat([x[:1], x[:1], x[2:]]), as_it_is),
    "two rows equal but for rounding": (
        lambda x: torch.cat([x[:1], x[:1] * (1 + 2e-7), x[2:]]),
        as_it_is,
    ),
    "a row of zeros": (lambda x: torch.cat([0 * x[:1], x[1:]]), as_it_is),
    "a row of zeros of the teacher": (as_it_is, lambda x: torch.cat([0 * x[:1], x[1:]])),
    "zeros": (torch.zeros_like, as_it_is),
    "zeros of the teacher": (as_it_is, torch.zeros_like),
    "zeros on both sides": (torch.zeros_like, torch.zeros_like),
    "a dead channel": (
        lambda x: torch.cat([0 * x[:, :1], x[:, 1:]], 1),
        lambda x: torch.cat([0 * x[:, :1], x[:, 1:]], 1),
    ),
    "constant maps": (constant, as_it_is),
    "constant maps on both sides": (constant, constant),
    "constant maps of 1e-6": (tiny, as_it_is),
    "numbers of 1e-8": (smallest, as_it_is),
    "numbers of 1e-8 of the teacher": (as_it_is, smallest),
    LARGEST: (largest, as_it_is),
    f"{LARGEST} on both sides, opposed": (largest, lambda x: -largest(x)),
    "logits of 1e4": (huge_logits, as_it_is),
    "logits of 1e4 of the teacher": (as_it_is, huge_logits),
    "a teacher that is certain": (as_it_is, certain),
    "logits of 1e4 on both sides, opposed": (huge_logits, lambda x: -huge_logits(x)),
}
