"""`report.json` to `report.html`: one self-contained file that asks the network for nothing.

Reads the report and nothing else: the same JSON gives the same bytes, in any process, on a machine without
torch. What is said of an arm is what the statistics said (`compare.words`); this file only lays it out. All
texts, names of arms included, are data of others and are escaped by the template engine.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from twodice.errors import DataError
from twodice.study import charts, plot_data
from twodice.study.answer import SO_FAR, passes
from twodice.study.cross_words import cross_sentence, cross_summary, moved_by
from twodice.study.layout import shortened
from twodice.study.marks import Piece, marked, without_blanks
from twodice.study.mechanisms import page
from twodice.study.schema import Arm, Estimate, Example, Report, read_report
from twodice.study.svg import DARK, LIGHT, css_variables
from twodice.study.words import (
    MINUS,
    counted,
    interval,
    listed,
    number,
    percent,
    signed,
    signed_interval,
)

_PAGE = {  # colours of the page around the pictures; the pictures' own are in `svg`
    "light": "--page: #f7f8fa; --link: #0a5ca8; --mark-repeat: #ffe2a8; --mark-copied: #a33f78;",
    "dark": "--page: #0f1217; --link: #7cc0f5; --mark-repeat: #5d4309; --mark-copied: #e38fbf;",
}


class Shown(NamedTuple):
    """A number and its interval as text."""

    value: str
    range: str


class KeyFigure(NamedTuple):
    """One of the large figures at the top."""

    name: str
    value: str
    unit: str
    note: str


class CrossRow(NamedTuple):
    """One row of the central table; `spans` where the cells of one model are one, whatever the setting."""

    title: str
    explained: str
    cells: tuple[Shown, ...]
    spans: bool
    says: str
    moved_by: tuple[int, ...]


class Corner(NamedTuple):
    """One example text, cut into pieces that are marked or not."""

    arm: str
    setting: str
    pieces: tuple[Piece, ...]
    note: str


class Corners(NamedTuple):
    """The texts that continue one prompt: the four corners, how it really goes on, all other settings."""

    prompt: str
    corners: tuple[Corner, ...]
    others: tuple[Corner, ...]


def shown(estimate: Estimate, kind: str = "nats") -> Shown:
    """An estimate as text."""
    return Shown(number(estimate.mean, kind), interval(estimate.low, estimate.high, kind))


def _named(name: str) -> str:
    """A name in quotes, kept short, and isolated so that letters written from the right cannot turn what
    follows."""
    return f"“\u2068{shortened(name, 40)}\u2069”"


def key_figures(report: Report) -> tuple[KeyFigure, ...]:
    """The figures at the top: the difference, the gap, what overfitting costs, and what the second die
    does."""
    arms = {arm.name: arm for arm in report.arms}
    baseline, best = arms[report.baseline], arms[report.best]
    figures = []
    difference = best.at_best.difference
    if difference is not None:
        figures.append(
            KeyFigure(
                "loss on unseen text, at the best step",
                percent(difference.percent.mean),
                "",
                f"{signed_interval(difference.percent.low, difference.percent.high, 'plain1')} "
                f"{_named(best.name)} against {_named(baseline.name)}",
            )
        )
    else:
        figures.append(
            KeyFigure(
                "loss on unseen text, at the best step",
                number(baseline.at_best.validation_nats_per_token.mean),
                "nats",
                f"{_named(baseline.name)}; no arm is shown to lower it",
            )
        )
    gap = baseline.at_end.gap_nats_per_token.mean
    other = next((a for a in (best, *report.arms) if a.name != report.baseline), None)
    if other is not None:
        figures.append(
            KeyFigure(
                "generalisation gap at the end, nats per token",
                f"{gap:.2f} → {other.at_end.gap_nats_per_token.mean:.2f}".replace("-", MINUS),
                "",
                f"from {_named(baseline.name)} to {_named(other.name)}",
            )
        )
    else:
        figures.append(
            KeyFigure(
                "generalisation gap at the end, nats per token", f"{gap:.2f}", "", f"{_named(baseline.name)}"
            )
        )
    figures.append(
        KeyFigure(
            "what training too long costs",
            percent(baseline.overfits_percent),
            "",
            f"{_named(baseline.name)}: its loss at the end against its own best"
            + ("" if other is None else f"; {_named(other.name)}: {percent(other.overfits_percent)}"),
        )
    )
    cross = report.cross
    greedy = None if cross is None else plot_data.sampling_cell(report, cross.without, cross.greedy)
    drawn = None if cross is None else plot_data.sampling_cell(report, cross.without, cross.drawn)
    if cross is not None and greedy is not None and drawn is not None:
        figures.append(
            KeyFigure(
                "repeated 4-grams in its text",
                f"{100 * greedy.measures.rep_4.mean:.0f} → {100 * drawn.measures.rep_4.mean:.0f}",
                "%",
                f"{_named(cross.without)}: from {cross.greedy} to {cross.drawn}",
            )
        )
    else:
        bits = best.at_best.validation_bits_per_byte
        figures.append(
            KeyFigure(
                "unseen text costs",
                f"{bits.mean:.2f}",
                "bits per byte",
                f"{_named(best.name)}, at the best step",
            )
        )
    return tuple(figures)


def cross_rows(report: Report) -> tuple[CrossRow, ...]:
    """The central table: what belongs to the model first, then what is of its text."""
    cross = report.cross
    if cross is None:
        return ()
    arms = {arm.name: arm for arm in report.arms}
    models = [arms[name] for name in plot_data.cross_arms(report)]
    rows = [
        CrossRow(
            title,
            explained,
            tuple(shown(getattr(arm.at_best, field)) for arm in models),
            True,
            cross_sentence(report, field, "nats"),
            moved_by(report, field),
        )
        for title, explained, field in (
            ("Loss on unseen text", "nats per token, at the best step", "validation_nats_per_token"),
            (
                "Generalisation gap",
                "loss on unseen text less loss on training text, nats per token",
                "gap_nats_per_token",
            ),
        )
    ]
    for measure in plot_data.MEASURES:
        cells = []
        for arm in models:
            for setting in (cross.greedy, cross.drawn):
                cell = plot_data.sampling_cell(report, arm.name, setting)
                cells.append(
                    Shown("–", "")
                    if cell is None
                    else shown(getattr(cell.measures, measure.field), measure.kind)
                )
        says = cross_sentence(report, measure.field, measure.kind)
        rows.append(
            CrossRow(measure.title, measure.short, tuple(cells), False, says, moved_by(report, measure.field))
        )
    return tuple(rows)


def _corner(example: Example) -> Corner:
    if example.setting == "human":
        pieces = tuple(marked(example.text))
        return Corner("how it really goes on", "held-out text", pieces, "")
    length = example.longest_copied_characters
    notes = ["nothing but blanks"] if not example.text.strip() else []
    notes += [
        f"{number(example.rep_4, 'share')} of 4-grams repeat",
        f"{counted(length, 'character')} copied",
    ]
    if example.training_seed is not None:
        notes.append(f"training seed {example.training_seed}")
    if example.sampling_seed is not None:
        notes.append(f"sampling seed {example.sampling_seed}")
    pieces = tuple(marked(example.text, (example.copied_from, example.copied_from + length)))
    return Corner(example.arm, example.setting, pieces, "; ".join(notes))


def example_texts(report: Report, most: int = 3) -> tuple[Corners, ...]:
    """The example texts by prompt, in the order of the report, at most `most` prompts."""
    cross = report.cross
    if cross is None:
        return ()
    order = [
        (arm, setting) for arm in plot_data.cross_arms(report) for setting in (cross.greedy, cross.drawn)
    ]
    by_prompt: dict[str, list[Example]] = {}
    for example in report.examples:
        by_prompt.setdefault(example.prompt, []).append(example)
    groups = []
    for prompt, examples in list(by_prompt.items())[:most]:
        central = sorted(
            (e for e in examples if (e.arm, e.setting) in order),
            key=lambda e: order.index((e.arm, e.setting)),
        )
        human = [e for e in examples if e.setting == "human"]
        others = [e for e in examples if e not in central and e not in human]
        groups.append(Corners(prompt, tuple(map(_corner, [*central, *human])), tuple(map(_corner, others))))
    return tuple(groups)


def settings_text(arm: Arm) -> str:
    """What an arm changes, as one would type it."""
    if arm.text:
        return arm.text
    return "nothing: " + ("" if arm.has_dropout else "all dropout off, ") + "the settings of all arms, below"


def style_sheet() -> str:
    """The page's whole CSS: the palettes of light, dark and print, then the rules."""
    rules = resources.files("twodice.study").joinpath("report.css").read_text(encoding="utf-8")
    light, dark = (
        f"{_PAGE[name]} {css_variables(colours)}" for name, colours in (("light", LIGHT), ("dark", DARK))
    )
    paper = light.replace("--page: #f7f8fa;", "--page: #ffffff;")
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f"@media print {{ :root {{ color-scheme: light; {paper} }} }}\n{rules}"
    )


def cut_at(report: Report) -> float | None:
    """The loss at which the curves begin, where it lies above what the axis shows; None where all is seen."""
    curves = plot_data.curves_data(report)
    firsts = [arm.validation.mean[0] for arm in curves.arms if arm.validation.mean]
    return firsts[0] if firsts and max(firsts) > curves.validation_limits[1] else None


def pictures(report: Report) -> dict[str, Any]:
    """Every picture of the page as SVG, by its place in the template."""
    curves = plot_data.curves_data(report)
    others = any(arm.at_best.difference is not None for arm in report.arms)
    # Diversity against what a setting costs: repetition (little of it is good), and the model's own surprise.
    frontiers = [
        (name, plot_data.frontier_data(report, x, "distinct_2"))
        for name, x in (("frontier-repetition", "rep_4"), ("frontier-surprise", "own_nats_per_token"))
    ]
    return {
        "validation": charts.validation_picture(curves),
        "arms": [charts.arm_picture(curves, i) for i in range(len(curves.arms))],
        "forest": {w: charts.forest_picture(plot_data.forest_data(report, w)) for w in ("best", "end")}
        if others
        else {},
        "gap": {w: charts.gap_picture(plot_data.gap_data(report, w)) for w in ("best", "end")},
        "cross": [(panel, charts.cross_picture(panel)) for panel in plot_data.cross_panels(report)],
        "frontiers": [
            (data, charts.frontier_picture(data, name)) for name, data in frontiers if data is not None
        ],
    }


@cache
def _environment() -> Any:
    from jinja2 import DictLoader, Environment, StrictUndefined

    sources = {
        name: resources.files("twodice.study").joinpath(name).read_text(encoding="utf-8")
        for name in ("report.html.j2", "mechanisms/table.html.j2")
    }
    environment = Environment(
        loader=DictLoader(sources),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=number,
        signed=signed,
        percent=percent,
        shown=shown,
        listed=listed,
        without_blanks=without_blanks,
    )
    environment.globals.update(counted=counted, interval=interval, settings_text=settings_text)
    return environment


def in_two(answer: str) -> tuple[str, str]:
    """What the answer says, and by what: it is cut, losing nothing, behind its first colon or semicolon."""
    lead = len(SO_FAR) if answer.startswith(SO_FAR) else 0
    cuts = [at for mark in (": ", "; ") if (at := answer.find(mark, lead)) >= 0]
    cut = min(cuts) + 2 if cuts else len(answer)
    return answer[:cut], answer[cut:]


def render(report: Report) -> str:
    """The whole page.

    Returns
    -------
    str
        HTML with no script, no outside address that a browser would fetch, and a content policy that forbids
        both; the one style sheet is allowed by its digest. A pure function of `report`.
    """
    from markupsafe import Markup

    style = style_sheet()
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    drawn = pictures(report)
    numbers = plot_data.arm_numbers(report)
    text: str = (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            answer=in_two(report.answer),
            style=Markup(style),  # ours, and it holds no "<"
            policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
            svg=Markup,  # pictures are escaped by the XML writer that made them
            pictures=drawn,
            cut_at=cut_at(report),
            figures=key_figures(report),
            rows=cross_rows(report),
            models=plot_data.cross_arms(report),
            inside=page.lines(report.mechanisms),
            inside_words=page.shown(report.mechanisms),
            texts=example_texts(report),
            ordered=sorted(report.arms, key=lambda arm: numbers[arm.name]),
            role={name: plot_data.arm_role(report, name) for name in numbers},
            measures=plot_data.MEASURES,
            cross_summary=cross_summary(report),
            passes=passes(report.steps, report.model, report.data),
            untuned_is_said=any("not tuned" in note for note in report.how.notes),
            tuned=any(arm.tuned for arm in report.arms),
        )
    )
    return text


def write_report_html(folder: Path) -> Path:
    """Make ``report.html`` of `folder` from its ``report.json``, whole or not at all.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    DataError
        ``report.json`` is missing or malformed, or the folder cannot be written.
    """
    text = render(read_report(folder / "report.json"))
    target = folder / "report.html"
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", newline="\n", dir=folder, delete=False
        ) as file:
            file.write(text)
        os.chmod(file.name, 0o644)  # the page is meant to be shown; temporary files are born private
        os.replace(file.name, target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error}") from None
    return target
