"""Bytes inside, GiB at the door: every number shown carries its unit."""

import math

GIB = 2**30


def to_gib(num_bytes: int) -> float:
    """Bytes in GiB (2**30 bytes)."""
    return num_bytes / GIB


def format_gib(num_bytes: int) -> str:
    """Bytes as text in GiB with at least two decimals and three significant digits: 26.07 GiB, 0.00725 GiB, 0 GiB."""
    if num_bytes == 0:
        return "0 GiB"
    value = to_gib(num_bytes)
    decimals = max(2, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f} GiB"


def format_count(number: int, unit: str) -> str:
    """A whole number with separators and its unit: 131,072 tokens."""
    return f"{number:,} {unit}"
