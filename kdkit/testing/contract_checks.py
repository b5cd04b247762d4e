"""Checks of the contract: the docstring of a loss, its options, what it refuses."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from kdkit.contracts.loss import Loss
from kdkit.errors import ShapeError
from kdkit.testing.forms import CLASSES, FORMS, MISFITS, shapes_of
from kdkit.testing.operations import ConstantDraws
from kdkit.testing.options import is_valid, other_values, reads_layers, varied_options
from kdkit.testing.outputs import impossible_labels, twice_as_high, with_impossible
from kdkit.testing.probes import observations, probe_on, probes, some_probes
from kdkit.testing.promises import NAMES, promise
from kdkit.testing.stand_ins import meaning_of_rows


@promise
def check_is_documented(cls: type[Loss], **options: Any) -> None:
    """Check that the class documents what it computes, and every option what it does."""
    assert cls.__dict__.get("__doc__"), f"{cls.name}: {cls.__name__} has no docstring"
    for key, option in cls.Options.model_fields.items():
        assert option.description, f"{cls.name}: option '{key}' lacks Field(description=...)"
    # A misspelt exception would silently exempt from nothing.
    for name, reason in cls.exceptions.items():
        assert name in NAMES, f"{cls.name}: exceptions: there is no '{name}'"
        assert reason.strip(), f"{cls.name}: exceptions: '{name}' lacks its reason"


@promise
def check_says_its_reduction(cls: type[Loss], **options: Any) -> None:
    """Check that the docstring states the reduction; adding classes that neither model deems
    possible, and enlarging maps, show whether the value is a mean over them.
    """
    says = inspect.getdoc(cls) or ""
    formula = says.partition("Formula:")[2].partition("\n\n")[0] or says
    with contextlib.suppress(ShapeError):
        for growth, of in _growths(cls, options):
            grown = f"{cls.name}: with twice as many {of} the value is {growth:.2f} times as large"
            # Below 2, as a part of the value may not grow.
            if growth > 1.8:
                words = re.search(r"\bsum", formula)
                assert words, f"{grown}, and the formula says nothing of a sum"
            if of == "classes" and abs(growth - 0.5) < 0.01:
                words = re.search(
                    r"mean over [^,:;.]*\b(class|label|output|element|entr)|/ K\b", formula
                )
                assert words, f"{grown}, and the formula says nothing of a mean over them"


def _growths(cls: type[Loss], options: dict[str, Any]) -> Iterator[tuple[float, str]]:
    """Compute by which factor the value changes with twice as many classes, the new ones
    impossible, or positions, the same ones again.
    """
    p = some_probes(cls, options)[0]
    if cls.knowledge == "response":
        other = probe_on(cls, options, p.form, shapes_of(p.form), classes=2 * CLASSES)
        of, change = "classes", with_impossible
    elif p.form == "maps of one shape" and cls.knowledge == "feature":
        other = probe_on(cls, options, p.form, ((6, 16, 8), (6, 16, 8)))
        of, change = "positions", twice_as_high
    else:
        return
    # Set up on the larger shapes, but with the smaller probe's own numbers in them.
    batch = p.batch
    if batch.labels.ndim == 2 and of == "classes":
        batch = replace(batch, labels=impossible_labels(batch.labels, meaning_of_rows(p.loss)))
    more = replace(other, student=change(p.student), teacher=change(p.teacher), batch=batch)
    # A loss that draws would draw more numbers for more classes or positions.
    with ConstantDraws():
        yield float(more.value().detach()) / float(p.value().detach()), of


@promise
def check_refuses_by_shape_error(cls: type[Loss], **options: Any) -> None:
    """Check that `setup` refuses what it cannot compare, by a ShapeError."""
    misfits = MISFITS if reads_layers(cls, options) else {}
    cases = [(form, shapes, CLASSES) for form, shapes in misfits.items()]
    cases.append(("other numbers of classes", FORMS["maps of one shape"], CLASSES + 2))
    for form, shapes, classes in cases:
        try:
            accepted = probe_on(cls, options, form, shapes, classes)
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
def check_takes_two_classes(cls: type[Loss], **options: Any) -> None:
    """Check that two classes work, or that `setup` refuses them by a ShapeError."""
    p = some_probes(cls, options)[0]
    with contextlib.suppress(ShapeError):
        two = probe_on(cls, options, p.form, shapes_of(p.form), classes=2)
        replace(two, form=f"{p.form}, two classes").require_finite()


@promise
def check_options_are_bounded(cls: type[Loss], **options: Any) -> None:
    """Check that an option which may be 0, or negative, has finite values there; one that may not
    has a bound (`gt=0`).
    """
    for name in varied_options(cls):
        # The tuples are for options that are lists of numbers.
        for value in (0, -1, (0.0,), (-1.0,)):
            if is_valid(cls, {**options, name: value}):
                with contextlib.suppress(ShapeError):
                    _require_finite_with(cls, options, name, value)


def _require_finite_with(cls: type[Loss], options: dict[str, Any], name: str, value: Any) -> None:
    """Require finite values with another value of an option."""
    form = some_probes(cls, options)[0].form
    p = probe_on(cls, {**options, name: value}, form, shapes_of(form))
    advice = f"`{name}` may be {value}: bound it in its Field"
    try:
        finite = all(x.isfinite().all() for x in observations(p))
    except AssertionError as error:
        raise AssertionError(f"{error}; {advice}") from error
    p.require(finite, f"value or gradient is not finite, and {advice}")


@promise
def check_every_option_has_an_effect(cls: type[Loss], **options: Any) -> list[str]:
    """Check that another value of each option changes something: the value, a gradient, what is
    learnt or what is deployed.
    """
    unknown = []
    defaults = {
        name: value
        for name, value in options.items()
        if name == "layers" or cls.Options.model_fields[name].is_required()
    }
    # an option may switch another one off
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
    """Check whether two sets of options differ in anything on any form."""
    for p in probes(cls, options):
        try:
            other = probe_on(cls, changed, p.form, shapes_of(p.form))
        # the changed options refuse a form that the others take: that is a difference
        except ShapeError:
            return True
        before, after = observations(p), observations(other)
        if len(before) != len(after) or any(
            x.shape != y.shape or not x.equal(y) for x, y in zip(before, after, strict=True)
        ):
            return True
        deployed = [each.loss.deploy(each.context.student) for each in (p, other)]
        # Networks that are deployed are compared by type only: their weights are among the
        # observations.
        if type(deployed[0]) is not type(deployed[1]):
            return True
    return False
