"""The table "What dropout did inside" of the page: cells and sentences from the block of the report.

Knows neither records nor the page around it; loads no torch.
"""

from __future__ import annotations

from typing import NamedTuple

from twodice.study.mechanisms.measures import MEASURES
from twodice.study.mechanisms.schema import Mechanisms, Moved, OfArm
from twodice.study.words import interval, listed, number, signed, signed_interval


class Cell(NamedTuple):
    """A measure of one arm as text; `moved` is the difference to the baseline, `side` where it is shown."""

    value: str
    range: str
    moved: str
    moved_range: str
    side: str


class Line(NamedTuple):
    """One line of the table."""

    title: str
    explained: str
    cells: tuple[Cell, ...]


def side_of(moved: Moved | None) -> str:
    """``higher`` or ``lower`` where the adjusted interval leaves out 0, else nothing."""
    if moved is None or moved.low is None or moved.high is None:
        return ""
    return "higher" if moved.low > 0 else "lower" if moved.high < 0 else ""


def lines(block: Mechanisms | None) -> tuple[Line, ...]:
    """The table, a line for each measure; empty where nothing was measured."""
    if block is None:
        return ()
    named = {one.field: one for one in MEASURES}
    return tuple(
        Line(
            named[row.measure].title,
            named[row.measure].short,
            tuple(_cell(one, named[row.measure].kind) for one in row.arms),
        )
        for row in block.rows
    )


def _cell(one: OfArm, kind: str) -> Cell:
    if one.value is None:
        return Cell("–", "", "", "", "")
    value, around = number(one.value.mean, kind), interval(one.value.low, one.value.high, kind)
    moved = one.difference
    if moved is None:
        return Cell(value, around, "", "", "")
    return Cell(
        value, around, signed(moved.mean, kind), signed_interval(moved.low, moved.high, kind), side_of(moved)
    )


def shown(block: Mechanisms | None) -> tuple[tuple[str, str], ...]:
    """Of each arm that is compared, what is shown to differ, in words."""
    if block is None:
        return ()
    titles = {one.field: one.title.lower() for one in MEASURES}
    found: dict[str, dict[str, list[str]]] = {}
    for row in block.rows:
        for one in row.arms:
            if one.difference is not None:
                sides = found.setdefault(one.arm, {"lower": [], "higher": []})
                if side := side_of(one.difference):
                    sides[side].append(titles[row.measure])
    return tuple((arm, _sides(sides)) for arm, sides in found.items())


def _sides(sides: dict[str, list[str]]) -> str:
    told = [f"{side}: {listed(titles)}" for side, titles in sides.items() if titles]
    return "; ".join(told) if told else "nothing is shown to differ"
