"""`judge`: run the parts on a sampler, correct over all cells, and say what was found.

A *cell* is one test with one p-value, and a *part* is a row or a check that gives several. This file knows
the parts by name; what each does is in ``draws``, ``independence`` and ``invariance``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import twodice
from twodice.errors import ConfigError, nearest
from twodice.sampling.conformance import draws as drawn
from twodice.sampling.conformance import independence, invariance
from twodice.sampling.conformance.cells import Bench, Cell
from twodice.sampling.conformance.claims import OURS, Rules
from twodice.sampling.conformance.exact import holm
from twodice.sampling.conformance.rows import Row, all_rows
from twodice.sampling.conformance.sampler import NotOffered, Sampler

ALPHA = 1e-6
"""Probability, at most, that a sampler which draws as it claims is rejected."""
LEAST_DRAWS, DEFAULT_DRAWS = 2_000, 100_000


class Judged(NamedTuple):
    """A cell with its p-value corrected over all cells, whether that rejects, and what it would have
    caught.
    """

    cell: Cell
    adjusted: float
    rejected: bool
    catches: str


@dataclass(frozen=True)
class Verdict:
    """What the kit found. `rejected` is true if any cell is; its false-alarm probability is at most
    `alpha`.
    """

    sampler: str
    rules: Rules
    draws: int
    alpha: float
    judged: tuple[Judged, ...]
    not_offered: tuple[tuple[str, str], ...]

    @property
    def rejected(self) -> bool:
        """Whether any cell rejects."""
        return any(one.rejected for one in self.judged)

    def rejecting(self) -> tuple[str, ...]:
        """The kinds of check that reject, in the order of the report."""
        return tuple(dict.fromkeys(one.cell.kind for one in self.judged if one.rejected))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, strings and None."""
        return {
            "twodice": twodice.__version__,
            "sampler": self.sampler,
            "verdict": "rejected" if self.rejected else "accepted",
            "rules": self.rules._asdict(),
            "draws": self.draws,
            "alpha": self.alpha,
            "cells": [
                {
                    **asdict(one.cell),
                    "adjusted": one.adjusted,
                    "rejected": one.rejected,
                    "catches": one.catches,
                }
                for one in self.judged
            ],
            "not_offered": [{"part": part, "why": why} for part, why in self.not_offered],
        }


class Part(NamedTuple):
    """A named piece of work: its cost in logits, what the sampler must offer for it, and how it is done."""

    name: str
    cost: float
    needs: str | None
    run: Callable[[Bench], list[Cell]]


def parts(draws: int) -> tuple[Part, ...]:
    """Everything that the kit does, in order."""

    def of_row(row: Row) -> Part:
        return Part(row.name, drawn.cost(row, draws), None, lambda bench: drawn.row_cells(bench, row))

    return (
        *(of_row(row) for row in all_rows()),
        *(Part(name, draws * factor, needs, run) for name, factor, needs, run in CHECKS),
    )


CHECKS: tuple[tuple[str, float, str | None, Callable[[Bench], list[Cell]]], ...] = (
    ("mixed-batch", 800.0, None, drawn.mixed_cells),
    ("neighbouring-rows", 600.0, None, independence.neighbouring_rows),
    ("seeds", 900.0, "seeds", independence.seeds),
    ("streams", 600.0, "seeds", independence.streams),
    ("repeat", 1.0, "seeds", invariance.repeat),
    ("batch-size", 1.0, "seeds", invariance.batch_size),
    ("place", 1.0, "seeds", invariance.place),
    ("neighbours", 1.0, "seeds", invariance.neighbours),
    ("coupling", 1.0, "coupled", invariance.coupling),
)
WHY = {
    "seeds": "the sampler does not offer seeds",
    "coupled": "the sampler does not claim noise that belongs to the token id",
}


def part_names() -> list[str]:
    """Names for ``--rows``."""
    return [row.name for row in all_rows()] + [name for name, *_ in CHECKS]


def judge(
    sampler: Sampler,
    *,
    rows: Sequence[str] | None = None,
    draws: int = DEFAULT_DRAWS,
    rules: Rules = OURS,
    alpha: float = ALPHA,
    progress: Callable[[float, str], None] = lambda done, what: None,
) -> Verdict:
    """Judge a sampler.

    Parameters
    ----------
    sampler : Sampler
        From `load` or `as_sampler`.
    rows : names of parts, optional
        Only these; without any, all. A part that needs what the sampler does not offer is reported, not
        failed.
    draws : int
        In [2000, inf): draws of a row of share 1; each cell says what they suffice for.
    rules : Rules
        What the sampler claims where engines differ.
    alpha : float
        In (0, 1): probability, at most, of rejecting a right sampler; Holm's correction over all cells.
    progress : function of (share of the work done, part)

    Returns
    -------
    Verdict

    Raises
    ------
    ConfigError, ShapeError
        If a name is unknown, draws are too few, or the sampler raises or returns something else than
        tokens.

    Notes
    -----
    *Randomness*: seeds and positions are fixed, so a seeded sampler gets the same verdict each time.
    """
    if draws < LEAST_DRAWS:
        raise ConfigError(f"draws must be at least {LEAST_DRAWS}, or nothing could be rejected; got {draws}")
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha must be in (0, 1); got {alpha}")
    chosen = _chosen(parts(draws), rows)
    total, done = sum(part.cost for part in chosen), 0.0
    cells: list[Cell] = []
    missing: list[tuple[str, str]] = []
    for part in chosen:

        def tell(share: float, part: Part = part, done: float = done) -> None:
            progress(min(0.999, (done + part.cost * min(1.0, share)) / total), part.name)  # 1 is said once

        tell(0.0)
        if part.needs is not None and part.needs not in sampler.offers:
            missing.append((part.name, WHY[part.needs]))
        else:
            try:
                cells += part.run(Bench(sampler, rules, draws, part.cost, tell))
            except NotOffered as error:
                missing.append((part.name, str(error)))
        done += part.cost
    progress(1.0, "")
    cells += _all_filters(cells)
    adjusted = holm([cell.p for cell in cells])
    level = alpha / max(1, len(cells))
    judged = tuple(
        Judged(cell, p, p <= alpha, cell.catches(level)) for cell, p in zip(cells, adjusted, strict=True)
    )
    return Verdict(sampler.name, rules, draws, alpha, judged, tuple(missing))


def _all_filters(cells: Sequence[Cell]) -> list[Cell]:
    """The kept sets of all rows together: what leaks at every filter shows here at a rate that no row
    shows alone.
    """
    kept = [cell for cell in cells if cell.test == "never" and cell.kind == "kept set"]
    if len(kept) < 2:
        return []
    bad = sum(cell.p == 0 for cell in kept)
    found = (
        f"{bad} of {len(kept)} rows with draws outside" if bad else f"no draw outside, in {len(kept)} rows"
    )
    return [
        Cell("all-filters", "kept set", "never", float(bad == 0), found, sum(cell.draws for cell in kept))
    ]


def _chosen(every: Sequence[Part], names: Sequence[str] | None) -> list[Part]:
    if names is None:
        return list(every)
    known = [part.name for part in every]
    if not names:
        raise ConfigError(f"rows must name at least one of {', '.join(known)}; got none")
    for name in names:
        if name not in known:
            raise ConfigError(f"no row {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return [part for part in every if part.name in names]
