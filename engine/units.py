"""Numbers as people read them."""

from __future__ import annotations

import math


def thousands(number: int) -> str:
    """``1234567`` as ``1,234,567``."""
    return f"{number:,}"


def quantity(number: int) -> str:
    """A count with three digits: ``494 M``, ``1.54 B``; below ten thousand as it is."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor * (10 if unit == "k" else 1):
            return f"{_three_digits(number / factor)} {unit}"
    return str(number)


def size(bytes_count: int) -> str:
    """Bytes with three digits in decimal units: ``988 MB``, ``3.09 GB``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if bytes_count >= factor:
            return f"{_three_digits(bytes_count / factor)} {unit}"
    return f"{bytes_count} B"


def decibels(value: float) -> str:
    """A ratio in dB: ``21.5``; ``exact`` without any error, ``not finite`` where nothing could be compared."""
    if math.isnan(value):
        return "not finite"
    return "exact" if value == math.inf else f"{value:.1f}"


def _three_digits(number: float) -> str:
    digits = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f}"
