"""Where things go in a picture: canvas, axes, quiet frames, labels that keep out of each other's way.

Knows no study and no number of one. Sizes are CSS pixels; colours are asked of a theme by role.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from twodice.study.svg import NUM_ARM_COLOURS, SETTINGS, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Box = tuple[float, float, float, float]
#: A panel: two stand side by side on a wide page, one alone on a telephone.
PANEL = (400.0, 310.0)


@contextmanager
def canvas(width: float, height: float, theme: Theme) -> Iterator[Figure]:
    """A figure of `width` x `height` CSS pixels with the settings of this house, whatever the user's own
    are."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor=theme.of("surface"))
        FigureCanvasAgg(figure)
        if theme.name == "css":
            figure.patch.set_visible(False)  # the page's own surface shows through
        yield figure


def axes_in(figure: Figure, box: Box) -> Axes:
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
    """Move labels apart until neighbours are `least` away, as near as can be to where they belong, in [low,
    high]."""
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


def quiet(ax: Axes, theme: Theme, *, grid: Literal["x", "y", "both"] | None = "y") -> None:
    """A bottom line, a faint grid, and nothing else."""
    ax.set_facecolor("none")
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(theme.of("rule"))
    ax.tick_params(length=0, labelsize=12.5, colors=theme.of("soft"), pad=5)
    if grid is not None:
        ax.grid(True, axis=grid, color=theme.of("grid"), linewidth=1)
        ax.set_axisbelow(True)


def corner_label(ax: Axes, text: str, theme: Theme, *, rise: float = 12) -> None:
    """The unit of the vertical axis, above it and level: nobody should tilt the head to read."""
    ax.annotate(
        text,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, rise),
        textcoords="offset points",
        ha="left",
        va="bottom",
        fontsize=12.5,
        color=theme.of("soft"),
        annotation_clip=False,
    )


def few_ticks(ax: Axes, *, x: int | None = None, y: int | None = None) -> None:
    """At most so many ticks, at round numbers."""
    from matplotlib.ticker import MaxNLocator

    if x is not None:
        ax.xaxis.set_major_locator(MaxNLocator(x, steps=[1, 2, 2.5, 5, 10]))
    if y is not None:
        ax.yaxis.set_major_locator(MaxNLocator(y, steps=[1, 2, 2.5, 5, 10]))


def minus_ticks(ax: Axes) -> None:
    """Tick texts with a true minus and no needless digits."""
    from matplotlib.ticker import FuncFormatter

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}".replace("-", "−")))


def minus_y(ax: Axes) -> None:
    """As `minus_ticks`, where the other axis has names."""
    from matplotlib.ticker import FuncFormatter

    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}".replace("-", "−")))


def pixels(ax: Axes, x: float, y: float) -> tuple[float, float]:
    """Where a point of the data lies on the canvas."""
    px, py = ax.transData.transform((x, y))
    return float(px), float(py)


_LABEL_PLACES: tuple[tuple[int, int, str], ...] = (
    (9, 0, "left"),
    (-9, 0, "right"),
    (0, 14, "center"),
    (0, -14, "center"),
    (9, 11, "left"),
    (-9, 11, "right"),
    (9, -11, "left"),
    (-9, -11, "right"),
    *((16, dy, "left") for dy in (22, -22, 36, -36, 50, -50, 64, -64)),
    *((-16, dy, "right") for dy in (22, -22, 36, -36, 50, -50, 64, -64)),
)


def place_label(ax: Axes, text: str, x: float, y: float, colour: str, surface: str, taken: list[Box]) -> None:
    """Write `text` beside its point where it meets nothing; without such a place, the tooltip has it."""
    px, py = pixels(ax, x, y)
    frame = ax.get_window_extent()
    width, height = 7.2 * len(text), 14.0
    for dx, dy, ha in _LABEL_PLACES:
        left = px + dx - {"left": 0.0, "right": width, "center": width / 2}[ha]
        box = (left, py + dy - height / 2, left + width, py + dy + height / 2)
        across = box[0] >= frame.x0 + 2 and box[2] <= frame.x1 + 14
        inside = across and box[1] >= frame.y0 + 2 and box[3] <= frame.y1 + 8
        if inside and not any(_meet(box, other) for other in taken):
            taken.append(box)
            leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5}
            ax.annotate(
                text,
                (x, y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=ha,
                va="center",
                fontsize=12.5,
                color=colour,
                annotation_clip=False,
                zorder=3,
                arrowprops=leader if abs(dy) > 15 else None,
                bbox={
                    "boxstyle": "square,pad=0.05",
                    "facecolor": surface,
                    "edgecolor": "none",
                    "alpha": 0.85,
                },
            )
            return


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def limits(
    values: Iterable[float | None], *, pad: float = 0.06, include: Iterable[float] = ()
) -> tuple[float, float]:
    """An axis that holds all `values` (those that are there) with some air; never of zero width."""
    finite = [v for v in values if v is not None] + list(include)
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    width = high - low
    if width <= 0:
        width = abs(high) * 0.1 if high != 0 else 1.0
    return low - pad * width, high + pad * width


def axes_height(ax: Axes) -> float:
    """Height of the axes."""
    return float(ax.bbox.height)
