"""The options of a loss: which ones the loss itself has to implement, and which values are
valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from kdkit.contracts.loss import Loss
from kdkit.contracts.loss_options import FeatureOptions, LossOptions

ONE_PAIR = {"student": "a", "teacher": "a"}
TWO_PAIRS = [{"student": "a", "teacher": "b"}, {"student": "c", "teacher": "d"}]
# Their effect is not the loss's business, and `gather` needs several processes to have one.
OURS = ("layers", "gather")  # options that kdkit itself implements


def reads_layers(cls: type[Loss], options: Mapping[str, Any]) -> bool:
    """Check whether the loss compares layers, always or with these options."""
    return issubclass(cls.Options, FeatureOptions) or bool(options.get("layers"))


def varied_options(cls: type[Loss]) -> list[str]:
    """List the options that the loss itself has to implement."""
    return [name for name in cls.Options.model_fields if name not in OURS]


def built(cls: type[Loss], options: Mapping[str, Any]) -> LossOptions:
    """Build the options of a loss, with one pair of layers where it needs some.

    Raises:
        ValidationError: a value is not valid.
    """
    defaults = {"layers": [ONE_PAIR]} if issubclass(cls.Options, FeatureOptions) else {}
    return cls.Options(**{**defaults, **options})


def is_valid(cls: type[Loss], options: Mapping[str, Any]) -> bool:
    """Check whether a loss takes these options."""
    try:
        built(cls, options)
    except ValidationError:
        return False
    return True


def other_values(cls: type[Loss], options: Mapping[str, Any], name: str) -> Iterator[Any]:
    """Yield valid values of an option other than its present one."""
    field = cls.Options.model_fields[name]
    now = options.get(name, field.get_default(call_default_factory=True))
    # Also inside a union, such as `Literal[...] | None`.
    literals: list[Any] = [
        choice
        for annotation in (field.annotation, *get_args(field.annotation))
        for choice in get_args(annotation)
    ]
    values: list[Any] = [value for value in literals if isinstance(value, str | int | float)]
    if isinstance(now, bool):
        values = [not now]
    elif isinstance(now, int | float):
        values += [type(now)(value) for value in (2 * now, now / 2, now + 1, now - 1, 0.3)]
    elif isinstance(now, tuple) and all(isinstance(value, int | float) for value in now):
        values.append(tuple(2 * value for value in now))
    elif now is not None:  # a ramp
        values += [0.3, 0.7]
    # For 1, twice as much and one more are the same value.
    for value in dict.fromkeys(values):
        if value != now and is_valid(cls, {**options, name: value}):
            yield value
