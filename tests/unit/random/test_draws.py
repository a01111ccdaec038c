"""Rates become thresholds, coordinates become lanes."""

from __future__ import annotations

import math

import pytest
import torch

from twodice.errors import ConfigError
from twodice.random.draws import (
    check_bounds,
    lane_grid,
    lanes,
    round_rate,
    threshold,
    threshold_of_tensor,
)
from twodice.random.philox import philox4x32

ZERO = torch.zeros((), dtype=torch.int64)


def test_a_lane_is_the_written_bits_of_the_written_counter() -> None:
    for head, column in [(0, 0), (3, 8), (4095, 2**23 - 1), (7, 12345)]:
        words = philox4x32(head << 20 | column // 8, 5, 6, 7, 99)
        bits = sum(word << (32 * i) for i, word in enumerate(words))
        lane = lanes(99, 7, ZERO + 6, ZERO + 5, ZERO + head, ZERO + column)
        assert int(lane) == bits >> (16 * (column % 8)) & 0xFFFF


def test_the_grid_of_lanes_is_the_lanes() -> None:
    example, position, head = (
        torch.arange(3)[:, None, None],
        torch.arange(4)[None, None],
        torch.arange(2)[None, :, None],
    )
    grid = lane_grid(5, 17, example, position, head, 13)
    one = lanes(5, 17, example[..., None], position[..., None], head[..., None], torch.arange(13))
    assert torch.equal(grid, one)


@pytest.mark.parametrize("p", [0.0, 2**-17, 0.1, 1 / 3, 0.5, 0.9, 1 - 2**-17, 1.0])
def test_a_rate_is_rounded_to_the_nearest_and_mirrors(p: float) -> None:
    t = threshold(p)
    assert abs(t - p * 65536) <= 0.5
    assert round_rate(1 - p) == 65536 - t or (1 - (1 - p)) != p
    assert int(threshold_of_tensor(torch.tensor(p, dtype=torch.float64))) == t


def test_the_smallest_constants_neither_vanish_nor_become_all() -> None:
    assert threshold(2**-17) == 1
    assert threshold(1 - 2**-17) == 65535


@pytest.mark.parametrize("p", [math.nan, -0.1, 1.2, math.inf, 2**-18, 1 - 2**-18, 1e-300, "0.1", True, None])
def test_a_rate_that_cannot_be_meant_is_an_error(p: object) -> None:
    with pytest.raises(ConfigError, match=r"rate|must be"):
        threshold(p, name="rate")  # type: ignore[arg-type]


def test_a_rate_on_a_schedule_rounds() -> None:
    assert threshold(2**-18, constant=False) == 0
    assert threshold(1 - 2**-18, constant=False) == 65536


@pytest.mark.parametrize(("name", "bound"), [("head", 12), ("column", 23), ("position", 32), ("example", 32)])
def test_the_bound_of_every_field_is_checked(name: str, bound: int) -> None:
    check_bounds(name, torch.tensor([0, 2**bound - 1]))
    for outside in (-1, 2**bound):
        with pytest.raises(ConfigError, match=f"{name} must be in"):
            check_bounds(name, torch.tensor([0, outside]))
