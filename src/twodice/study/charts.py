"""From plot data to the report's pictures, and the central one for a README.

Each picture takes a plain named tuple of `plot_data` and knows nothing but that; `svg` makes it a part of the
page. ``python -m twodice.study.charts REPORT.json OUT.png`` writes the central picture.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from twodice.study import drawing, layout
from twodice.study.plot_data import (
    WHEN,
    CrossPanel,
    CurvesData,
    ForestData,
    FrontierData,
    GapData,
    curves_data,
    forest_data,
    frontier_data,
)
from twodice.study.schema import Report, read_report
from twodice.study.svg import CSS_THEME, LIGHT_THEME, Theme, png_of, svg_of
from twodice.study.words import interval, number, percent, signed


def validation_picture(data: CurvesData, theme: Theme = CSS_THEME) -> str:
    """All arms' validation loss."""
    with layout.canvas(*layout.PANEL, theme) as figure:
        drawn = drawing.draw_validation_curves(layout.axes_in(figure, (38, 34, 118, 44)), data, theme)
        return svg_of(
            figure,
            name="validation",
            title="Validation loss of every arm over the steps of training",
            description="; ".join(
                f"{arm.name}: lowest {number(arm.best_value)} at step {arm.best_step}, at the end "
                f"{number(arm.validation.mean[-1])}"
                for arm in data.arms
            ),
            data=drawn,
        )


def arm_picture(data: CurvesData, position: int) -> str:
    """Train and validation loss of the arm at `position` in `data`."""
    arm = data.arms[position]
    with layout.canvas(*layout.PANEL, CSS_THEME) as figure:
        drawn = drawing.draw_arm_curves(layout.axes_in(figure, (38, 34, 82, 44)), data, position, CSS_THEME)
        return svg_of(
            figure,
            name=f"curves-{arm.number}",
            title=f"Train and validation loss of {arm.name}",
            description=f"At the end: train {number(arm.train.mean[-1])}, "
            f"validation {number(arm.validation.mean[-1])} nats per token",
            data=drawn,
        )


def forest_picture(data: ForestData) -> str:
    """Paired differences at one moment."""
    height = drawing.forest_height(len(data.rows))
    with layout.canvas(layout.PANEL[0], height, CSS_THEME) as figure:
        drawn = drawing.draw_forest(layout.axes_in(figure, (14, 28, 108, 48)), data, CSS_THEME)
        return svg_of(
            figure,
            name=f"forest-{data.when}",
            title=f"Paired differences to the baseline {WHEN[data.when]}",
            description="; ".join(
                f"{row.name}: {row.verdict}, {signed(row.mean)} {interval(row.low, row.high)} nats per token"
                f", {percent(row.percent)}"
                for row in data.rows
            ),
            data=drawn,
        )


def gap_picture(data: GapData) -> str:
    """Train loss, validation loss and the gap at one moment."""
    height = drawing.gap_height(len(data.rows))
    with layout.canvas(layout.PANEL[0], height, CSS_THEME) as figure:
        drawn = drawing.draw_gap(layout.axes_in(figure, (14, 12, 14, 48)), data, CSS_THEME)
        return svg_of(
            figure,
            name=f"gap-{data.when}",
            title=f"The generalisation gap {WHEN[data.when]}",
            description="; ".join(
                f"{row.name}: train {number(row.train)}, validation {number(row.validation)}, "
                f"gap {number(row.gap)}"
                for row in data.rows
            ),
            data=drawn,
        )


def cross_picture(panel: CrossPanel) -> str:
    """One measure of the cross."""
    with layout.canvas(200, 180, CSS_THEME) as figure:
        drawn = drawing.draw_cross(layout.axes_in(figure, (40, 10, 4, 28)), panel, CSS_THEME)
        return svg_of(
            figure,
            name=f"cross-{panel.measure.replace('_', '-')}",
            title=f"{panel.title}: greedy against drawn, for each model",
            description="; ".join(
                f"{line.label}, {column}: {number(cell.mean, panel.kind)}"
                for line in panel.lines
                for column, cell in zip(panel.columns, line.cells, strict=True)
            ),
            data=drawn,
        )


def frontier_picture(data: FrontierData, name: str) -> str:
    """One pair of measures, all settings."""
    with layout.canvas(layout.PANEL[0], 350, CSS_THEME) as figure:
        drawn = drawing.draw_frontier(layout.axes_in(figure, (46, 34, 28, 48)), data, CSS_THEME)
        return svg_of(
            figure,
            name=name,
            title=f"Sampling settings: {data.y_name} against {data.x_name}",
            description="; ".join(
                f"{s.label}, {p.setting}: {data.x_name} {number(p.x, data.kind_x)}, {data.y_name} "
                f"{number(p.y, data.kind_y)}"
                for s in data.series
                for p in s.points
            ),
            data=drawn,
        )


def central_picture(report: Report, theme: Theme = LIGHT_THEME) -> bytes:
    """PNG of what a study found, for a README: validation curves, differences, the sampling frontier."""
    frontier = frontier_data(report)
    forest = forest_data(report, "best")
    width, height, head = 480.0, max(drawing.forest_height(len(forest.rows)), 340.0), 44.0
    columns = 2 if frontier is None else 3
    with layout.canvas(width * columns, height + head, theme) as figure:
        titles = [
            "Validation loss",
            f"Difference to “{report.baseline}” {WHEN['best']}",
            "What sampling does to the text",
        ]
        for column in range(columns):
            left = column * width
            box = (left + 40, head + 34, (columns - column - 1) * width + (126, 116, 34)[column], 46)
            ax = layout.axes_in(figure, box)
            if column == 0:
                drawing.draw_validation_curves(ax, curves_data(report), theme)
            elif column == 1:
                drawing.draw_forest(ax, forest, theme)
            elif frontier is not None:
                drawing.draw_frontier(ax, frontier, theme)
            figure.text(
                (left + 40) / (width * columns),
                1 - 16 / (height + head),
                layout.shortened(titles[column], 48),
                ha="left",
                va="top",
                fontsize=15,
                fontweight="bold",
                color=theme.of("ink"),
            )
        return png_of(figure)


def main(arguments: Sequence[str]) -> int:
    """Write the central picture of the report `arguments[0]` to `arguments[1]`."""
    if len(arguments) != 2:
        print("usage: python -m twodice.study.charts REPORT.json OUT.png", file=sys.stderr)
        return 2
    Path(arguments[1]).write_bytes(central_picture(read_report(Path(arguments[0]))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
