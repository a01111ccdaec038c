"""Which windows make the batch of a step: a pure function of (key, step), computed and never iterated.

Every epoch is its own keyed permutation of all windows, so each window is read exactly once an epoch, any
step can be asked for first, and a resumed run needs no state. This module does not know what a window holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twodice.errors import ConfigError
from twodice.random.keys import Key
from twodice.random.permutation import permute

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """The order in which windows are read.

    Slot ``g = step * batch + i`` of the endless stream reads window ``permutation of epoch g // num_windows``
    at ``g % num_windows``; a batch may therefore span the seam between two epochs (or several, when it is
    larger than the data), and no window is left out or read twice within an epoch.

    Parameters
    ----------
    num_windows : int
        Windows there are, at least 1.
    batch : int
        Windows a step, at least 1.
    key : Key
        Key of the order.

    Raises
    ------
    ConfigError
        `num_windows` or `batch` below 1, or a negative step.

    Randomness
    ----------
    ``permute(key.child("epoch", e), g % num_windows, num_windows)``; nothing else is drawn.
    """

    num_windows: int
    batch: int
    key: Key

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            raise ConfigError(
                f"num_windows must be at least 1; got {self.num_windows}: the text is too short"
            )
        if self.batch < 1:
            raise ConfigError(f"batch must be at least 1; got {self.batch}")

    def indices(self, step: int) -> Indices:
        """Windows of the batch of `step` (from 0): ``(batch,)`` int64 in [0, num_windows)."""
        if step < 0:
            raise ConfigError(f"step must be at least 0; got {step}")
        first = step * self.batch
        slots = np.arange(first, first + self.batch, dtype=np.int64)
        epochs, places = slots // self.num_windows, slots % self.num_windows
        out = np.empty(self.batch, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            out[chosen] = permute(self.key.child("epoch", epoch), places[chosen], self.num_windows)
        return out

    def epoch(self, step: int) -> float:
        """Epochs read before `step`, as a fraction: 0 at the start, 1.5 in the middle of the second."""
        if step < 0:
            raise ConfigError(f"step must be at least 0; got {step}")
        return step * self.batch / self.num_windows

    def steps_for(self, epochs: float) -> int:
        """Fewest steps that read at least `epochs` epochs."""
        return -int(-epochs * self.num_windows // self.batch)
