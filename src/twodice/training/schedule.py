"""The learning rate as a function of the step alone. Knows no optimizer."""

from __future__ import annotations

import math
from typing import Literal

# The last fifth of a trapezoid falls: the value of Haegele et al. 2024 (section 4), who found 10 to 20 %
# enough.
_FALL = 0.2


def learning_rate(
    step: int,
    *,
    steps: int,
    peak: float,
    floor: float,
    warmup: int,
    schedule: Literal["cosine", "trapezoid", "constant"],
) -> float:
    """Return the rate of optimizer step `step`, in [0, steps).

    The warm-up is linear and reaches `peak` at step ``warmup - 1``; step 0 already moves. "cosine" then falls
    to `floor` at the last step (Loshchilov and Hutter 2017, without restarts), "trapezoid" stays and falls
    linearly over the last fifth, "constant" stays.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    last = steps - 1
    if schedule == "trapezoid":
        begin = max(warmup, math.ceil(steps * (1 - _FALL)))
        if step < begin:
            return peak
        return peak + (floor - peak) * (step - begin + 1) / (last - begin + 1)
    span = last - warmup
    done = (step - warmup) / span if span > 0 else 1.0
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
