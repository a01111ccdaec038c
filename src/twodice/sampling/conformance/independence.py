"""Draws that should have nothing to do with each other, two by two: rows, positions, seeds.

All rows have four equal logits, so that a pair of independent draws is one of 16 outcomes with equal
probability: the table of pairs is tested like any other, against a distribution that is known and not
estimated. Pairs do not overlap.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from twodice.sampling.conformance.cells import Bench, Cell
from twodice.sampling.conformance.exact import fit
from twodice.sampling.conformance.rows import SEED
from twodice.sampling.conformance.sampler import Rows

SIZE = 4
BATCH = 4_096
"""Rows a call here: with it as a lag, a generator that starts anew at each call is seen."""
EQUAL = np.zeros(SIZE, np.float32)


def pairs(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], part: str, words: str) -> list[Cell]:
    """The cell that two columns of tokens are uniform and independent."""
    inside = (np.minimum(first, second) >= 0) & (np.maximum(first, second) < SIZE)
    counts = np.bincount(SIZE * first[inside] + second[inside], minlength=SIZE**2)
    found = fit(counts, np.full(SIZE**2, SIZE**-2.0)) if inside.any() else None
    if found is None:
        return []
    share = (
        f"{words}: {100 * float((first == second).mean()):.4g} % of pairs equal, {100 / SIZE:g} % expected"
    )
    return [
        Cell(part, "independence", "table", found.p, share, len(first), found.half, binomials=found.binomials)
    ]


def lagged(tokens: npt.NDArray[np.int64], lag: int, part: str, words: str) -> list[Cell]:
    """Pairs that lie `lag` apart, each token in one pair."""
    whole = len(tokens) // (2 * lag) * 2 * lag
    blocks = tokens[:whole].reshape(-1, 2, lag)
    return pairs(blocks[:, 0].ravel(), blocks[:, 1].ravel(), part, f"{words}, {lag:,} apart") if whole else []


def neighbouring_rows(bench: Bench) -> list[Cell]:
    """Rows of one batch that follow each other, their positions too; and the same row of two calls."""
    n = max(2 * bench.draws, 2 * BATCH)
    tokens = bench.same_row(EQUAL, Rows([{}], np.arange(n), bench.seeds(n)), "neighbouring-rows", most=BATCH)
    words = "rows and positions" if "seeds" in bench.sampler.offers else "rows"
    return [cell for lag in (1, 2, 64, BATCH) for cell in lagged(tokens, lag, "neighbouring-rows", words)]


def seeds(bench: Bench) -> list[Cell]:
    """One position under many seeds: neighbouring seeds in one batch, and the table of their tokens."""
    n = max(2_000, bench.draws // 2)
    rows = Rows([{}], np.full(n, 5), SEED + np.arange(n))
    tokens = bench.same_row(EQUAL, rows, "seeds", most=BATCH)
    return [cell for lag in (1, 2, 64) for cell in lagged(tokens, lag, "seeds", "seeds at one position")]


def streams(bench: Bench) -> list[Cell]:
    """Two neighbouring seeds along all positions, side by side and one position shifted: not seed +
    position.
    """
    n = bench.draws
    first, second = (
        bench.same_row(EQUAL, Rows([{}], np.arange(n), bench.seeds(n, seed)), "streams")
        for seed in (SEED, SEED + 1)
    )
    return [
        *pairs(first, second, "streams", "neighbouring seeds, position by position"),
        *pairs(first[1:], second[:-1], "streams", "neighbouring seeds, seed + position equal"),
    ]
