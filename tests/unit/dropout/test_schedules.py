"""Schedules: rates as a pure function of the step."""

from __future__ import annotations

from itertools import pairwise

import pytest

from twodice.dropout.schedules import Constant, Early, Late, Linear, parse_schedule
from twodice.errors import ConfigError
from twodice.random.thresholds import round_rate


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


@pytest.mark.parametrize(
    "text",
    [
        "cosine(0.2, 0.0)",
        "exponential(0.3, 0.01, 0.5)",
        "triangle(0.0, 0.2, 3)",
        "plateau(0.1, 1.5, 2, 0.5)",
        "depth(0.0, linear(0.2, 0.0))",
        "layers(0.0, 0.1, early(0.2, 0.5))",
    ],
)
def test_text_of_the_longer_schedules_parses_to_them(text: str) -> None:
    assert str(parse_schedule(text)) == text


def test_cosine_is_flat_at_its_ends_and_half_way_in_the_middle() -> None:
    found = rates("cosine(0.2, 0.0)", total=5, steps=6)
    assert found == [0.2, round(0.1 + 0.1 * 0.5**0.5, 6), 0.1, round(0.1 - 0.1 * 0.5**0.5, 6), 0.0, 0.0]


def test_exponential_falls_by_one_factor_from_step_to_step() -> None:
    schedule = parse_schedule("exponential(0.4, 0.1)")
    found = [schedule.rate(step, 9) for step in range(9)]
    assert [b / a for a, b in pairwise(found)] == pytest.approx([0.25**0.125] * 8)
    assert (found[0], found[-1]) == (0.4, 0.1)


def test_triangle_is_low_at_each_start_and_high_in_each_middle() -> None:
    assert rates("triangle(0.1, 0.3, 2)", total=8, steps=9) == [0.1, 0.2, 0.3, 0.2, 0.1, 0.2, 0.3, 0.2, 0.1]


def test_plateau_moves_after_patience_without_a_better_loss_and_stops_at_its_limit() -> None:
    schedule = parse_schedule("plateau(0.1, 2.0, 2, 0.3)")
    losses = [
        (0, 3.0),
        (10, 2.0),
        (20, 2.5),
        (30, 2.0),
        (40, 1.9),
        (50, 1.9),
        (60, 2.0),
        (70, 2.0),
        (80, 2.0),
    ]
    found = [schedule.rate(step, None, losses) for step in range(0, 100, 10)]
    assert found == [0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3, 0.3, 0.3, 0.3]
    assert schedule.rate(29, None, losses) == 0.1  # a loss counts from its own step on
    assert schedule.rate(95, None, losses[:3]) == 0.1


def test_depth_grows_in_a_straight_line_over_the_layers_and_moves_in_time() -> None:
    assert [parse_schedule("depth(0.0, 0.2)").at(i, 5).rate(0) for i in range(5)] == pytest.approx(
        [0.0, 0.05, 0.1, 0.15, 0.2]
    )
    falling = parse_schedule("depth(0.0, linear(0.2, 0.0))").at(1, 3)
    assert [falling.rate(step, 3) for step in range(3)] == pytest.approx([0.1, 0.05, 0.0])
    assert parse_schedule("depth(0.0, 0.2)").at(0, 1).rate(0) == 0.2


def test_a_list_must_have_one_rate_for_each_layer() -> None:
    schedule = parse_schedule("layers(0.0, 0.1, early(0.2, 2))")
    assert [schedule.at(i, 3).rate(1) for i in range(3)] == [0.0, 0.1, 0.2]
    with pytest.raises(ConfigError, match="each of the 4 layers; got 3"):
        schedule.at(0, 4)


def test_peak_is_the_highest_rate() -> None:
    assert parse_schedule("plateau(0.1, 2.0)").peak == 0.9
    assert parse_schedule("depth(0.1, early(0.3, 1))").at(1, 3).peak == pytest.approx(0.2)
    assert [s.peak for s in (Constant(0.1), Linear(0.2, 0.3), Early(0.4, 1), Late(0.5, 1))] == [
        0.1,
        0.3,
        0.4,
        0.5,
    ]


def test_threshold_counts_in_65536ths() -> None:
    assert [round_rate(p) for p in (0.0, 0.1, 0.5, 1.0)] == [0, 6554, 32768, 65536]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("early(0.1)", "takes 2"),
        ("linear(0.1, 0.2, 0.3, 0.4)", "2 or 3"),
        ("erly(0.1, 2)", "did you mean 'early'"),
        ("exponential(0.1, 0.0)", "above 0"),
        ("triangle(0.0, 0.1, 0)", "1 or more"),
        ("triangle(0.0, 0.1, 1.5)", "whole number"),
        ("plateau(0.0, 2.0)", "above 0"),
        ("plateau(0.1, 0.0)", "above 0"),
        ("plateau(0.1, 0.5, 0)", "1 or more"),
        ("plateau(0.1, 0.5, 1, 0.4)", "where the factor leads"),
        ("plateau(0.1, 2.0, 1, 0.05)", "where the factor leads"),
        ("layers()", "takes 1 to 1024"),
        ("depth(0.1)", "takes 2"),
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
