"""The learning rate: known values at the corners."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from twodice.training.schedule import learning_rate


def rates(schedule: str, steps: int = 100, warmup: int = 10) -> list[float]:
    settings: dict[str, Any] = {"peak": 1.0, "floor": 0.1, "warmup": warmup, "schedule": schedule}
    return [learning_rate(step, steps=steps, **settings) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "trapezoid", "constant"])
def test_the_warm_up_is_linear_moves_at_once_and_reaches_the_peak(schedule: str) -> None:
    found = rates(schedule)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert found[10] == pytest.approx(1.0)


def test_cosine_falls_to_the_floor_by_half_at_the_middle() -> None:
    found = rates("cosine", steps=111)
    assert found[60] == pytest.approx(0.55)
    assert found[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(found[10:]))


def test_the_trapezoid_is_flat_and_falls_over_the_last_fifth() -> None:
    found = rates("trapezoid")
    assert set(found[10:80]) == {1.0} and found[80] < 1.0
    assert found[-1] == pytest.approx(0.1)
    assert found[80:] == pytest.approx([1.0 - 0.9 * (i + 1) / 20 for i in range(20)])


def test_constant_stays() -> None:
    assert set(rates("constant")[10:]) == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "trapezoid", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 11])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_short_runs_have_rates_within_the_bounds(schedule: str, steps: int, warmup: int) -> None:
    assert all(0 < rate <= 1.0 for rate in rates(schedule, steps, warmup))
