"""Formatting of numbers for people."""

from __future__ import annotations

from collections.abc import Sequence


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours.

    Example:
        >>> duration(85), duration(700), duration(12_000)
        ('85 s', '12 min', '3.3 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def listed(numbers: Sequence[int]) -> str:
    """Format numbers as an enumeration.

    Example:
        >>> listed([4]), listed([2, 4, 8])
        ('4', '2, 4 and 8')
    """
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def byte_size(count: float) -> str:
    """Format a number of bytes with its unit.

    Example:
        >>> byte_size(1_234_567)
        '1.23 MB'
    """
    return _scaled(count, (" B", " kB", " MB", " GB"))


def large_number(count: float) -> str:
    """Format a count with K, M or G.

    Example:
        >>> large_number(12), large_number(2.5e9)
        ('12', '2.5 G')
    """
    return _scaled(count, ("", " K", " M", " G"))


def _scaled(count: float, units: Sequence[str]) -> str:
    *smaller, largest = units
    for unit in smaller:
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}{largest}"
