"""Plot data to matplotlib axes: which mark stands for which number.

Every artist that carries a number has a ``gid``; the dictionary that a drawing returns gives, by gid, the
values drawn, so that a picture can be held against the record it was made from. Knows nothing of where the
numbers come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from twodice.study.layout import (
    Box,
    arm_role,
    axes_height,
    corner_label,
    few_ticks,
    minus_ticks,
    minus_y,
    pixels,
    place_label,
    quiet,
    shortened,
    spread,
)
from twodice.study.svg import Theme
from twodice.study.words import interval, number, percent, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from twodice.study.plot_data import (
        ArmCurves,
        Band,
        CrossPanel,
        CurvesData,
        ForestData,
        FrontierData,
        GapData,
    )

Drawn = dict[str, dict[str, Any]]


def _band(ax: Axes, band: Band, colour: str, gid: str, *, dashed: bool, width: float = 2.0) -> Drawn:
    steps = list(band.steps)
    lows, highs = ([v for v in side if v is not None] for side in (band.low, band.high))
    if len(lows) == len(highs) == len(steps):
        ax.fill_between(steps, lows, highs, color=colour, alpha=0.16, linewidth=0)
    style: dict[str, Any] = {"dashes": (4, 2.2)} if dashed else {}
    (line,) = ax.plot(steps, list(band.mean), color=colour, linewidth=width, solid_capstyle="round", **style)
    line.set_gid(gid)
    return {gid: {"steps": steps, "mean": list(band.mean), "low": list(band.low), "high": list(band.high)}}


def _best_dot(ax: Axes, arm: ArmCurves, colour: str, gid: str, theme: Theme) -> Drawn:
    if arm.best_step is None or arm.best_value is None:
        return {}
    (dot,) = ax.plot(
        [arm.best_step],
        [arm.best_value],
        "o",
        color=colour,
        markersize=7.5,
        markeredgecolor=theme.of("surface"),
        markeredgewidth=1.6,
        zorder=5,
        clip_on=False,
    )
    dot.set_gid(gid)
    tip = f"{arm.name}: lowest at step {arm.best_step}, {number(arm.best_value)} nats per token"
    return {gid: {"step": arm.best_step, "value": arm.best_value, "tip": tip}}


def draw_validation_curves(ax: Axes, data: CurvesData, theme: Theme) -> Drawn:
    """The validation loss of every arm over the steps, with intervals, each labelled at its end."""
    drawn: Drawn = {}
    quiet(ax, theme)
    ax.set_ylim(*data.validation_limits)
    ax.set_xlim(0, data.last_step)
    ends, roles = [], []
    for arm in data.arms:
        role = arm_role(arm.number, is_baseline=arm.is_baseline)
        colour = theme.of(role)
        drawn |= _band(ax, arm.validation, colour, f"validation-{arm.number}", dashed=False, width=2.2)
        drawn |= _best_dot(ax, arm, colour, f"best-{arm.number}", theme)
        ends.append(arm.validation.mean[-1])
        roles.append(role)
    low, high = data.validation_limits
    height = axes_height(ax)
    for arm, role, end, place in zip(
        data.arms, roles, ends, spread(ends, 17 * (high - low) / height, low, high), strict=True
    ):
        ax.annotate(
            shortened(arm.name, 15),
            (data.last_step, min(max(end, low), high)),
            xycoords="data",
            xytext=(1.03, (place - low) / (high - low)),
            textcoords="axes fraction",
            va="center",
            ha="left",
            fontsize=13,
            fontweight="bold",
            color=theme.of(role),
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": theme.of(role),
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )
    few_ticks(ax, x=5, y=6)
    minus_ticks(ax)
    corner_label(ax, "validation loss, nats per token", theme)
    ax.set_xlabel("step", fontsize=12.5, color=theme.of("soft"), labelpad=4)
    return drawn


def draw_arm_curves(ax: Axes, data: CurvesData, index: int, theme: Theme) -> Drawn:
    """Train and validation loss of one arm; the shaded space between them is the generalisation gap."""
    arm = data.arms[index]
    base = next((a for a in data.arms if a.is_baseline), None)
    colour = theme.of(arm_role(arm.number, is_baseline=arm.is_baseline))
    quiet(ax, theme)
    ax.set_ylim(*data.all_limits)
    ax.set_xlim(0, data.last_step)
    if base is not None and not arm.is_baseline:
        for band, dashes in ((base.train, (4, 2.2)), (base.validation, (None, None))):
            ax.plot(
                list(band.steps),
                list(band.mean),
                color=theme.of("arm-0"),
                linewidth=1.1,
                alpha=0.75,
                dashes=dashes,
            )
    ax.fill_between(
        list(arm.train.steps),
        list(arm.train.mean),
        list(arm.validation.mean),
        color=colour,
        alpha=0.08,
        linewidth=0,
    )
    drawn = _band(ax, arm.validation, colour, f"arm{arm.number}-validation", dashed=False, width=2.2)
    drawn |= _band(ax, arm.train, colour, f"arm{arm.number}-train", dashed=True, width=1.8)
    drawn |= _best_dot(ax, arm, colour, f"arm{arm.number}-best", theme)
    low, high = data.all_limits
    height = axes_height(ax)
    ends = [arm.validation.mean[-1], arm.train.mean[-1]]
    for text, weight, end in zip(
        ("validation", "train"),
        ("bold", "normal"),
        spread(ends, 17 * (high - low) / height, low, high),
        strict=True,
    ):
        ax.annotate(
            text,
            (1.02, (end - low) / (high - low)),
            xycoords="axes fraction",
            va="center",
            ha="left",
            fontsize=13,
            fontweight=weight,
            color=colour,
            annotation_clip=False,
        )
    few_ticks(ax, x=4, y=5)
    minus_ticks(ax)
    corner_label(ax, "loss, nats per token", theme)
    ax.set_xlabel("step", fontsize=12.5, color=theme.of("soft"), labelpad=4)
    return drawn


def forest_height(rows: int) -> float:
    """CSS pixels that a forest plot with `rows` rows needs."""
    return 88.0 + 66.0 * max(rows, 1)


def draw_forest(ax: Axes, data: ForestData, theme: Theme) -> Drawn:
    """One row an arm: every seed's paired difference as a dot, the mean with its adjusted interval, the zero
    line."""
    drawn: Drawn = {}
    quiet(ax, theme, grid="x")
    rows = len(data.rows)
    ax.set_ylim(rows - 0.25, -0.62)
    ax.set_xlim(*data.limits)
    ax.set_yticks([])
    ax.axvline(0, color=theme.of("ink"), linewidth=1.4, zorder=2)
    for place, row in enumerate(data.rows):
        colour = theme.of(arm_role(row.arm, is_baseline=False))
        for seed, value in zip(row.seeds, row.values, strict=True):
            (dot,) = ax.plot(
                [value],
                [place + 0.30],
                "o",
                color=colour,
                markersize=6,
                alpha=0.55,
                markeredgewidth=0,
                clip_on=False,
                zorder=3,
            )
            gid = f"{data.when}-seed-{row.arm}-{seed}"
            dot.set_gid(gid)
            drawn[gid] = {"value": value, "tip": f"{row.name}, seed {seed}: {signed(value)} nats per token"}
        gid = f"{data.when}-difference-{row.arm}"
        if row.low is not None and row.high is not None:
            (bar,) = ax.plot(
                [row.low, row.high],
                [place, place],
                color=colour,
                linewidth=3.2,
                zorder=4,
                solid_capstyle="butt",
                clip_on=False,
            )
            for end in (row.low, row.high):
                ax.plot(
                    [end, end],
                    [place - 0.075, place + 0.075],
                    color=colour,
                    linewidth=1.6,
                    zorder=4,
                    clip_on=False,
                )
            bar.set_gid(gid)
            tip = f"{row.name}: {signed(row.mean)} [{signed(row.low)}, {signed(row.high)}] nats per token"
            drawn[gid] = {"low": row.low, "high": row.high, "tip": tip}
        (mean,) = ax.plot(
            [row.mean],
            [place],
            "D",
            color=colour,
            markersize=8.5,
            markeredgecolor=theme.of("surface"),
            markeredgewidth=1.4,
            zorder=5,
            clip_on=False,
        )
        mean.set_gid(f"{gid}-mean")
        drawn[f"{gid}-mean"] = {"mean": row.mean}
        role = {"helps": "good", "hurts": "bad"}.get(row.verdict, "soft")
        for anchor, rise, text, paint, box in (
            ((0.0, place - 0.24), 0, shortened(row.name, 34), colour, True),
            ((1.0, place), 8, row.verdict, theme.of(role), False),
            ((1.0, place), -8, percent(row.percent), theme.of("ink"), False),
        ):
            ax.annotate(
                text,
                anchor,
                xycoords=("axes fraction", "data"),
                xytext=(0 if box else 12, rise),
                textcoords="offset points",
                ha="left",
                va="bottom" if box else "center",
                fontsize=13.5,
                fontweight="bold",
                color=paint,
                annotation_clip=False,
                zorder=6,
                bbox={"boxstyle": "square,pad=0.1", "facecolor": theme.of("surface"), "edgecolor": "none"}
                if box
                else None,
            )
    few_ticks(ax, x=5)
    minus_ticks(ax)
    low, high = data.limits
    ax.set_xlabel(
        "difference to the baseline, nats per token", fontsize=12.5, color=theme.of("soft"), labelpad=5
    )
    zero = (0 - low) / (high - low)
    for text, side, x in (("◀ less loss", "left", 0.0), ("more loss ▶", "right", 1.0)):
        if (side == "left" and zero > 0.4) or (side == "right" and zero < 0.6):
            ax.annotate(
                text,
                (x, 1),
                xycoords="axes fraction",
                xytext=(0, 8),
                textcoords="offset points",
                ha=side,
                va="bottom",
                fontsize=12.5,
                color=theme.of("soft"),
                annotation_clip=False,
            )
    ax.annotate(
        "baseline",
        (zero, 1),
        xycoords="axes fraction",
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=12.5,
        fontweight="bold",
        color=theme.of("ink"),
        annotation_clip=False,
    )
    return drawn


def gap_height(rows: int) -> float:
    """CSS pixels that a gap plot with `rows` rows needs."""
    return 88.0 + 50.0 * max(rows, 1)


def draw_gap(ax: Axes, data: GapData, theme: Theme) -> Drawn:
    """One row an arm: train loss (ring) and validation loss (disc), and between them the generalisation
    gap."""
    drawn: Drawn = {}
    quiet(ax, theme, grid="x")
    ax.set_ylim(len(data.rows) - 0.3, -0.75)
    ax.set_xlim(*data.limits)
    ax.set_yticks([])
    for place, row in enumerate(data.rows):
        colour = theme.of(arm_role(row.arm, is_baseline=row.is_baseline))
        gid = f"{data.when}-gap-{row.arm}"
        (bar,) = ax.plot(
            [row.train, row.validation],
            [place, place],
            color=colour,
            linewidth=6,
            alpha=0.3,
            solid_capstyle="butt",
            zorder=2,
        )
        bar.set_gid(gid)
        tip = f"{row.name}: train {number(row.train)}, validation {number(row.validation)}"
        drawn[gid] = {"train": row.train, "validation": row.validation, "gap": row.gap, "tip": tip}
        ax.plot(
            [row.train],
            [place],
            "o",
            markersize=9,
            markerfacecolor=theme.of("surface"),
            markeredgecolor=colour,
            markeredgewidth=2,
            zorder=3,
            clip_on=False,
        )
        ax.plot([row.validation], [place], "o", markersize=9, color=colour, zorder=3, clip_on=False)
        ax.annotate(
            shortened(row.name, 21),
            (0, place - 0.2),
            xycoords=("axes fraction", "data"),
            ha="left",
            va="bottom",
            fontsize=13,
            fontweight="bold",
            color=colour,
            annotation_clip=False,
        )
        bracket = interval(row.gap_low, row.gap_high)
        ax.annotate(
            f"gap {number(row.gap)} {bracket}".rstrip(),
            (1, place - 0.2),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=13,
            color=theme.of("ink"),
            annotation_clip=False,
        )
    few_ticks(ax, x=5)
    minus_ticks(ax)
    ax.set_xlabel(
        "nats per token:  ○ train   ● validation", fontsize=12.5, color=theme.of("soft"), labelpad=5
    )
    return drawn


def draw_cross(ax: Axes, panel: CrossPanel, theme: Theme) -> Drawn:
    """One measure, greedy against sampled, a line for each model: slope is the generation die, distance the
    training die."""
    drawn: Drawn = {}
    quiet(ax, theme)
    ax.set_xlim(-0.32, 1.32)
    ax.set_ylim(*panel.limits)
    ax.set_xticks([0, 1], [shortened(label, 14) for label in panel.columns])
    ax.tick_params(axis="both", labelsize=12.5)
    ax.tick_params(axis="x", labelcolor=theme.of("ink"))
    for offset, line in zip(_dodge(len(panel.lines), 0.07), panel.lines, strict=True):
        colour = theme.of(line.role)
        places = [offset, 1 + offset]
        (drawn_line,) = ax.plot(places, [c.mean for c in line.cells], color=colour, linewidth=2, zorder=3)
        drawn_line.set_gid(f"line-{line.role}")
        drawn[f"line-{line.role}"] = {"mean": [c.mean for c in line.cells]}
        for place, cell, column in zip(places, line.cells, panel.columns, strict=True):
            gid = f"cell-{line.role}-{column_id(column, panel.columns)}"
            if cell.low is not None and cell.high is not None:
                ax.plot(
                    [place, place], [cell.low, cell.high], color=colour, linewidth=1.4, alpha=0.75, zorder=3
                )
            (dot,) = ax.plot(
                [place],
                [cell.mean],
                "o",
                color=colour,
                markersize=7,
                markeredgecolor=theme.of("surface"),
                markeredgewidth=1.2,
                zorder=4,
            )
            dot.set_gid(gid)
            bracket = interval(cell.low, cell.high, panel.kind)
            drawn[gid] = {
                "mean": cell.mean,
                "low": cell.low,
                "high": cell.high,
                "tip": f"{line.label}, {column}: {number(cell.mean, panel.kind)} {bracket}".rstrip(),
            }
    few_ticks(ax, y=4)
    minus_y(ax)
    return drawn


def column_id(column: str, columns: Sequence[str]) -> str:
    """A name for `column` that is safe as part of an id."""
    return "greedy" if column == columns[0] else "sampled"


def _dodge(lines: int, width: float) -> list[float]:
    return [width * (i - (lines - 1) / 2) for i in range(lines)]


def draw_frontier(ax: Axes, data: FrontierData, theme: Theme) -> Drawn:
    """Every sampling setting as a labelled point for both models; settings that differ in one number are
    joined."""
    drawn: Drawn = {}
    quiet(ax, theme, grid="both")
    ax.set_xlim(*data.x_limits)
    ax.set_ylim(*data.y_limits)
    boxes: list[Box] = []
    for order, series in enumerate(data.series):
        colour = theme.of(series.role)
        for path in series.paths:
            ax.plot(
                [series.points[i].x for i in path],
                [series.points[i].y for i in path],
                color=colour,
                linewidth=1.1,
                alpha=0.45,
                zorder=2,
            )
        for index, point in enumerate(series.points):
            if point.x_low is not None and point.x_high is not None:
                ax.plot(
                    [point.x_low, point.x_high],
                    [point.y, point.y],
                    color=colour,
                    linewidth=1,
                    alpha=0.4,
                    zorder=2,
                )
            if point.y_low is not None and point.y_high is not None:
                ax.plot(
                    [point.x, point.x],
                    [point.y_low, point.y_high],
                    color=colour,
                    linewidth=1,
                    alpha=0.4,
                    zorder=2,
                )
            marker = "s" if point.greedy else "o"
            (dot,) = ax.plot(
                [point.x],
                [point.y],
                marker,
                color=colour,
                # Where two models' points coincide, the later and smaller one leaves a ring of the first.
                markersize=max(10.5 - 3 * order, 5),
                markeredgecolor=theme.of("surface"),
                markeredgewidth=1.2,
                zorder=4,
                clip_on=False,
            )
            gid = f"point-{series.role}-{index}"
            dot.set_gid(gid)
            x, y = number(point.x, data.kind_x), number(point.y, data.kind_y)
            tip = f"{series.label}, {point.setting}: {data.x_name} {x}, {data.y_name} {y}"
            drawn[gid] = {"x": point.x, "y": point.y, "setting": point.setting, "tip": tip}
    marks = [pixels(ax, p.x, p.y) for s in data.series for p in s.points]
    boxes.extend((x - 5, y - 5, x + 5, y + 5) for x, y in marks)
    named: list[tuple[str, float, float]] = []
    for series in data.series:
        for point in series.points:
            # Where two models' points of one setting lie together, one label serves both.
            px, py = pixels(ax, point.x, point.y)
            if any(point.label == text and abs(px - x) < 14 and abs(py - y) < 10 for text, x, y in named):
                continue
            named.append((point.label, px, py))
            place_label(ax, point.label, point.x, point.y, theme.of(series.role), theme.of("surface"), boxes)
    few_ticks(ax, x=5, y=5)
    minus_ticks(ax)
    corner_label(ax, data.y_axis, theme)
    ax.set_xlabel(data.x_axis, fontsize=12.5, color=theme.of("soft"), labelpad=5)
    return drawn
