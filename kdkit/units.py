"""Formats large numbers and sizes with the prefixes k, M and G, and small ones."""

from __future__ import annotations

import math


def with_unit(number: float) -> str:
    """Format a large number as `1.23 M`."""
    value, prefix = _scaled(number)
    return f"{value:,.2f} {prefix}" if prefix else f"{number:,.0f}"


def gigabytes(count: int) -> str:
    """Format a size as `1.62 GB`; small sizes in smaller units."""
    value, prefix = _scaled(count, least=1e3)
    return f"{value:,.3g} {prefix}B" if value < 1000 else f"{value:,.0f} {prefix}B"


def hundredths(number: float) -> str:
    """Format a number as `1,234.56`; below 0.1 with two significant digits, as `0.0042`."""
    digits = 2 if abs(number) >= 0.1 or not number else 1 - math.floor(math.log10(abs(number)))
    return f"{number:,.{digits}f}"


def _scaled(number: float, least: float = 1.0) -> tuple[float, str]:
    """Divide a number by the largest unit that it reaches, or by `least`."""
    for unit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit or unit == least:
            return number / unit, prefix
    return number, ""
