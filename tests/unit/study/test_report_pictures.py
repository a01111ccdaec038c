"""Pictures and JSON are held together: what stands in a picture is what stands in the report, and nothing
else."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.support.report_cases import changed, full_report, hostile_report, one_arm_one_seed, without_cross

from twodice.study import charts, drawing, layout, plot_data
from twodice.study.report import pictures
from twodice.study.schema import Report
from twodice.study.svg import CSS_THEME, DARK, LIGHT, SENTINELS, svg_of

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def report() -> Report:
    return full_report()


@pytest.fixture(scope="module")
def before(report: Report) -> dict[str, Any]:
    return pictures(report)


def drawn(svg: str) -> dict[str, dict[str, str]]:
    """Every ``data-`` attribute of a picture, by the gid of its mark."""
    root = ElementTree.fromstring(svg)
    name = root.get("id", "")
    return {
        element.get("id", "").removeprefix(f"{name}-"): data
        for element in root.iter()
        if (data := {k.removeprefix("data-"): v for k, v in element.attrib.items() if k.startswith("data-")})
    }


def numbers(values: Any) -> str:
    return " ".join("" if v is None else repr(v) for v in values)


def test_every_curve_is_that_of_the_report(report: Report) -> None:
    curves = plot_data.curves_data(report)
    overview = drawn(charts.validation_picture(curves))
    for number, arm in enumerate(report.arms):
        alone = drawn(charts.arm_picture(curves, number))
        for shown, estimates in (
            (overview[f"validation-{number}"], arm.curve.validation_nats_per_token),
            (alone[f"arm{number}-validation"], arm.curve.validation_nats_per_token),
            (alone[f"arm{number}-train"], arm.curve.train_nats_per_token),
        ):
            assert shown["steps"] == numbers(arm.curve.steps)
            for key in ("mean", "low", "high"):
                assert shown[key] == numbers(getattr(e, key) for e in estimates)


@pytest.mark.parametrize("when", ["best", "end"])
def test_every_difference_is_that_of_the_report(report: Report, when: str) -> None:
    marks = drawn(charts.forest_picture(plot_data.forest_data(report, when)))
    expected: dict[str, dict[str, str]] = {}
    for number, arm in enumerate(report.arms):
        difference = plot_data.moment(arm, when).difference
        if difference is not None:
            gid = f"{when}-difference-{number}"
            expected[gid] = {"low": repr(difference.low), "high": repr(difference.high)}
            expected[f"{gid}-mean"] = {"mean": repr(difference.mean)}
            for seed, value in zip(arm.seeds, difference.values, strict=True):
                expected[f"{when}-seed-{number}-{seed}"] = {"value": repr(value)}
    assert marks == expected


@pytest.mark.parametrize("when", ["best", "end"])
def test_every_gap_is_that_of_the_report(report: Report, when: str) -> None:
    marks = drawn(charts.gap_picture(plot_data.gap_data(report, when)))
    for number, arm in enumerate(report.arms):
        here = plot_data.moment(arm, when)
        assert marks[f"{when}-gap-{number}"] == {
            "train": repr(here.train_nats_per_token.mean),
            "validation": repr(here.validation_nats_per_token.mean),
            "gap": repr(here.gap_nats_per_token.mean),
        }
    assert len(marks) == len(report.arms)


def test_every_corner_and_every_setting_is_that_of_the_report(report: Report) -> None:
    assert report.cross is not None
    for panel in plot_data.cross_panels(report):
        marks = drawn(charts.cross_picture(panel))
        for arm in (report.cross.without, report.cross.with_dropout):
            for place, setting in (("greedy", report.cross.greedy), ("sampled", report.cross.drawn)):
                cell = plot_data.sampling_cell(report, str(arm), setting)
                assert cell is not None
                estimate = getattr(cell.measures, panel.measure)
                shown = marks[f"cell-{plot_data.arm_role(report, str(arm))}-{place}"]
                assert shown == {k: repr(getattr(estimate, k)) for k in ("mean", "low", "high")}
    data = plot_data.frontier_data(report)
    assert data is not None
    marks = drawn(charts.frontier_picture(data, "frontier"))
    shown_points = sorted((m["x"], m["y"], m["setting"]) for m in marks.values())
    assert shown_points == sorted(
        (repr(c.measures.rep_4.mean), repr(c.measures.distinct_2.mean), c.setting.name)
        for c in report.sampling
    )


def places(draw: Any) -> dict[str, list[float]]:
    """Where the marks truly are, from the artists themselves, in the units of the axes."""
    with layout.canvas(400, 300, CSS_THEME) as figure:
        ax = layout.axes_in(figure, (40, 30, 40, 40))
        draw(ax)
        return {line.get_gid(): [float(v) for v in line.get_xdata()] for line in ax.lines if line.get_gid()}


def test_marks_are_drawn_where_their_numbers_say(report: Report) -> None:
    # Not only the attributes: a mark with the right number in the wrong place is found here.
    data = plot_data.forest_data(report, "best")
    found = places(lambda ax: drawing.draw_forest(ax, data, CSS_THEME))
    for row in data.rows:
        assert found[f"best-difference-{row.arm}"] == [row.low, row.high]
        assert found[f"best-difference-{row.arm}-mean"] == [row.mean]
        for seed, value in zip(row.seeds, row.values, strict=True):
            assert found[f"best-seed-{row.arm}-{seed}"] == [value]


@pytest.mark.parametrize(
    "path",
    [
        ("arms", 1, "at_best", "difference", "mean"),
        ("arms", 2, "at_best", "difference", "high"),
        ("arms", 3, "at_end", "difference", "values", 4),
        ("arms", 0, "at_end", "gap_nats_per_token", "mean"),
        ("arms", 2, "curve", "train_nats_per_token", 7, "low"),
        ("sampling", 3, "measures", "distinct_2", "mean"),
    ],
)
def test_a_number_changed_in_the_json_changes_a_picture(
    report: Report, before: dict[str, Any], path: tuple[Any, ...]
) -> None:
    data = report.model_dump()
    inner: Any = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] += 0.003
    after = pictures(Report.model_validate(data))
    assert [key for key in before if _svgs(before[key]) != _svgs(after[key])] != []


def _svgs(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if value.lstrip().startswith("<svg") else []
    if isinstance(value, dict):
        return [s for v in value.values() for s in _svgs(v)]
    return [s for v in value for s in _svgs(v)] if isinstance(value, list | tuple) else []


def test_a_value_that_was_not_drawn_is_an_error() -> None:
    # The saboteur: data for a mark that is not in the picture.
    with layout.canvas(100, 100, CSS_THEME) as figure, pytest.raises(ValueError, match="not drawn"):
        svg_of(figure, name="x", title="t", description="d", data={"ghost": {"value": 1.0}})


@pytest.mark.parametrize("make", [full_report, hostile_report, without_cross, one_arm_one_seed])
def test_pictures_hold_no_literal_colour_style_or_outside_address(make: Any) -> None:
    for svg in _svgs(pictures(make())):
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img" and root.get("aria-labelledby")
        ids = [e.get("id") for e in root.iter() if e.get("id")]
        assert len(ids) == len(set(ids))
        for element in root.iter():
            assert element.tag not in (f"{SVG}style", f"{SVG}script", f"{SVG}image", f"{SVG}foreignObject")
            for key, value in element.attrib.items():
                assert key != "style" and not key.startswith("on")
                if key in ("fill", "stroke"):
                    assert value == "none" or value.startswith("var(--"), value
                if key in ("href", "clip-path"):
                    assert value.startswith(("#", "url(#"))


def test_both_palettes_have_the_same_roles_and_sentinels_are_apart() -> None:
    assert list(LIGHT) == list(DARK) == list(SENTINELS)
    assert len(set(SENTINELS.values())) == len(SENTINELS)
    assert not set(SENTINELS.values()) & {*LIGHT.values(), *DARK.values()}


def test_labels_are_moved_apart_and_stay_inside() -> None:
    moved = layout.spread([1.0, 1.0, 1.0, 9.9], 1.0, 0.0, 10.0)
    ordered = sorted(moved)
    assert all(b - a > 0.99 for a, b in pairwise(ordered))
    assert ordered[0] >= 0 and ordered[-1] <= 10
    assert layout.spread([3.0, 1.0], 1.0, 0.0, 10.0) == [3.0, 1.0]
    assert layout.spread([], 1.0, 0.0, 1.0) == []


def test_more_arms_than_colours_go_round_and_stay_apart_from_the_baseline(report: Report) -> None:
    roles = [layout.arm_role(i, is_baseline=i == 0) for i in range(16)]
    assert roles[0] == "arm-0" and roles.count("arm-0") == 1
    many = [report.arms[0]] + [
        report.arms[1 + i % 3].model_copy(update={"name": f"arm {i}"}) for i in range(12)
    ]
    shown = changed(report, arms=[arm.model_dump() for arm in many], best="arm 2", cross=None, sampling=[])
    assert len(pictures(shown)["arms"]) == 13


def test_central_picture_is_a_png_and_the_same_each_time(report: Report) -> None:
    one, two = charts.central_picture(report), charts.central_picture(report)
    assert one.startswith(b"\x89PNG") and one == two
    assert charts.central_picture(without_cross()).startswith(b"\x89PNG")
