"""A cell: one test, its p-value, and the smallest defect that it would have caught; and what a part works
with.

Knows how a result is worded, not how it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from twodice.sampling.conformance.claims import Rules
from twodice.sampling.conformance.exact import factors_caught, rate_caught, shift_caught
from twodice.sampling.conformance.rows import SEED, Logits
from twodice.sampling.conformance.sampler import Rows, Sampler

LOGITS_A_CALL = 1 << 22
ROWS_A_CALL = 1 << 18


@dataclass(frozen=True)
class Cell:
    """One test.

    part, kind: where it was made, and what it judges. p: in [0, 1]; 0 only for what must never happen.
    found: in words. draws: on which it rests. test: "table" (a tree of `binomials`; `mass` is the share of
    the first split), "stratum" (a binomial of rate `mass`, of which `hits` came) or "never" (no draw may do
    it).
    """

    part: str
    kind: str
    test: str
    p: float
    found: str
    draws: int
    mass: float | None = None
    hits: int | None = None
    binomials: int = 1

    def catches(self, level: float) -> str:
        """The smallest defect that is rejected with probability 0.99, at the least level that Holm may
        ask for.
        """
        if self.test == "never":
            return f"one draw in {short(1 / rate_caught(self.draws))}"
        assert self.mass is not None
        if self.test == "table":
            shift = shift_caught(self.draws, self.mass, level / 2 / self.binomials)
            return "nothing: too few draws" if shift is None else f"total variation {100 * shift:.2g} %"
        below, above = factors_caught(self.draws, self.mass, level)
        low = "" if below is None else f"{percent(100 * (1 - below))} missing"
        high = "" if above is None else f"{percent(100 * (above - 1))} too many"
        return " or ".join(word for word in (low, high) if word) or "nothing: too few draws"


def percent(value: float) -> str:
    """``8.1 %``: two digits, and never a 100 that is not one."""
    if 99 < value < 100:
        return f"{min(value, 99.9):.1f} %"
    return f"{value:,.0f} %" if value >= 10 else f"{value:.2g} %"


def short(value: float) -> str:
    """``1,100,000``: three digits, then noughts."""
    return f"{float(f'{value:.3g}'):,.0f}"


class Bench(NamedTuple):
    """What a part works with: the sampler, its rules, the draws asked for, and where to tell how far it
    is.
    """

    sampler: Sampler
    rules: Rules
    draws: int
    cost: float
    tell: Callable[[float], None]

    def same_row(
        self, logits: Logits, rows: Rows, part: str, *, most: int = ROWS_A_CALL
    ) -> npt.NDArray[np.int64]:
        """Tokens of `rows` that all have the same logits, in batches.

        The batch is one contiguous tensor that is reused: writing it anew would cost more than drawing. A
        sampler that writes into it is seen by the tensor's version and gets a fresh one.
        """
        size = max(1, min(most, LOGITS_A_CALL // len(logits), len(rows)))
        one = torch.from_numpy(logits)
        batch = one.repeat(size, 1)
        version = batch._version
        tokens = np.empty(len(rows), np.int64)
        for start in range(0, len(rows), size):
            end = min(start + size, len(rows))
            tokens[start:end] = self.sampler.draw(batch[: end - start], rows[start:end], part)
            if batch._version != version:
                batch = one.repeat(size, 1)
                version = batch._version
            self.tell((end * len(logits)) / self.cost)
        return tokens

    def seeds(self, count: int, seed: int = SEED) -> npt.NDArray[np.int64] | None:
        """One seed for `count` rows; None where the sampler offers none."""
        return np.full(count, seed, np.int64) if "seeds" in self.sampler.offers else None
