"""Sets a loss up on the forms of layers that it accepts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from kdkit.contracts.loss import Context, Loss
from kdkit.contracts.records import Outputs
from kdkit.errors import ShapeError
from kdkit.testing.forms import CLASSES, FORMS, Shape, shapes_of
from kdkit.testing.networks import Network
from kdkit.testing.options import built, reads_layers
from kdkit.testing.outputs import of_texts, random_batch, random_outputs
from kdkit.testing.probe import Probe, readable

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
    layers = _layers(loss, shapes)
    networks = _networks(layers, classes)
    context = Context(
        networks[0],
        networks[1].eval().requires_grad_(False),
        classes,
        64,
        torch.arange(64) % classes,
    )
    outputs = classes, classes if teacher_classes is None else teacher_classes
    few, more = (_answers(cls, layers, outputs, size) for size in (4, 6))
    if texts:
        few, more = ((of_texts(s, shapes[0][0]), of_texts(t, shapes[1][0])) for s, t in (few, more))
    if cls.needs_networks:
        few, more = ((networks[0].answer(s), networks[1].answer(t)) for s, t in (few, more))
    set_up(loss, *few, context, form)
    # the teacher classifies two of three samples correctly
    predicted = more[1].logits.argmax(1)
    labels = torch.where(torch.arange(6) % 3 == 0, torch.arange(6), predicted) % classes
    return Probe(loss, *more, replace(random_batch(), labels=labels), context, form)


def _layers(loss: Loss, shapes: tuple[Shape, Shape]) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Name the layers that a loss reads, with the shapes of the student's and the teacher's."""
    pairs = loss.options.taps()
    student = {pair.student: shapes[0] for pair in pairs}
    teacher = {pair.teacher: shapes[1] for pair in pairs}
    if loss.knowledge == "labels":  # both layers of a pair are the student's
        student = {**teacher, **student}
    return student, teacher


def _networks(layers: tuple[dict[str, Shape], dict[str, Shape]], classes: int) -> list[Network]:
    """Make a student and a teacher with these layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [
            Network({name: shape for name, shape in shapes.items() if shape}, classes)
            for shapes in layers
        ]


def _answers(
    cls: type[Loss],
    layers: tuple[dict[str, Shape], dict[str, Shape]],
    classes: tuple[int, int],
    size: int,
) -> tuple[Outputs, Outputs]:
    """Draw an answer of the student and one of the teacher."""
    student, teacher = (
        random_outputs(
            layers[side], size=size, seed=size + side, views=cls.needs_views, classes=classes[side]
        )
        for side in (0, 1)
    )
    return student, teacher


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
        while len(_known) >= COUNT_KNOWN:
            del _known[next(iter(_known))]
        _known[key] = accepted
    return _known[key]


def _accepted(cls: type[Loss], options: Mapping[str, Any]) -> Iterator[Probe]:
    forms = FORMS if reads_layers(cls, options) else {"logits": ((), ())}
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
