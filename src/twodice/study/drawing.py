"""Plot data to matplotlib axes: where each mark and label goes, and nothing about where the numbers come from.

Every artist that carries a number has a ``gid``; the dictionary that a drawing returns gives, by gid, the values drawn,
so that a picture can be held against the record it was made from. Colours are asked of a theme by role, never named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from twodice.study.svg import NUM_ARM_COLOURS, SETTINGS, Theme
from twodice.study.words import interval, number, percent, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from twodice.study.charts import ArmCurves, Band, CrossPanel, CurvesData, ForestData, FrontierData, GapData

Drawn = dict[str, dict[str, Any]]
PANEL = (400.0, 310.0)  # a panel in CSS pixels: two stand side by side on a wide page, one alone on a telephone


@contextmanager
def canvas(width: float, height: float, theme: Theme) -> Iterator[Figure]:
    """A figure of `width` x `height` CSS pixels with the settings of this house, whatever the user's own are."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor=theme["surface"])
        FigureCanvasAgg(figure)
        if theme.name == "css":
            figure.patch.set_visible(False)  # the page's own surface shows through
        yield figure


def axes_in(figure: Figure, box: tuple[float, float, float, float]) -> Axes:
    """Axes that leave `box` = (left, top, right, bottom) CSS pixels free for labels."""
    width, height = (72 * inches for inches in figure.get_size_inches())
    left, top, right, bottom = box
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )


def arm_role(arm: int, *, is_baseline: bool) -> str:
    """The colour of an arm: grey for the baseline, then the palette in the order of the arms, going round."""
    return "arm-0" if is_baseline else f"arm-{1 + (arm - 1) % (NUM_ARM_COLOURS - 1)}"


def shortened(text: str, length: int) -> str:
    """`text` in at most `length` characters; the page's tables give it in full."""
    # What cannot be printed (control characters, lone halves of a pair) cannot stand in a picture either.
    flat = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return flat if len(flat) <= length else flat[: length - 1].rstrip() + "…"


def spread(places: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Move labels apart until neighbours are `least` away, as near as can be to where they belong, in [low, high]."""
    order = sorted(range(len(places)), key=lambda i: (places[i], i))
    moved = [min(max(places[i], low), high) for i in order]
    for _ in range(200):
        shifted = False
        for j in range(1, len(moved)):
            lack = least - (moved[j] - moved[j - 1])
            if lack > 1e-9:
                moved[j - 1] -= lack / 2
                moved[j] += lack / 2
                shifted = True
        under, over = low - moved[0] if moved else 0.0, moved[-1] - high if moved else 0.0
        if under > 0:
            moved[0] = low
        if over > 0:
            moved[-1] = high
        if not shifted:
            break
    result = [0.0] * len(places)
    for j, i in enumerate(order):
        result[i] = moved[j]
    return result


def _quiet(ax: Axes, theme: Theme, *, grid: str | None = "y") -> None:
    ax.set_facecolor("none")
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(theme["rule"])
    ax.tick_params(length=0, labelsize=12.5, colors=theme["soft"], pad=5)
    if grid is not None:
        ax.grid(True, axis=grid, color=theme["grid"], linewidth=1)
        ax.set_axisbelow(True)


def _corner_label(ax: Axes, text: str, theme: Theme, *, rise: float = 12) -> None:
    """The unit of the vertical axis, above it and level: nobody should tilt the head to read."""
    ax.annotate(text, (0, 1), xycoords="axes fraction", xytext=(0, rise), textcoords="offset points", ha="left",
                va="bottom", fontsize=12.5, color=theme["soft"], annotation_clip=False)  # fmt: skip


def _few_ticks(ax: Axes, *, x: int | None = None, y: int | None = None) -> None:
    from matplotlib.ticker import MaxNLocator

    if x is not None:
        ax.xaxis.set_major_locator(MaxNLocator(x, steps=[1, 2, 2.5, 5, 10]))
    if y is not None:
        ax.yaxis.set_major_locator(MaxNLocator(y, steps=[1, 2, 2.5, 5, 10]))


def _minus_ticks(ax: Axes) -> None:
    """Tick texts with a true minus and no needless digits."""
    from matplotlib.ticker import FuncFormatter

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}".replace("-", "−")))


def _band(ax: Axes, band: Band, colour: str, gid: str, *, dashed: bool, width: float = 2.0) -> Drawn:
    steps = list(band.steps)
    if all(low is not None and high is not None for low, high in zip(band.low, band.high, strict=True)):
        ax.fill_between(steps, list(band.low), list(band.high), color=colour, alpha=0.16, linewidth=0)
    style: dict[str, Any] = {"dashes": (4, 2.2)} if dashed else {}
    (line,) = ax.plot(steps, list(band.mean), color=colour, linewidth=width, solid_capstyle="round", **style)
    line.set_gid(gid)
    return {gid: {"steps": steps, "mean": list(band.mean), "low": list(band.low), "high": list(band.high)}}


def _best_dot(ax: Axes, arm: ArmCurves, colour: str, gid: str, theme: Theme) -> Drawn:
    if arm.best_step is None or arm.best_value is None:
        return {}
    (dot,) = ax.plot([arm.best_step], [arm.best_value], "o", color=colour, markersize=7.5,
                     markeredgecolor=theme["surface"], markeredgewidth=1.6, zorder=5, clip_on=False)  # fmt: skip
    dot.set_gid(gid)
    tip = f"{arm.name}: lowest at step {arm.best_step}, {number(arm.best_value)} nats per token"
    return {gid: {"step": arm.best_step, "value": arm.best_value, "tip": tip}}


def draw_validation_curves(ax: Axes, data: CurvesData, theme: Theme) -> Drawn:
    """The validation loss of every arm over the steps, with intervals, each labelled at its end."""
    drawn: Drawn = {}
    _quiet(ax, theme)
    ax.set_ylim(*data.validation_limits)
    ax.set_xlim(0, data.last_step)
    ends, roles = [], []
    for arm in data.arms:
        role = arm_role(arm.index, is_baseline=arm.is_baseline)
        colour = theme[role]
        drawn |= _band(ax, arm.validation, colour, f"validation-{arm.index}", dashed=False, width=2.2)
        drawn |= _best_dot(ax, arm, colour, f"best-{arm.index}", theme)
        ends.append(arm.validation.mean[-1])
        roles.append(role)
    low, high = data.validation_limits
    height = ax.get_position().height * 72 * ax.figure.get_size_inches()[1]
    for arm, role, end, place in zip(
        data.arms, roles, ends, spread(ends, 17 * (high - low) / height, low, high), strict=True
    ):
        ax.annotate(shortened(arm.name, 15), (data.last_step, min(max(end, low), high)), xycoords="data",
                    xytext=(1.03, (place - low) / (high - low)), textcoords="axes fraction", va="center", ha="left",
                    fontsize=13, fontweight="bold", color=theme[role], annotation_clip=False,
                    arrowprops={"arrowstyle": "-", "color": theme[role], "linewidth": 0.8, "shrinkA": 1, "shrinkB": 2,
                                "relpos": (0, 0.5)})  # fmt: skip
    _few_ticks(ax, x=5, y=6)
    _minus_ticks(ax)
    _corner_label(ax, "validation loss, nats per token", theme)
    ax.set_xlabel("step", fontsize=12.5, color=theme["soft"], labelpad=4)
    return drawn


def draw_arm_curves(ax: Axes, data: CurvesData, index: int, theme: Theme) -> Drawn:
    """Train and validation loss of one arm; the shaded space between them is the generalisation gap."""
    arm = data.arms[index]
    base = next((a for a in data.arms if a.is_baseline), None)
    colour = theme[arm_role(arm.index, is_baseline=arm.is_baseline)]
    _quiet(ax, theme)
    ax.set_ylim(*data.all_limits)
    ax.set_xlim(0, data.last_step)
    if base is not None and not arm.is_baseline:
        for band, dashes in ((base.train, (4, 2.2)), (base.validation, (None, None))):
            ax.plot(list(band.steps), list(band.mean), color=theme["arm-0"], linewidth=1.1, alpha=0.75, dashes=dashes)
    ax.fill_between(list(arm.train.steps), list(arm.train.mean), list(arm.validation.mean), color=colour, alpha=0.08,
                    linewidth=0)  # fmt: skip
    drawn = _band(ax, arm.validation, colour, f"arm{arm.index}-validation", dashed=False, width=2.2)
    drawn |= _band(ax, arm.train, colour, f"arm{arm.index}-train", dashed=True, width=1.8)
    drawn |= _best_dot(ax, arm, colour, f"arm{arm.index}-best", theme)
    low, high = data.all_limits
    height = ax.get_position().height * 72 * ax.figure.get_size_inches()[1]
    ends = [arm.validation.mean[-1], arm.train.mean[-1]]
    for text, weight, end in zip(
        ("validation", "train"), ("bold", "normal"), spread(ends, 17 * (high - low) / height, low, high), strict=True
    ):
        ax.annotate(text, (1.02, (end - low) / (high - low)), xycoords="axes fraction", va="center", ha="left",
                    fontsize=13, fontweight=weight, color=colour, annotation_clip=False)  # fmt: skip
    _few_ticks(ax, x=4, y=5)
    _minus_ticks(ax)
    _corner_label(ax, "loss, nats per token", theme)
    ax.set_xlabel("step", fontsize=12.5, color=theme["soft"], labelpad=4)
    return drawn


def forest_height(rows: int) -> float:
    """CSS pixels that a forest plot with `rows` rows needs."""
    return 88.0 + 66.0 * max(rows, 1)


def draw_forest(ax: Axes, data: ForestData, theme: Theme) -> Drawn:
    """One row an arm: every seed's paired difference as a dot, the mean with its adjusted interval, the zero line."""
    drawn: Drawn = {}
    _quiet(ax, theme, grid="x")
    rows = len(data.rows)
    ax.set_ylim(rows - 0.25, -0.62)
    ax.set_xlim(*data.limits)
    ax.set_yticks([])
    ax.axvline(0, color=theme["ink"], linewidth=1.4, zorder=2)
    for place, row in enumerate(data.rows):
        colour = theme[arm_role(row.arm, is_baseline=False)]
        for seed, value in zip(row.seeds, row.values, strict=True):
            (dot,) = ax.plot([value], [place + 0.30], "o", color=colour, markersize=6, alpha=0.55, markeredgewidth=0,
                             clip_on=False, zorder=3)  # fmt: skip
            gid = f"{data.when}-seed-{row.arm}-{seed}"
            dot.set_gid(gid)
            drawn[gid] = {"value": value, "tip": f"{row.name}, seed {seed}: {signed(value)} nats per token"}
        gid = f"{data.when}-difference-{row.arm}"
        if row.low is not None and row.high is not None:
            (bar,) = ax.plot([row.low, row.high], [place, place], color=colour, linewidth=3.2, zorder=4,
                             solid_capstyle="butt", clip_on=False)  # fmt: skip
            for end in (row.low, row.high):
                ax.plot([end, end], [place - 0.075, place + 0.075], color=colour, linewidth=1.6, zorder=4, clip_on=False)
            bar.set_gid(gid)
            tip = f"{row.name}: {signed(row.mean)} [{signed(row.low)}, {signed(row.high)}] nats per token"
            drawn[gid] = {"low": row.low, "high": row.high, "tip": tip}
        (mean,) = ax.plot([row.mean], [place], "D", color=colour, markersize=8.5, markeredgecolor=theme["surface"],
                          markeredgewidth=1.4, zorder=5, clip_on=False)  # fmt: skip
        mean.set_gid(f"{gid}-mean")
        drawn[f"{gid}-mean"] = {"mean": row.mean}
        role = {"helps": "good", "hurts": "bad"}.get(row.verdict, "soft")
        for anchor, rise, text, paint, box in (
            ((0.0, place - 0.24), 0, shortened(row.name, 34), colour, True),
            ((1.0, place), 8, row.verdict, theme[role], False),
            ((1.0, place), -8, percent(row.percent), theme["ink"], False),
        ):
            ax.annotate(text, anchor, xycoords=("axes fraction", "data"), xytext=(0 if box else 12, rise),
                        textcoords="offset points", ha="left", va="bottom" if box else "center", fontsize=13.5,
                        fontweight="bold", color=paint, annotation_clip=False, zorder=6,
                        bbox={"boxstyle": "square,pad=0.1", "facecolor": theme["surface"], "edgecolor": "none"}
                        if box else None)  # fmt: skip
    _few_ticks(ax, x=5)
    _minus_ticks(ax)
    low, high = data.limits
    ax.set_xlabel("difference to the baseline, nats per token", fontsize=12.5, color=theme["soft"], labelpad=5)
    zero = (0 - low) / (high - low)
    for text, side, x in (("◀ less loss", "left", 0.0), ("more loss ▶", "right", 1.0)):
        if (side == "left" and zero > 0.36) or (side == "right" and zero < 0.64):
            ax.annotate(text, (x, 1), xycoords="axes fraction", xytext=(0, 8), textcoords="offset points", ha=side,
                        va="bottom", fontsize=12.5, color=theme["soft"], annotation_clip=False)  # fmt: skip
    ax.annotate("baseline", (zero, 1), xycoords="axes fraction", xytext=(0, 8), textcoords="offset points",
                ha="center", va="bottom", fontsize=12.5, fontweight="bold", color=theme["ink"],
                annotation_clip=False)  # fmt: skip
    return drawn


def gap_height(rows: int) -> float:
    """CSS pixels that a gap plot with `rows` rows needs."""
    return 88.0 + 50.0 * max(rows, 1)


def draw_gap(ax: Axes, data: GapData, theme: Theme) -> Drawn:
    """One row an arm: train loss (ring) and validation loss (disc), and between them the generalisation gap."""
    drawn: Drawn = {}
    _quiet(ax, theme, grid="x")
    ax.set_ylim(len(data.rows) - 0.3, -0.75)
    ax.set_xlim(*data.limits)
    ax.set_yticks([])
    for place, row in enumerate(data.rows):
        colour = theme[arm_role(row.arm, is_baseline=row.is_baseline)]
        gid = f"{data.when}-gap-{row.arm}"
        (bar,) = ax.plot([row.train, row.validation], [place, place], color=colour, linewidth=6, alpha=0.3,
                         solid_capstyle="butt", zorder=2)  # fmt: skip
        bar.set_gid(gid)
        tip = f"{row.name}: train {number(row.train)}, validation {number(row.validation)}, gap {number(row.gap)}"
        drawn[gid] = {"train": row.train, "validation": row.validation, "gap": row.gap, "tip": tip}
        ax.plot([row.train], [place], "o", markersize=9, markerfacecolor=theme["surface"], markeredgecolor=colour,
                markeredgewidth=2, zorder=3, clip_on=False)  # fmt: skip
        ax.plot([row.validation], [place], "o", markersize=9, color=colour, zorder=3, clip_on=False)
        ax.annotate(shortened(row.name, 21), (0, place - 0.2), xycoords=("axes fraction", "data"), ha="left", va="bottom",
                    fontsize=13, fontweight="bold", color=colour, annotation_clip=False)  # fmt: skip
        bracket = interval(row.gap_low, row.gap_high)
        ax.annotate(f"gap {number(row.gap)} {bracket}".rstrip(), (1, place - 0.2), xycoords=("axes fraction", "data"), ha="right",
                    va="bottom", fontsize=13, color=theme["ink"], annotation_clip=False)  # fmt: skip
    _few_ticks(ax, x=5)
    _minus_ticks(ax)
    ax.set_xlabel("nats per token:  ○ train   ● validation", fontsize=12.5, color=theme["soft"], labelpad=5)
    return drawn


def draw_cross(ax: Axes, panel: CrossPanel, theme: Theme) -> Drawn:
    """One measure, greedy against sampled, a line for each model: slope is the generation die, distance the training die."""
    drawn: Drawn = {}
    _quiet(ax, theme)
    ax.set_xlim(-0.32, 1.32)
    ax.set_ylim(*panel.limits)
    ax.set_xticks([0, 1], [shortened(label, 14) for label in panel.columns])
    ax.tick_params(axis="both", labelsize=12.5)
    ax.tick_params(axis="x", labelcolor=theme["ink"])
    for offset, line in zip(_dodge(len(panel.lines), 0.07), panel.lines, strict=True):
        colour = theme[line.role]
        places = [offset, 1 + offset]
        (drawn_line,) = ax.plot(places, [c.mean for c in line.cells], color=colour, linewidth=2, zorder=3)
        drawn_line.set_gid(f"line-{line.role}")
        drawn[f"line-{line.role}"] = {"mean": [c.mean for c in line.cells]}
        for place, cell, column in zip(places, line.cells, panel.columns, strict=True):
            gid = f"cell-{line.role}-{column_id(column, panel.columns)}"
            if cell.low is not None and cell.high is not None:
                ax.plot([place, place], [cell.low, cell.high], color=colour, linewidth=1.4, alpha=0.75, zorder=3)
            (dot,) = ax.plot([place], [cell.mean], "o", color=colour, markersize=7, markeredgecolor=theme["surface"],
                             markeredgewidth=1.2, zorder=4)  # fmt: skip
            dot.set_gid(gid)
            bracket = interval(cell.low, cell.high, panel.kind)
            drawn[gid] = {
                "mean": cell.mean,
                "low": cell.low,
                "high": cell.high,
                "tip": f"{line.label}, {column}: {number(cell.mean, panel.kind)} {bracket}".rstrip(),
            }
    _few_ticks(ax, y=4)
    _minus_y(ax)
    return drawn


def column_id(column: str, columns: Sequence[str]) -> str:
    """A name for `column` that is safe as part of an id."""
    return "greedy" if column == columns[0] else "sampled"


def _dodge(lines: int, width: float) -> list[float]:
    return [width * (i - (lines - 1) / 2) for i in range(lines)]


def _minus_y(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}".replace("-", "−")))


def draw_frontier(ax: Axes, data: FrontierData, theme: Theme) -> Drawn:
    """Every sampling setting as a labelled point for both models; settings that differ in one number are joined."""
    drawn: Drawn = {}
    _quiet(ax, theme, grid="both")
    ax.set_xlim(*data.x_limits)
    ax.set_ylim(*data.y_limits)
    boxes: list[tuple[float, float, float, float]] = []
    for series in data.series:
        colour = theme[series.role]
        for path in series.paths:
            ax.plot([series.points[i].x for i in path], [series.points[i].y for i in path], color=colour, linewidth=1.1,
                    alpha=0.45, zorder=2)  # fmt: skip
        for index, point in enumerate(series.points):
            for xs, ys in (
                ([point.x_low, point.x_high], [point.y, point.y]),
                ([point.x, point.x], [point.y_low, point.y_high]),
            ):
                if None not in xs and None not in ys:
                    ax.plot(xs, ys, color=colour, linewidth=1, alpha=0.4, zorder=2)
            marker = "s" if point.greedy else "o"
            (dot,) = ax.plot([point.x], [point.y], marker, color=colour, markersize=8, markeredgecolor=theme["surface"],
                             markeredgewidth=1.2, zorder=4, clip_on=False)  # fmt: skip
            gid = f"point-{series.role}-{index}"
            dot.set_gid(gid)
            tip = f"{series.label}, {point.setting}: {data.x_name} {number(point.x, data.kind_x)}, {data.y_name} {number(point.y, data.kind_y)}"
            drawn[gid] = {"x": point.x, "y": point.y, "setting": point.setting, "tip": tip}
    marks = [_pixels(ax, p.x, p.y) for s in data.series for p in s.points]
    boxes.extend((x - 5, y - 5, x + 5, y + 5) for x, y in marks)
    named: list[tuple[str, float, float]] = []
    for series in data.series:
        for point in series.points:
            # Where two models' points of one setting lie together, one label serves both.
            px, py = _pixels(ax, point.x, point.y)
            if any(point.label == text and abs(px - x) < 24 and abs(py - y) < 12 for text, x, y in named):
                continue
            named.append((point.label, px, py))
            _place_label(ax, point.label, point.x, point.y, theme[series.role], boxes)
    _few_ticks(ax, x=5, y=5)
    _minus_ticks(ax)
    _corner_label(ax, data.y_axis, theme)
    ax.set_xlabel(data.x_axis, fontsize=12.5, color=theme["soft"], labelpad=5)
    return drawn


def _pixels(ax: Axes, x: float, y: float) -> tuple[float, float]:
    px, py = ax.transData.transform((x, y))
    return float(px), float(py)


def _place_label(
    ax: Axes, text: str, x: float, y: float, colour: str, taken: list[tuple[float, float, float, float]]
) -> None:
    """Write `text` beside its point on the first side where it meets nothing; leave it to the tooltip if none is free."""
    px, py = _pixels(ax, x, y)
    frame = ax.get_window_extent()
    width, height = 7.2 * len(text), 14.0
    for dx, dy, ha in ((9, 0, "left"), (-9, 0, "right"), (0, 13, "center"), (0, -13, "center"), (9, 11, "left"),
                       (-9, 11, "right"), (9, -11, "left"), (-9, -11, "right"), (0, 24, "center"), (0, -24, "center"),
                       (14, 20, "left"), (-14, 20, "right"), (14, -20, "left"), (-14, -20, "right")):  # fmt: skip
        left = px + dx - {"left": 0.0, "right": width, "center": width / 2}[ha]
        box = (left, py + dy - height / 2, left + width, py + dy + height / 2)
        inside = box[0] >= frame.x0 - 30 and box[2] <= frame.x1 + 14 and box[1] >= frame.y0 + 2 and box[3] <= frame.y1 + 8
        if inside and not any(_meet(box, other) for other in taken):
            taken.append(box)
            ax.annotate(text, (x, y), xytext=(dx, dy), textcoords="offset points", ha=ha, va="center", fontsize=12.5,
                        color=colour, annotation_clip=False, zorder=6)  # fmt: skip
            return


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def limits(values: Iterable[float | None], *, pad: float = 0.06, include: Iterable[float] = ()) -> tuple[float, float]:
    """An axis that holds all `values` (those that are there) with some air; never of zero width."""
    finite = [v for v in values if v is not None] + list(include)
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    width = high - low
    if width <= 0:
        width = abs(high) * 0.1 if high != 0 else 1.0
    return low - pad * width, high + pad * width
