"""Do the forms of noise have the distribution that they claim? Each test stands beside a saboteur.

Keys are fixed, so a test that passes once passes always. A normal deviate beyond 6 has probability 2e-9; the
tests take about 100 of them: below 1e-6 in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from twodice.kernels.noise import Noise, kept, noisy
from twodice.random.draws import threshold
from twodice.random.keys import Key

LIMIT = 6.0
B, T, C = 8, 64, 1024  # 2^19 units a tensor
Draw = Callable[[float, int], torch.Tensor]  # (rate, step) -> multipliers (B, T, C)
ONES = torch.ones(B, T, C, dtype=torch.float64)


def gaussian(p: float, step: int) -> torch.Tensor:
    return noisy(ONES, threshold(p), Key(5), step, noise=Noise("gaussian"))


def variance_of_p(p: float, step: int) -> torch.Tensor:
    """Saboteur: s^2 = p in place of p / (1 - p)."""
    return noisy(ONES, threshold(p / (1 + p)), Key(5), step, noise=Noise("gaussian"))


def off_centre(p: float, step: int) -> torch.Tensor:
    return gaussian(p, step) + 0.004


def uniform_in_disguise(p: float, step: int) -> torch.Tensor:
    """Saboteur: the right mean and variance, but uniform."""
    n = (gaussian(p, step) - 1) / math.sqrt(p / (1 - p))
    return 1 + math.sqrt(p / (1 - p)) * math.sqrt(3) * torch.erf(n / math.sqrt(2))


def pairs_in_step(p: float, step: int) -> torch.Tensor:
    """Saboteur: both normals of a pair from one radius and one direction."""
    return gaussian(p, step)[..., ::2].repeat_interleave(2, dim=-1)


def same_radius(p: float, step: int) -> torch.Tensor:
    """Saboteur: neighbours are uncorrelated, but large together."""
    g = gaussian(p, step) - 1
    return 1 + g * (g.roll(1, -1).abs() / (math.sqrt(p / (1 - p) * 2 / math.pi)))


def moments_deviates(draw: Draw) -> list[float]:
    """Mean 1, variance p / (1 - p), no skewness, the fourth moment of a normal; 2^20 numbers a rate.

    Smallest defects caught at 6 standard errors: a mean off by 0.006 s, a variance by 0.8 %.
    """
    found = []
    for p in (0.1, 0.5):
        rate = threshold(p) / 65536
        n = torch.cat([(draw(p, step) - 1).flatten() for step in (1, 2)]) / math.sqrt(rate / (1 - rate))
        root = math.sqrt(n.numel())
        found += [
            float(n.mean()) * root,
            float((n**2).mean() - 1) * root / math.sqrt(2),
            float((n**3).mean()) * root / math.sqrt(15),
            float((n**4).mean() - 3) * root / math.sqrt(96),
        ]
    return found


def independence_deviates(draw: Draw) -> list[float]:
    """Numbers and their squares, against neighbours in columns, positions, examples and steps."""
    found = []
    first, later = draw(0.5, 5) - 1, draw(0.5, 6) - 1
    for power in (1, 2):
        a, b = first**power, later**power
        a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
        pairs = [(a[..., lag:], a[..., :-lag]) for lag in (1, 2, 3, 4, 8)]
        pairs += [(a[:, 1:], a[:, :-1]), (a[1:], a[:-1]), (a, b)]
        found += [float((x * y).mean()) * math.sqrt(x.numel()) for x, y in pairs]
    return found


@pytest.mark.parametrize("deviates", [moments_deviates, independence_deviates])
def test_gaussian_noise_is_not_rejected(deviates: Callable[[Draw], list[float]]) -> None:
    assert max(map(abs, deviates(gaussian))) < LIMIT


@pytest.mark.parametrize("saboteur", [variance_of_p, off_centre, uniform_in_disguise])
def test_wrong_moments_are_rejected(saboteur: Draw) -> None:
    assert max(map(abs, moments_deviates(saboteur))) > LIMIT


@pytest.mark.parametrize("saboteur", [pairs_in_step, same_radius])
def test_normals_that_depend_on_each_other_are_rejected(saboteur: Draw) -> None:
    assert max(map(abs, independence_deviates(saboteur))) > LIMIT


def test_normals_fill_their_cells() -> None:
    """Chi-square of 2^19 normals over 256 cells of equal probability: within 6 standard deviations."""

    def deviate(m: torch.Tensor) -> float:
        cells = (torch.erf((m - 1) / math.sqrt(2)) * 128 + 128).long().clamp(0, 255)
        expected = m.numel() / 256
        chi = float(((torch.bincount(cells.flatten(), minlength=256) - expected) ** 2 / expected).sum())
        return (chi - 255) / math.sqrt(2 * 255)

    assert abs(deviate(gaussian(0.5, 3))) < LIMIT
    assert abs(deviate(gaussian(0.5, 3).round(decimals=2))) > LIMIT


def block_of_lanes(p: float, step: int) -> torch.Tensor:
    """Saboteur: blocks of 4 whose neighbours share a lane, as where the column is divided twice."""
    return kept(threshold(p), Key(5), step, (B, T, C), noise=Noise(block=8)).double()


def blocks(p: float, step: int) -> torch.Tensor:
    return kept(threshold(p), Key(5), step, (B, T, C), noise=Noise(block=4)).double()


def block_deviates(draw: Draw) -> list[float]:
    """Rate and independence of the decisions of blocks of 4: 2^17 of them."""
    rate = threshold(0.3) / 65536
    mask = draw(0.3, 9)[..., ::4] - (1 - rate)
    scale = rate * (1 - rate)
    found = [float(mask.mean()) * math.sqrt(mask.numel() / scale)]
    for lag in (1, 2, 8):
        product = mask[..., lag:] * mask[..., :-lag]
        found.append(float(product.mean()) * math.sqrt(product.numel()) / scale)
    product = mask[:, 1:] * mask[:, :-1]
    return [*found, float(product.mean()) * math.sqrt(product.numel()) / scale]


def test_blocks_are_decided_apart_from_each_other() -> None:
    assert max(map(abs, block_deviates(blocks))) < LIMIT
    assert max(map(abs, block_deviates(block_of_lanes))) > LIMIT
    assert torch.equal(blocks(0.3, 9)[..., ::4], blocks(0.3, 9)[..., 3::4])


def test_draws_of_the_rows_are_independent() -> None:
    """256 draws of one example: 2^18 units; the rows of a saboteur take the step of the first."""

    def deviates(steps: torch.Tensor) -> float:
        m = kept(32768, Key(5), steps, (256, 1, C), examples=torch.zeros(256, dtype=torch.int64)).double()
        product = (m[1:] - 0.5) * (m[:-1] - 0.5)
        return float(product.mean()) * 4 * math.sqrt(product.numel())

    assert abs(deviates(torch.arange(256))) < LIMIT < abs(deviates(torch.arange(256) // 2))
