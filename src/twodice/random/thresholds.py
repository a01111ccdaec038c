"""How a rate becomes a threshold of 16 bits: the one rule, for plans and for functions. Loads no torch."""

from __future__ import annotations

import math

ONE = 1 << 16  # the threshold of p = 1


def round_rate(p: float) -> int:
    """Return ``p * 65536`` rounded to the nearest integer, halves towards 32768 (so that 1 - p mirrors p)."""
    return math.floor(p * ONE + 0.5) if p <= 0.5 else math.ceil(p * ONE - 0.5)
