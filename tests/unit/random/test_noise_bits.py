"""The native uniforms, Gumbel noise and masses have the bits of random/noise.py, number by number.

Whole choices are compared elsewhere; there a bit too few in the noise of a token would show only where two
scores are that close, so here the noise itself is compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from twodice.kernels import dispatch
from twodice.random import noise

native = dispatch.native
pytestmark = pytest.mark.skipif(native is None, reason="no native module")
LEVELS = native.simd_levels() if native is not None else []
DRAWS = 100_000
WORD = 2**32 - 1


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    level = native.simd()
    yield
    native.set_simd(level)


def address(array: npt.NDArray[np.generic]) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


def places() -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 4) id, position, completion, purpose, and (N,) keys: every corner of the fields, then any."""
    word, purpose, key = (0, 1, 7, 8, WORD - 1, WORD), (0, 1, 2**31 - 1), (0, 1, -1, -(2**63))
    corners = list(itertools.product(word, word, word, purpose, key))
    generator = np.random.default_rng(0)
    rest = DRAWS - len(corners)
    fields = [generator.integers(0, bound, rest) for bound in (2**32, 2**32, 2**32, 2**31)]
    keys = generator.integers(-(2**63), 2**63, rest)
    drawn = np.concatenate([np.array(corners, np.int64), np.stack([*fields, keys], axis=1)])
    return torch.from_numpy(drawn[:, :4].copy()), torch.from_numpy(drawn[:, 4].copy())


def same_bits(found: npt.NDArray[np.generic], wanted: torch.Tensor) -> bool:
    return bool((found.view(np.int64) == wanted.contiguous().numpy().view(np.int64)).all())


def reference(where: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniforms and noise by the readable twin, which takes the purpose as one number."""
    uniforms = torch.empty(len(where), dtype=torch.int64)
    for purpose in (0, 1, 2**31 - 1):
        chosen = where[:, 3] == purpose
        ids, position, completion, _ = where[chosen].unbind(1)
        uniforms[chosen] = noise.uniform64(ids, position, completion, purpose, keys[chosen])
    return uniforms, noise.gumbel_from_bits(uniforms)


def native_draws(
    where: torch.Tensor, keys: torch.Tensor
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64]]:
    uniforms, found = np.empty(len(where), np.uint64), np.empty(len(where), np.float64)
    native.gumbel_draws(where.data_ptr(), len(where), keys.data_ptr(), address(uniforms), address(found))
    return uniforms, found


def test_uniforms_and_noise_of_a_hundred_thousand_places() -> None:
    where, keys = places()
    where[:, 3] = torch.where(where[:, 3].lt(2**31 - 1) & where[:, 3].gt(1), where[:, 3] % 2, where[:, 3])
    uniforms, wanted = reference(where, keys)
    found = native_draws(where, keys)
    assert len(uniforms) == DRAWS
    assert same_bits(found[0], uniforms) and same_bits(found[1], wanted)


def test_a_wrong_field_anywhere_in_the_counter_would_be_seen() -> None:
    where, keys = places()
    where, keys = where[-1000:].clone(), keys[-1000:].clone()
    where[:, 3] %= 2
    uniforms, _ = reference(where, keys)
    for field in range(4):
        other = where.clone()
        other[:, field] ^= 1
        assert (native_draws(other, keys)[0].view(np.int64) != uniforms.numpy()).all(), field
    assert (native_draws(where, keys ^ 1)[0].view(np.int64) != uniforms.numpy()).all()


def test_the_transform_at_every_border_of_its_branches() -> None:
    near = torch.arange(-500, 500)
    halved = int(0.2928932188134524 * 2**64)  # where log1p changes its reduction
    borders = [0, halved, 1 << 63, (1 << 63) + (1 << 62), *(1 << n for n in range(10, 64))]
    signed = [border - (1 << 64) if border >= 1 << 63 else border for border in borders]
    any_bits = torch.from_numpy(np.random.default_rng(1).integers(-(2**63), 2**63, DRAWS // 2))
    u = torch.cat([torch.cat([near + border for border in signed]), any_bits])
    assert len(u) > DRAWS
    found = np.empty(len(u), np.float64)
    native.gumbel_of_bits(u.data_ptr(), len(u), address(found))
    assert same_bits(found, noise.gumbel_from_bits(u))


@pytest.mark.parametrize("level", LEVELS)
def test_leading_bits_of_neighbours_at_every_level(level: str) -> None:
    native.set_simd(level)
    compared = 0
    for first in (0, 8, 2**20, 2**32 - 16_384):
        for position, completion, purpose, key in (
            (0, 0, 0, 0),
            (WORD, 3, 1, 2**64 - 1),
            (5, WORD, 2**31 - 1, 2**63),
        ):
            for count in (1, 7, 63, 65, 129, 16_384):
                found = np.empty(count, np.int64)
                native.leading16_run(first, count, position, completion, purpose, key, address(found))
                ids = torch.arange(first, first + count)
                assert same_bits(found, noise.leading16(ids, position, completion, purpose, key))
                compared += count
    assert compared > DRAWS


@pytest.mark.parametrize("level", LEVELS)
def test_masses_at_every_level(level: str) -> None:
    native.set_simd(level)
    generator = np.random.default_rng(2)
    ends = [0.0, -0.0, -torch.inf, -1e300, -700.0, -700.0000001, -5e-324, -29.1, -29.8]
    z = np.concatenate([ends, -generator.uniform(0, 40, DRAWS), -np.exp2(generator.uniform(-60, 10, DRAWS))])
    for start in range(4):  # what is left over after the last whole vector takes the scalar loop
        part = z[start:].copy()
        found = np.empty(len(part), np.int64)
        native.weights_of(address(part), len(part), address(found))
        assert same_bits(found, noise.weights(torch.from_numpy(part)))
