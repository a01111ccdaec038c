"""A verdict in words: the sentence at the top, the kinds of check, and p-values as people read them."""

from __future__ import annotations

from typing import NamedTuple

from twodice.sampling.conformance.verdict import Verdict

#: Each kind of check and what it asks, in the order of the report.
KINDS: dict[str, str] = {
    "body": "Do the tokens come in the claimed proportions?",
    "tail": "Do unlikely tokens come at their rate, down to 1e-9?",
    "kept set": "Does a token outside the kept set ever come?",
    "ties": "Where logits are equal, do the right ones stay?",
    "neighbours": "Do other rows, and other settings in the batch, leave a row alone?",
    "place": "Does the place in the batch matter?",
    "batch-size": "Does the size of the batch matter?",
    "repeat": "Does a seed repeat?",
    "independence": "Are draws at unlike rows, positions and seeds independent?",
    "coupling": "Does the noise belong to the token id?",
}


class KindSummary(NamedTuple):
    """One kind of check: how many cells, how many reject, the smallest corrected p-value."""

    kind: str
    asks: str
    cells: int
    rejected: int
    least: float


def summary(verdict: Verdict) -> list[KindSummary]:
    """One line for each kind of check that was made."""
    lines = []
    for kind, asks in KINDS.items():
        mine = [one for one in verdict.judged if one.cell.kind == kind]
        if mine:
            lines.append(
                KindSummary(
                    kind,
                    asks,
                    len(mine),
                    sum(one.rejected for one in mine),
                    min(one.adjusted for one in mine),
                )
            )
    return lines


def p_value(p: float) -> str:
    """``0.25``, ``3e-12``."""
    if p == 0:
        return "0"
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}".replace("e-0", "e-")


def answer(verdict: Verdict) -> str:
    """The verdict as one sentence."""
    if verdict.rejected:
        kinds = verdict.rejecting()
        listed = kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} and {kinds[-1]}"
        return f"{verdict.sampler} does not draw as it claims: {listed}"
    if not verdict.judged:
        return f"{verdict.sampler} offers nothing of what was asked, so nothing was judged"
    return f"{verdict.sampler} draws as it claims: none of {len(verdict.judged)} cells rejects"
