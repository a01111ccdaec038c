"""Normal numbers against 60-digit arithmetic and their definition."""

from __future__ import annotations

import pytest
import torch

from twodice.random import gaussian
from twodice.random.philox import philox4x32

mpmath = pytest.importorskip("mpmath")
WORDS = torch.tensor([0, 1, 2, 12345, 2**29, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])


def spread(low: float, high: float, count: int) -> torch.Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


def test_sine_and_cosine_are_within_two_to_the_minus_51() -> None:
    phi = torch.cat([spread(-0.7853981633, 0.7853981633, 1001), torch.exp2(-spread(1, 40, 200))])
    sine, cosine = gaussian.sine_cosine(phi)
    with mpmath.workdps(60):
        for x, s, c in zip(phi.tolist(), sine.tolist(), cosine.tolist(), strict=True):
            if x:
                assert abs(s / mpmath.sin(mpmath.mpf(x)) - 1) < 2**-51
            assert abs(c / mpmath.cos(mpmath.mpf(x)) - 1) < 2**-51


def test_the_root_is_within_two_to_the_minus_50() -> None:
    x = torch.cat([torch.exp2(spread(-34, 6, 1001)), spread(1e-6, 50, 1001)])
    with mpmath.workdps(60):
        for value, found in zip(x.tolist(), gaussian.root(x).tolist(), strict=True):
            assert abs(found / mpmath.sqrt(mpmath.mpf(value)) - 1) < 2**-50


def test_radius_and_direction_are_their_definition_at_the_ends_and_between() -> None:
    radius = gaussian.radius(WORDS).tolist()
    x, y = (part.tolist() for part in gaussian.direction(WORDS))
    with mpmath.workdps(60):
        for i, word in enumerate(WORDS.tolist()):
            u = (mpmath.mpf(word) + 0.5) / mpmath.mpf(2) ** 32
            assert abs(radius[i] / mpmath.sqrt(-2 * mpmath.log(u)) - 1) < 2**-49
            low = word % 2**30
            angle = word // 2**30 * mpmath.pi / 2 + (low + 0.5 - 2**29) * mpmath.pi / 2**31
            assert abs(x[i] - mpmath.cos(angle)) < 2**-51 and abs(y[i] - mpmath.sin(angle)) < 2**-51
    assert max(radius) < 6.77 and min(radius) > 0


def test_a_grid_is_the_normals_one_by_one() -> None:
    example, position = torch.tensor([[[5]], [[9]]]), torch.tensor([[[0, 2**32 - 1]]])
    head, columns = torch.tensor([[[0], [4095]]]), 11
    grid = gaussian.normal_grid(99, 17, example, position, head, columns)
    one = gaussian.normals(
        99, 17, example[..., None], position[..., None], head[..., None], torch.arange(columns)
    )
    assert grid.shape == (2, 2, 2, columns) and torch.equal(grid, one)
    words = torch.tensor(philox4x32(4095 << 20 | 10 // 4, 2**32 - 1, 9, 17, 99))
    expected = gaussian.radius(words[2]) * gaussian.direction(words[3])[0]
    assert grid[1, 1, 1, 10] == expected
