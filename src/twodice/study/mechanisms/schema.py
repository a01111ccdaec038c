"""The block ``mechanisms`` of ``report.json``: the measures of each arm, and their differences."""

from __future__ import annotations

from pydantic import Field

from twodice.study.parts import Estimate, Part


class Moved(Part):
    """An arm's measure minus the baseline's, paired by seed.

    ``low`` and ``high`` are adjusted by Holm's method over all differences of the block: an interval that
    leaves out 0 is a difference that is shown. Null with one seed.
    """

    mean: float
    low: float | None
    high: float | None


class OfArm(Part):
    """One measure of one arm."""

    arm: str
    value: Estimate | None = Field(description="null where a trial of the arm has no such thing")
    difference: Moved | None = Field(description="null for the baseline, and where one of the two is missing")


class Row(Part):
    """One measure, of every arm in the order of the report."""

    measure: str = Field(description="a name of `measures.MEASURES`")
    arms: list[OfArm]


class Mechanisms(Part):
    """What dropout is said to do inside a model, measured at each trial's best step."""

    comparisons: int = Field(description="differences over which the intervals are adjusted")
    domain: str = Field(description="which text stands for another domain")
    rows: list[Row]
