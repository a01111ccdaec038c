"""From `report.json` to plot data: plain named tuples, which a test can hold against the JSON.

Nothing here computes a statistic: what is drawn stands in the report. Only axes' limits are made here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from twodice.study import layout
from twodice.study.schema import Arm, Comparison, Estimate, Report, Sampling

WHEN = {"best": "at the best step", "end": "at the end of training"}


class Measure(NamedTuple):
    """How a measure of generated text is shown: `kind` is a kind of number, `field` its name in the
    report."""

    field: str
    title: str
    kind: str
    short: str


MEASURES = (
    Measure("rep_4", "Repetition", "share", "share of 4-grams that repeat an earlier one"),
    Measure("looping_tails", "Loops", "share", "share of texts whose end loops"),
    Measure("distinct_2", "Diversity", "share", "different 2-grams over all 2-grams"),
    Measure("self_bleu", "Likeness", "plain", "self-BLEU: how alike the texts are, 0 to 1"),
    Measure("own_nats_per_token", "Surprise", "nats", "the model's own loss on its text, nats per token"),
    Measure(
        "longest_copied_characters",
        "Copying",
        "count",
        "longest run copied from the training text, characters",
    ),
)


class Band(NamedTuple):
    """A curve with its interval: one entry an evaluation; `low` and `high` are None with a single seed."""

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]


class ArmCurves(NamedTuple):
    """One arm's train and validation loss over the steps, and where its validation loss is lowest."""

    number: int
    name: str
    is_baseline: bool
    train: Band
    validation: Band
    best_step: int | None
    best_value: float | None


class CurvesData(NamedTuple):
    """All arms' curves; the limits are of the vertical axis, in nats per token."""

    arms: tuple[ArmCurves, ...]
    last_step: int
    validation_limits: tuple[float, float]
    all_limits: tuple[float, float]


class ForestRow(NamedTuple):
    """One arm's paired difference to the baseline: nats per token, below zero is better."""

    arm: int
    name: str
    mean: float
    low: float | None
    high: float | None
    percent: float
    verdict: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]


class ForestData(NamedTuple):
    """The rows of one forest plot; `when` is ``best`` or ``end``; `limits` always hold zero."""

    when: str
    rows: tuple[ForestRow, ...]
    limits: tuple[float, float]


class GapRow(NamedTuple):
    """One arm's train and validation loss at one moment, and the gap between them."""

    arm: int
    name: str
    is_baseline: bool
    train: float
    validation: float
    gap: float
    gap_low: float | None
    gap_high: float | None


class GapData(NamedTuple):
    """The rows of one gap plot; `when` is ``best`` or ``end``; both plots share `limits`."""

    when: str
    rows: tuple[GapRow, ...]
    limits: tuple[float, float]


class Cell(NamedTuple):
    """One corner of the cross, for one measure."""

    mean: float
    low: float | None
    high: float | None


class CrossLine(NamedTuple):
    """One model's cells of one measure, in the order of the panel's columns."""

    label: str
    role: str
    cells: tuple[Cell, ...]


class CrossPanel(NamedTuple):
    """One measure of the cross: two models x (greedy, sampled)."""

    measure: str
    title: str
    kind: str
    columns: tuple[str, ...]
    lines: tuple[CrossLine, ...]
    limits: tuple[float, float]


class FrontierPoint(NamedTuple):
    """One sampling setting of one model."""

    setting: str
    label: str
    greedy: bool
    x: float
    x_low: float | None
    x_high: float | None
    y: float
    y_low: float | None
    y_high: float | None


class FrontierSeries(NamedTuple):
    """All settings of one model; `paths` are runs of indices that differ in one number alone."""

    label: str
    role: str
    points: tuple[FrontierPoint, ...]
    paths: tuple[tuple[int, ...], ...]


class FrontierData(NamedTuple):
    """Two measures of the text against each other, a point for each setting."""

    x_name: str
    y_name: str
    x_axis: str
    y_axis: str
    kind_x: str
    kind_y: str
    series: tuple[FrontierSeries, ...]
    x_limits: tuple[float, float]
    y_limits: tuple[float, float]


def arm_numbers(report: Report) -> dict[str, int]:
    """The number by which pictures know an arm: 0 is the baseline, the others count in the order of the
    report."""
    others = [arm.name for arm in report.arms if arm.name != report.baseline]
    return {report.baseline: 0} | {name: i for i, name in enumerate(others, start=1)}


def arm_role(report: Report, name: str) -> str:
    """The colour role of the arm `name`."""
    index = arm_numbers(report)[name]
    return layout.arm_role(index, is_baseline=index == 0)


def moment(arm: Arm, when: str) -> Comparison:
    """`arm` at the best step (``best``) or at the end (``end``)."""
    return arm.at_best if when == "best" else arm.at_end


def _band(steps: Sequence[int], estimates: Sequence[Estimate]) -> Band:
    return Band(
        tuple(steps),
        tuple(e.mean for e in estimates),
        tuple(e.low for e in estimates),
        tuple(e.high for e in estimates),
    )


def _settled(band: Band) -> list[float]:
    """The values of a curve after the first fifth of the run, with their intervals: what an axis must show
    whole."""
    last = band.steps[-1] if band.steps else 0
    kept = [i for i, step in enumerate(band.steps) if step >= 0.2 * last]
    return [v for i in kept for v in (band.mean[i], band.low[i], band.high[i]) if v is not None]


def curves_data(report: Report) -> CurvesData:
    """Losses over the steps. The axes show all that lies after the first fifth of the run whole."""
    numbers = arm_numbers(report)
    arms = []
    for arm in report.arms:
        validation = _band(arm.curve.steps, arm.curve.validation_nats_per_token)
        lowest = (
            min(range(len(validation.mean)), key=lambda i: validation.mean[i]) if validation.mean else None
        )
        arms.append(
            ArmCurves(
                number=numbers[arm.name],
                name=arm.name,
                is_baseline=arm.name == report.baseline,
                train=_band(arm.curve.steps, arm.curve.train_nats_per_token),
                validation=validation,
                best_step=None if lowest is None else validation.steps[lowest],
                best_value=None if lowest is None else validation.mean[lowest],
            )
        )
    arms.sort(key=lambda arm: arm.number)
    validation_values = [v for arm in arms for v in _settled(arm.validation)]
    return CurvesData(
        arms=tuple(arms),
        last_step=max(report.steps, 1),
        validation_limits=layout.limits(validation_values),
        all_limits=layout.limits(validation_values + [v for arm in arms for v in _settled(arm.train)]),
    )


def forest_data(report: Report, when: str) -> ForestData:
    """Paired differences to the baseline, with the intervals that the verdicts go by."""
    numbers = arm_numbers(report)
    rows = []
    for arm in report.arms:
        difference = moment(arm, when).difference
        if difference is not None:
            rows.append(
                ForestRow(
                    arm=numbers[arm.name],
                    name=arm.name,
                    mean=difference.mean,
                    low=difference.low,
                    high=difference.high,
                    percent=difference.percent.mean,
                    verdict=moment(arm, when).verdict,
                    seeds=tuple(arm.seeds),
                    values=tuple(difference.values),
                )
            )
    values = [v for row in rows for v in (row.mean, row.low, row.high, *row.values)]
    return ForestData(when, tuple(rows), layout.limits(values, include=[0.0]))


def gap_data(report: Report, when: str) -> GapData:
    """Train and validation loss of each arm at one moment."""
    numbers = arm_numbers(report)
    rows, values = [], []
    for arm in report.arms:
        for key in ("best", "end"):
            here = moment(arm, key)
            values += [here.train_nats_per_token.mean, here.validation_nats_per_token.mean]
        here = moment(arm, when)
        rows.append(
            GapRow(
                arm=numbers[arm.name],
                name=arm.name,
                is_baseline=arm.name == report.baseline,
                train=here.train_nats_per_token.mean,
                validation=here.validation_nats_per_token.mean,
                gap=here.gap_nats_per_token.mean,
                gap_low=here.gap_nats_per_token.low,
                gap_high=here.gap_nats_per_token.high,
            )
        )
    rows.sort(key=lambda row: row.arm)
    return GapData(when, tuple(rows), layout.limits(values))


def sampling_cell(report: Report, arm: str, setting: str) -> Sampling | None:
    """The cell of the cross for `arm` and the name of a setting."""
    return next((c for c in report.sampling if c.arm == arm and c.setting.name == setting), None)


def cross_arms(report: Report) -> tuple[str, ...]:
    """The models of the central table: without dropout, then with (where there is one)."""
    if report.cross is None:
        return ()
    both = (report.cross.without, report.cross.with_dropout)
    return tuple(name for name in both if name is not None)


def cross_panels(report: Report) -> tuple[CrossPanel, ...]:
    """A panel for each measure of generated text; none where the study generated nothing."""
    if report.cross is None:
        return ()
    columns = (report.cross.greedy, report.cross.drawn)
    panels = []
    for measure in MEASURES:
        lines = []
        for arm in cross_arms(report):
            found = [sampling_cell(report, arm, column) for column in columns]
            if all(cell is not None for cell in found):
                estimates = [getattr(cell.measures, measure.field) for cell in found if cell is not None]
                cells = tuple(Cell(e.mean, e.low, e.high) for e in estimates)
                lines.append(CrossLine(arm, arm_role(report, arm), cells))
        if lines:
            values = [v for line in lines for cell in line.cells for v in cell]
            # Zero means "none" in all of these measures: the axis begins there, so that no difference looks
            # larger than it is, and an interval that reaches below is cut.
            high = layout.limits(values, include=[0.0])[1]
            low = 0.0
            panels.append(
                CrossPanel(measure.field, measure.title, measure.kind, columns, tuple(lines), (low, high))
            )
    return tuple(panels)


def setting_label(cell: Sampling) -> str:
    """A setting in few characters, for a label inside a picture: ``greedy``, ``k 50``, ``k 50, T 0.7``, ``T
    0.7``."""
    setting = cell.setting
    if setting.greedy:
        return "greedy"
    parts = [] if setting.top_k is None else [f"k {setting.top_k}"]
    if setting.temperature != 1:
        parts.append(f"T {setting.temperature:g}")
    return ", ".join(parts) if parts else "all"


def frontier_data(report: Report, x: str = "rep_4", y: str = "distinct_2") -> FrontierData | None:
    """The measure `y` against `x`, a point a setting, for every model that generated; None where none did."""
    if report.cross is None or not report.sampling:
        return None
    by_name = {m.field: m for m in MEASURES}
    series = []
    for arm in report.cross.arms:
        cells = [c for c in report.sampling if c.arm == arm]
        points = []
        for cell in cells:
            ex, ey = getattr(cell.measures, x), getattr(cell.measures, y)
            points.append(
                FrontierPoint(
                    cell.setting.name,
                    setting_label(cell),
                    cell.setting.greedy,
                    ex.mean,
                    ex.low,
                    ex.high,
                    ey.mean,
                    ey.low,
                    ey.high,
                )
            )
        by_heat: dict[float, list[int]] = {}
        for index, cell in enumerate(cells):
            if not cell.setting.greedy:
                by_heat.setdefault(cell.setting.temperature, []).append(index)
        paths = tuple(
            tuple(sorted(path, key=lambda i: cells[i].setting.top_k or sys.maxsize))
            for path in by_heat.values()
        )
        series.append(FrontierSeries(arm, arm_role(report, arm), tuple(points), paths))
    points_all = [p for s in series for p in s.points]
    return FrontierData(
        x_name=by_name[x].title.lower(),
        y_name=by_name[y].title.lower(),
        x_axis=by_name[x].short,
        y_axis=by_name[y].short,
        kind_x=by_name[x].kind,
        kind_y=by_name[y].kind,
        series=tuple(series),
        x_limits=layout.limits((p.x for p in points_all), pad=0.1),
        y_limits=layout.limits(p.y for p in points_all),
    )
