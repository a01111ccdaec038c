"""What dropout did inside, from records to the page: means, adjusted differences, and reports without it."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest
from tests.support.example_records import example_records, measured_inside

from twodice.study.compare import estimate, paired
from twodice.study.mechanisms.measures import DOMAINS, FIELDS, MEASURES
from twodice.study.mechanisms.page import lines, shown, side_of
from twodice.study.mechanisms.schema import Moved
from twodice.study.report import render
from twodice.study.schema import Report
from twodice.study.summary import summarise
from twodice.study.words import number


@pytest.fixture(scope="module")
def report() -> Report:
    return summarise(measured_inside(example_records()))


def test_each_measure_is_a_line_with_each_arms_mean_and_its_difference_to_the_baseline(
    report: Report,
) -> None:
    block = report.mechanisms
    assert block is not None and [row.measure for row in block.rows] == list(FIELDS)
    # Eleven measures are compared in two arms; what arms measure under their own masks is not.
    assert block.comparisons == 2 * (len(FIELDS) - 1) and block.domain == DOMAINS[1]
    values = {
        (r["arm"], r["seed"]): r["mechanisms"]
        for r in measured_inside(example_records())
        if r["kind"] == "trial"
    }
    for row in block.rows:
        assert [one.arm for one in row.arms] == ["neither", "dropout", "weight decay"]
        for one in row.arms:
            asked = [values[one.arm, seed][row.measure] for seed in report.seeds]
            if None in asked:
                assert one.value is None and one.difference is None
                continue
            assert one.value == estimate(asked)
            if one.arm == "neither" or row.measure == "own_ensemble_gain":
                assert one.difference is None
            else:
                base = [values["neither", seed][row.measure] for seed in report.seeds]
                assert one.difference is not None
                assert one.difference.mean == pytest.approx(np.mean(asked) - np.mean(base), abs=1e-12)


def test_the_intervals_are_adjusted_over_the_whole_table(report: Report) -> None:
    assert report.mechanisms is not None
    told = [one.difference for row in report.mechanisms.rows for one in row.arms if one.difference]
    assert len(told) == report.mechanisms.comparisons
    rows = [
        [a - b for a, b in zip(one.value.values, row.arms[0].value.values, strict=True)]
        for row in report.mechanisms.rows
        for one in row.arms
        if one.difference and one.value and row.arms[0].value
    ]
    together = paired(np.array(rows))
    for i, one in enumerate(told):
        assert one.low == pytest.approx(together.low[i]) and one.high == pytest.approx(together.high[i])
        assert bool(side_of(one)) == (together.p_adjusted[i] < 0.05)


def test_only_what_an_interval_shows_is_said(report: Report) -> None:
    said = dict(shown(report.mechanisms))
    assert said == {"dropout": "higher: likeness of heads", "weight decay": "nothing is shown to differ"}
    assert side_of(Moved(mean=1, low=None, high=None)) == "" == side_of(None)
    assert side_of(Moved(mean=-1, low=-2, high=-0.5)) == "lower"


def test_the_page_has_every_measure_and_marks_what_is_shown(report: Report) -> None:
    page = render(report)
    (section,) = re.findall(r'<section id="inside">.*?</section>', page, re.DOTALL)
    text = html.unescape(section)
    for one in MEASURES:
        assert one.title in text and one.short in text
    assert text.count("<tr>") == len(MEASURES) + 1
    assert section.count('class="moved clear"') == 1 and section.count('aria-label="higher"') == 1
    assert "> +0.200</span>" in section and DOMAINS[1] in text
    assert 'href="#inside"' in page
    cells = lines(report.mechanisms)[FIELDS.index("own_ensemble_gain")].cells
    assert [cell.value for cell in cells] == ["–", "−4.00", "–"]


def test_records_without_the_measures_give_a_report_without_the_table() -> None:
    report = summarise(example_records())
    assert report.mechanisms is None and lines(None) == () == shown(None)
    page = render(report)
    assert 'id="inside"' not in page and "#inside" not in page
    # A report of an older twodice has no such block at all.
    old = report.model_dump(mode="json")
    del old["mechanisms"]
    assert Report.model_validate(old) == report


def test_an_arm_that_was_not_measured_in_every_trial_is_left_out_of_the_line() -> None:
    records = measured_inside(example_records())
    for record in records:
        if record["kind"] == "trial" and record["arm"] == "dropout" and record["seed"] == 1:
            del record["mechanisms"]
    block = summarise(records).mechanisms
    assert block is not None and block.comparisons == len(FIELDS) - 1
    assert all(row.arms[1].value is None and row.arms[1].difference is None for row in block.rows)


def test_one_seed_gives_means_and_claims_nothing() -> None:
    records = [r for r in measured_inside(example_records()) if r.get("seed") in (None, 0)]
    block = summarise(records).mechanisms
    assert block is not None
    assert {text for _, text in shown(block)} == {"nothing is shown to differ"}
    assert "None" not in str(lines(block))


def test_thousandths_are_written_with_two_decimals() -> None:
    told = {0.00021: "0.21", -0.0034: "−3.40", 1.25: "1250.00", -1e-9: "0.00"}
    assert {value: number(value, "milli") for value in told} == told
