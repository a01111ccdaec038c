"""Schedules: rates as a pure function of the step."""

from __future__ import annotations

import pytest

from twodice.dropout.schedules import Constant, Early, Late, Linear, parse_schedule, threshold
from twodice.errors import ConfigError


def rates(text: str, total: int | None = 10, steps: int = 10) -> list[float]:
    schedule = parse_schedule(text)
    return [round(schedule.rate(step, total), 6) for step in range(steps)]


def test_early_stops_at_a_fraction_of_the_run() -> None:
    assert rates("early(0.1, 0.3)") == [0.1] * 3 + [0.0] * 7


def test_late_starts_at_a_fraction_of_the_run() -> None:
    assert rates("late(0.1, 0.5)") == [0.0] * 5 + [0.1] * 5


def test_whole_numbers_are_steps_and_need_no_length() -> None:
    assert rates("early(0.1, 2)", total=None) == [0.1] * 2 + [0.0] * 8
    assert rates("late(0.1, 1)", total=None) == [0.0] + [0.1] * 9
    assert rates("linear(0.2, 0.0, 4)", total=None)[:6] == [0.2, 0.15, 0.1, 0.05, 0.0, 0.0]


def test_one_with_a_point_is_the_whole_run() -> None:
    assert rates("early(0.1, 1.0)") == [0.1] * 10
    assert rates("early(0.1, 1)") == [0.1] + [0.0] * 9


def test_linear_reaches_its_last_rate_at_the_last_step() -> None:
    found = rates("linear(0.0, 0.9)")
    assert found == pytest.approx([0.1 * step for step in range(10)])
    assert parse_schedule("linear(0.0, 0.9)").rate(50, 10) == 0.9
    assert parse_schedule("linear(0.3, 0.9)").rate(0, 1) == 0.3


@pytest.mark.parametrize(
    "text", ["linear(0.2, 0.0)", "early(0.1, 0.5)", "late(0.1, 0.5)", "linear(0.1, 0.2, 0.5)"]
)
def test_a_fraction_without_the_length_of_the_run_is_an_error(text: str) -> None:
    schedule = parse_schedule(text)
    assert schedule.needs_total
    with pytest.raises(ConfigError, match="total_steps"):
        schedule.rate(0, None)


@pytest.mark.parametrize(
    "schedule", [Constant(0.1), Linear(0.2, 0.0), Linear(0.2, 0.1, 7), Early(0.1, 0.3), Late(0.1, 5)]
)
def test_text_of_a_schedule_parses_to_it(schedule: Constant | Linear | Early | Late) -> None:
    assert parse_schedule(str(schedule)) == schedule


def test_peak_is_the_highest_rate() -> None:
    assert [s.peak for s in (Constant(0.1), Linear(0.2, 0.3), Early(0.4, 1), Late(0.5, 1))] == [
        0.1,
        0.3,
        0.4,
        0.5,
    ]


def test_threshold_counts_in_65536ths() -> None:
    assert [threshold(p) for p in (0.0, 0.1, 0.5, 1.0)] == [0, 6554, 32768, 65536]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("early(0.1)", "takes 2"),
        ("linear(0.1, 0.2, 0.3, 0.4)", "2 or 3"),
        ("erly(0.1, 2)", "did you mean 'early'"),
        ("cosine(0.1, 0.2)", "not built yet"),
        ("early", "brackets"),
        ("early(0.1, -3)", "0 steps or more"),
        ("early(0.1, 1.5)", "fraction"),
        ("early(nan, 3)", r"in \[0, 1\]"),
        ("linear(0.1, 2)", r"in \[0, 1\]"),
        (float("nan"), r"in \[0, 1\]"),
        (True, "a number"),
        ([0.1], "a number"),
        ("late(0.1, x)", "number is expected"),
    ],
)
def test_what_cannot_be_meant_is_refused(value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_schedule(value)
