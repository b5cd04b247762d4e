"""Turns a function into the check of a promise, from which a loss may be exempt."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kdkit.contracts.loss import Loss
from kdkit.errors import cause

Check = Callable[..., list[str]]
"""Called with a loss's class and options; returns what it could not verify."""

NAMES: set[str] = set()
"""Names of all checks."""


def promise(check: Callable[..., list[str] | None]) -> Check:
    """Turn a function into a check: it is skipped for a loss that lists it in its `exceptions`, and
    every error becomes an AssertionError.
    """

    @functools.wraps(check)
    def checked(cls: type[Loss], **options: Any) -> list[str]:
        # Here, not in `check_loss`: a test of a single promise skips declared exceptions too.
        if check.__name__ in cls.exceptions:
            return []
        try:
            return check(cls, **options) or []
        # Broken promises pass as they are; whatever else a loss raises names it, too.
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{cls.name}: {cause(error)}") from error

    # `exceptions` of a loss are checked against these names.
    NAMES.add(check.__name__)
    return checked
