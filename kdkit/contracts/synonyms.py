"""Maps the names that plugins and their files use to the core's own names.

A network gives `outputs` values for each row that it answers. If these are classes, their number is
usually called `num_classes`; plugins may use that name.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any, TypeVar

SYNONYMS = {"num_classes": "outputs"}

T = TypeVar("T")


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same values under the core's own names."""
    return {SYNONYMS.get(name, name): value for name, value in values.items()}


def with_synonyms(cls: type[T]) -> type[T]:
    """Make a record accept the other names as keywords and offer them as attributes."""
    # wrapped after @dataclass has generated it
    init = cls.__init__

    @functools.wraps(init)
    def create(self: Any, *values: Any, **named: Any) -> None:
        init(self, *values, **renamed(named))

    cls.__init__ = create  # type: ignore[method-assign]
    for other, name in SYNONYMS.items():
        setattr(cls, other, property(operator.attrgetter(name)))
    return cls
