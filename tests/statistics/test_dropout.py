"""Dropout's decisions are as often, and as independent of each other, as they claim.

Every test takes masks from a function, so that a saboteur, a broken implementation, can stand in for it and
must be rejected. Keys are fixed, so a test that passes once passes always; the false-alarm probability below
is that of the choice of keys. A normal deviate beyond 6 has probability 2e-9; the tests take about 100 of
them: below 1e-6 in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from twodice.kernels.dropout import dropout
from twodice.random.draws import lane_grid, threshold
from twodice.random.keys import Key

LIMIT = 6.0
B, T, C = 16, 64, 1024  # 2^20 decisions a mask
Mask = Callable[[float, int, Key], torch.Tensor]  # (rate, step, key) -> (B, T, C), True where dropped


def ours(p: float, step: int, key: Key) -> torch.Tensor:
    return dropout(torch.ones(B, T, C), threshold(p), key, step) == 0


def grid(step: int, key: Key) -> torch.Tensor:
    example, position = torch.arange(B)[:, None], torch.arange(T)[None]
    return lane_grid(key, step, example, position, torch.zeros(1, 1, dtype=torch.int64), C)


def lanes_reused(p: float, step: int, key: Key) -> torch.Tensor:
    """Saboteur: every second lane is a copy of the one before."""
    return (grid(step, key)[..., ::2] < threshold(p)).repeat_interleave(2, dim=-1)


def one_too_many(p: float, step: int, key: Key) -> torch.Tensor:
    """Saboteur: lane <= t, which drops 2^-16 more."""
    return grid(step, key) <= threshold(p)


def eight_bits(p: float, step: int, key: Key) -> torch.Tensor:
    """Saboteur: thresholds of 8 bits."""
    return grid(step, key) >> 8 < round(p * 256)


def same_for_all_examples(p: float, step: int, key: Key) -> torch.Tensor:
    return ours(p, step, key)[:1].expand(B, T, C)


def same_for_all_positions(p: float, step: int, key: Key) -> torch.Tensor:
    return ours(p, step, key)[:, :1].expand(B, T, C)


def same_at_every_step(p: float, step: int, key: Key) -> torch.Tensor:
    return ours(p, 0, key)


def same_at_every_site(p: float, step: int, key: Key) -> torch.Tensor:
    return ours(p, step, Key(0))


def rate_deviates(mask: Mask) -> list[float]:
    """Is the share of what is dropped t / 65536?

    8 masks of 2^20 a rate. Smallest defect caught at 6 standard errors: 1.1e-3 at p = 0.5; at p = 2^-15
    (t = 2; expected 256 of 8.4 million) a threshold off by one, which moves the count by 8 standard errors.
    """
    found = []
    for p in (2**-15, 0.1, 0.5):
        rate = threshold(p) / 65536
        draws = 8 * B * T * C
        dropped = sum(int(mask(p, step, Key(11)).sum()) for step in range(8))
        found.append((dropped - draws * rate) / math.sqrt(draws * rate * (1 - rate)))
    return found


def correlation(a: torch.Tensor, b: torch.Tensor, p: float) -> float:
    """Standardised covariance of two masks of one rate: a normal deviate where they are independent."""
    rate = threshold(p) / 65536
    product = (a.float() - rate) * (b.float() - rate)
    return float(product.sum(dtype=torch.float64)) / (rate * (1 - rate) * math.sqrt(product.numel()))


def independence_deviates(mask: Mask) -> list[float]:
    """Are neighbours along every coordinate independent?

    Pairs at several distances; about 10^6 pairs each, so a correlation of 0.006 is caught.
    """
    found = []
    for p in (0.1, 0.5):
        m, later, other = mask(p, 5, Key(1)), mask(p, 6, Key(1)), mask(p, 5, Key(1).child("other"))
        for lag in (1, 2, 7, 8, 16, 64):
            found.append(correlation(m[..., lag:], m[..., :-lag], p))
        for lag in (1, 2, 8):
            found.append(correlation(m[:, lag:], m[:, :-lag], p))
            found.append(correlation(m[lag:], m[:-lag], p))
        found += [correlation(m, later, p), correlation(m, other, p)]
        # Coordinates do not merely swap: example i, position j against example j, position i.
        found.append(correlation(m[:16, :16], m[:16, :16].transpose(0, 1).roll(1, -1), p))
    return found


@pytest.mark.parametrize("deviates", [rate_deviates, independence_deviates])
def test_ours_is_not_rejected(deviates: Callable[[Mask], list[float]]) -> None:
    assert max(map(abs, deviates(ours))) < LIMIT


@pytest.mark.parametrize("saboteur", [one_too_many, eight_bits])
def test_a_wrong_rate_is_rejected(saboteur: Mask) -> None:
    assert max(map(abs, rate_deviates(saboteur))) > LIMIT


@pytest.mark.parametrize(
    "saboteur",
    [lanes_reused, same_for_all_examples, same_for_all_positions, same_at_every_step, same_at_every_site],
)
def test_masks_that_depend_on_each_other_are_rejected(saboteur: Mask) -> None:
    assert max(map(abs, independence_deviates(saboteur))) > LIMIT


def test_the_mean_stays() -> None:
    """E[y] = x. Hypothesis: the mean of 2^23 outputs of 1 is 1; caught: a scale wrong by 7e-4 at p = 0.1."""
    for p in (0.1, 1 / 3, 0.9):
        rate = threshold(p) / 65536
        draws = 8 * B * T * C
        total = sum(
            float(dropout(torch.ones(B, T, C), threshold(p), Key(2), step).sum(dtype=torch.float64))
            for step in range(8)
        )
        assert abs(total / draws - 1) < LIMIT * math.sqrt(rate / (1 - rate) / draws)


def test_lanes_are_uniform_on_all_16_bits() -> None:
    """Chi-square of 2^20 lanes over 65,536 values: within 6 standard deviations (2e-9)."""
    counts = torch.bincount(grid(3, Key(4)).flatten(), minlength=65536).double()
    chi = float(((counts - 16) ** 2 / 16).sum())
    assert abs(chi - 65535) < LIMIT * math.sqrt(2 * 65535)
    reused = torch.bincount(
        grid(3, Key(4))[..., ::2].repeat_interleave(2, -1).flatten(), minlength=65536
    ).double()
    assert abs(float(((reused - 16) ** 2 / 16).sum()) - 65535) > LIMIT * math.sqrt(2 * 65535)
