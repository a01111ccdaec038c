"""Rows judged by their draws: the body as a table, the tail by strata, and no token outside the kept set.

Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from twodice.sampling.conformance.cells import Bench, Cell
from twodice.sampling.conformance.claims import Claim, claimed
from twodice.sampling.conformance.exact import fit, two_sided
from twodice.sampling.conformance.rows import Logits, Row, normal, stratum
from twodice.sampling.conformance.sampler import Rows

TAIL = 0.1
"""The pooled tail of a row: its least probable tokens with together at most this mass."""
MIXED: tuple[Mapping[str, Any], ...] = (
    {"top_k": 5},
    {"temperature": 1.7, "top_p": 0.8},
    {},
    {"temperature": 0.5, "min_p": 0.1},
)


def cost(row: Row, draws: int) -> float:
    """Rough cost of a row, in logits; steers the estimate of the time left and nothing else."""
    return row.share * draws * len(row.make())


def outside(tokens: npt.NDArray[np.int64], claim: Claim, size: int, part: str, kind: str) -> Cell:
    """The cell that no token lies outside what is claimed."""
    kept = np.zeros(size, bool)
    kept[claim.ids] = True
    wrong = (tokens < 0) | (tokens >= size)
    wrong |= ~kept[np.where(wrong, 0, tokens)]
    first = int(tokens[wrong][0]) if wrong.any() else None
    return Cell(
        part,
        kind,
        "never",
        0.0 if first is not None else 1.0,
        f"{wrong.sum():,} draws outside the {len(claim.ids):,} kept; the first is token {first}"
        if first is not None
        else f"no draw outside the {len(claim.ids):,} kept",
        len(tokens),
    )


def table(tokens: npt.NDArray[np.int64], claim: Claim, size: int, part: str, kind: str) -> list[Cell]:
    """The cell that the tokens inside the kept set follow the claim; none where one token is kept."""
    counts = np.bincount(tokens[(tokens >= 0) & (tokens < size)], minlength=size)[claim.ids]
    found = fit(counts, claim.probabilities) if counts.sum() else None
    if found is None:
        return []
    n = int(counts.sum())
    far = 0.5 * float(np.abs(counts / n - claim.probabilities).sum())
    # The distance that chance alone gives: half the mean absolute deviation of each count.
    chance = 0.5 * float(np.sqrt(2 / np.pi * claim.probabilities * (1 - claim.probabilities) / n).sum())
    words = f"distance {100 * far:.2g} %, by chance about {100 * chance:.2g} %"
    return [Cell(part, kind, "table", found.p, words, n, found.half, binomials=found.binomials)]


def _stratum_cell(name: str, hits: int, n: int, mass: float, part: str) -> Cell:
    words = f"{name}: {hits:,} came, {n * mass:,.1f} expected"
    return Cell(part, "tail", "stratum", two_sided(hits, n, mass), words, n, mass, hits)


def _tail_cells(tokens: npt.NDArray[np.int64], claim: Claim, row: Row, logits: Logits) -> list[Cell]:
    counts = np.bincount(tokens[(tokens >= 0) & (tokens < len(logits))], minlength=len(logits))[claim.ids]
    n = int(counts.sum())
    if row.strata:
        found = []
        for name in row.strata:
            inside = stratum(row, name, logits)[claim.ids]
            mass = float(claim.probabilities[inside].sum())
            words = f"{inside.sum():,} tokens of {name} each"
            found.append(_stratum_cell(words, int(counts[inside].sum()), n, mass, row.name))
        return found
    from_end = claim.probabilities[::-1].cumsum()
    tail = int((from_end <= TAIL).sum())
    if tail == 0 or n == 0:
        return []
    words = f"the {tail:,} least probable"
    return [_stratum_cell(words, int(counts[::-1][:tail].sum()), n, float(from_end[tail - 1]), row.name)]


def row_cells(bench: Bench, row: Row) -> list[Cell]:
    """Every cell of one row, at positions 0, 1, 2, ... of one seed."""
    logits = row.make()
    n = max(1, round(row.share * bench.draws))
    rows = Rows([row.settings], np.arange(n), bench.seeds(n))
    tokens = bench.same_row(logits, rows, row.name)
    claim = claimed(logits, rows.kinds[0], bench.rules)
    cells = []
    if len(claim.ids) < len(logits) or ((tokens < 0) | (tokens >= len(logits))).any():
        kind = "ties" if row.kind == "ties" else "kept set"
        cells.append(outside(tokens, claim, len(logits), row.name, kind))
    cells += table(tokens, claim, len(logits), row.name, "ties" if row.kind == "ties" else "body")
    if row.kind in ("body", "tail"):
        cells += _tail_cells(tokens, claim, row, logits)
    return cells


def mixed_cells(bench: Bench) -> list[Cell]:
    """Rows of four unlike settings in one batch, each held to its own claim: neighbours must not show."""
    logits = normal(100, 1.5, "mixed")
    n = bench.draws
    seeds = None if (one := bench.seeds(n)) is None else one + np.arange(n) % 8
    rows = Rows(MIXED, np.arange(n), seeds, np.arange(n) % len(MIXED))
    tokens = bench.same_row(logits, rows, "mixed-batch", most=4_096)
    cells = []
    for number, kind in enumerate(rows.kinds):
        claim, mine = claimed(logits, kind, bench.rules), tokens[rows.which == number]
        if len(claim.ids) < len(logits):
            cells.append(outside(mine, claim, len(logits), "mixed-batch", "neighbours"))
        cells += table(mine, claim, len(logits), "mixed-batch", "neighbours")
    return cells
