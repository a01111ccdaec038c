"""A verdict as one self-contained HTML page, light and dark, that asks the network for nothing.

The same verdict gives the same bytes. Names are data of others and are escaped by the template engine.
"""

from __future__ import annotations

import math
from importlib import resources
from typing import NamedTuple

from twodice.sampling.conformance.exact import ratio_interval
from twodice.sampling.conformance.verdict import Judged, Verdict
from twodice.sampling.conformance.words import KINDS, answer, p_value, summary

LOW, HIGH = 0.2, 5.0  # the axis of the picture, logarithmic; what lies outside is drawn at its edge
LEFT, WIDTH, ROW = 290.0, 430.0, 26.0


class Bar(NamedTuple):
    """One stratum in the picture: where its interval and its point lie, in pixels."""

    label: str
    y: float
    low: float
    high: float
    at: float
    rejected: bool
    words: str


def _x(ratio: float) -> float:
    inside = min(max(ratio, LOW), HIGH)
    return LEFT + WIDTH * math.log(inside / LOW) / math.log(HIGH / LOW)


def bars(judged: tuple[Judged, ...]) -> list[Bar]:
    """The strata of the tail: how often they came as a multiple of what is claimed, with a 95 % interval."""
    found: list[Bar] = []
    for one in judged:
        cell = one.cell
        if cell.test != "stratum" or cell.hits is None or not cell.mass:
            continue
        low, high = ratio_interval(cell.hits, cell.draws, cell.mass)
        ratio = cell.hits / (cell.draws * cell.mass)
        label = f"{cell.part}: {cell.found.partition(':')[0]}"
        words = f"{cell.found}; {ratio:.3g} times, 95 % interval {low:.3g} to {high:.3g}"
        found.append(Bar(label, ROW * (len(found) + 0.5), _x(low), _x(high), _x(ratio), one.rejected, words))
    return found


def page(verdict: Verdict) -> str:
    """The page's text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["p_value"] = p_value
    template = resources.files("twodice.sampling.conformance").joinpath("page.html.j2").read_text("utf-8")
    groups = [
        (kind, words, [one for one in verdict.judged if one.cell.kind == kind])
        for kind, words in KINDS.items()
    ]
    return environment.from_string(template).render(
        verdict=verdict,
        answer=answer(verdict),
        groups=[group for group in groups if group[2]],
        summary=summary(verdict),
        bars=bars(verdict.judged),
        ticks=[(_x(ratio), f"{ratio:g}") for ratio in (0.2, 0.5, 1, 2, 5)],
        height=ROW,
        data=verdict.as_dict(),
    )
