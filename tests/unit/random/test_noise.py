"""Uniforms, logarithm, exponential and Gumbel noise against 60-digit arithmetic and their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twodice.random import noise
from twodice.random.philox import philox4x32

mpmath = pytest.importorskip("mpmath")


def worst(found: torch.Tensor, at: torch.Tensor, exact: object) -> float:
    """Largest relative error of `found` against ``exact(x)``."""
    with mpmath.workdps(60):
        errors = []
        for value, x in zip(found.tolist(), at.tolist(), strict=True):
            true = exact(mpmath.mpf(x))  # type: ignore[operator]
            errors.append(abs((mpmath.mpf(value) - true) / true))
        return float(max(errors))


def spread(low: float, high: float, count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(low, high, count))


def test_logarithm_is_within_two_units_of_the_last_place() -> None:
    x = torch.cat(
        [spread(1e-300, 50, 1500, 0), torch.exp2(spread(-66, 6, 1500, 1)), spread(0.999, 1.001, 500, 2)]
    )
    assert worst(noise.log(x), x, mpmath.log) < 2**-52


def test_log1p_keeps_its_precision_down_to_two_to_the_minus_65() -> None:
    w = torch.cat([spread(0, 0.5, 1500, 3), torch.exp2(-spread(1, 65, 1500, 4))])
    assert worst(noise._log1p_minus(w), w, lambda v: mpmath.log1p(-v)) < 2**-52


def test_exponential_is_within_two_to_the_minus_45() -> None:
    z = torch.cat([-spread(0, 40, 2000, 5), -spread(0, 700, 500, 6)])
    assert worst(noise.exp(z), z, mpmath.exp) < 2**-45


def test_exponential_at_its_ends() -> None:
    z = torch.tensor([0.0, -0.0, -torch.inf, -1e300, -701.0], dtype=torch.float64)
    assert noise.exp(z).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert noise.weights(z).tolist() == [1 << 42, 1 << 42, 0, 0, 0]


def test_gumbel_resolves_both_ends_to_two_to_the_minus_64() -> None:
    bits = torch.tensor([0, 1, 12345, 2**63 - 1, -(2**63), -2, -1])
    with mpmath.workdps(60):
        for u, g in zip(bits.tolist(), noise.gumbel_from_bits(bits).tolist(), strict=True):
            w = (mpmath.mpf(u % 2**64) + 0.5) / mpmath.mpf(2) ** 64
            true = -mpmath.log(-mpmath.log1p(-w))
            assert abs((g - true) / true) < 2**-50
    ends = noise.gumbel_from_bits(torch.tensor([0, -1]))
    assert float(ends[0]) > 45.0 and float(ends[1]) < -3.8


def test_gumbel_falls_as_the_uniform_rises() -> None:
    u = torch.from_numpy(
        np.sort(np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)).view(np.int64)
    )
    g = noise.gumbel_from_bits(u)
    assert bool((g[1:] <= g[:-1] + 1e-12).all())


def test_the_levels_come_from_the_counters_of_the_contract() -> None:
    ids, position, completion, key = torch.tensor([0, 5, 151_935, 2**32 - 1]), 17, 3, 0xD2083097C573BC3C
    for token, u in zip(
        ids.tolist(), noise.uniform64(ids, position, completion, 0, key).tolist(), strict=True
    ):
        first = philox4x32(token // 8, position, completion, 0, key)
        second = philox4x32(token, position, completion, 1 << 31, key)
        lanes = [half for word in first for half in (word & 0xFFFF, word >> 16)]
        assert u % 2**64 == (lanes[token % 8] << 48) | ((second[1] & 0xFFFF) << 32) | second[0]


def test_mean_and_variance_are_those_of_gumbel() -> None:
    """H0: Gumbel(0, 1). 10^6 draws, 6 standard errors (2e-9); catches a shift of 0.008."""
    g = noise.gumbel(torch.arange(1_000_000), 1, 0, 0, 99)
    deviation = float(np.pi / np.sqrt(6))
    assert abs(float(g.mean()) - np.euler_gamma) < 6 * deviation / 1e3
    assert abs(float(g.var()) - deviation**2) < 6 * 3.0 / 1e3
