"""The order of the data is a bijection with random access."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from twodice.errors import ConfigError
from twodice.random.keys import Key
from twodice.random.permutation import SMALL, permute


@pytest.mark.parametrize("n", [1, 2, 3, 10, 257, 4096, SMALL, SMALL + 1, 100_003])
def test_it_is_a_bijection(n: int) -> None:
    sent = permute(Key(3), np.arange(n), n)
    assert np.array_equal(np.sort(sent), np.arange(n))


@pytest.mark.parametrize("n", [5, 1000, 100_003, 2**40 + 7, 2**62])
def test_access_in_any_order_and_kind_agrees(n: int) -> None:
    index = np.unique(np.linspace(0, n - 1, 7).astype(np.int64))
    index[-1] = n - 1
    sent = permute(Key(9), index, n)
    assert [permute(Key(9), int(i), n) for i in index] == list(sent)
    assert permute(Key(9), torch.from_numpy(index), n).tolist() == sent.tolist()
    assert permute(Key(9), index[::-1], n).tolist() == sent[::-1].tolist()
    assert int(sent.min()) >= 0 and int(sent.max()) < n
    assert permute(Key(9), index[:0], n).shape == (0,)


def test_keys_and_sizes_give_unrelated_orders() -> None:
    for n in (1000, 100_003):
        index = np.arange(1000)
        a, b = permute(Key(1), index, n), permute(Key(2), index, n)
        # Equal places of two random orders are Poisson with mean at most 1; 12 has probability below 1e-9.
        assert int((a == b).sum()) <= 12
        assert int((a == index).sum()) <= 12


def test_every_ordering_of_a_few_is_equally_likely() -> None:
    """5 things, 12,000 keys: chi-square on 119 degrees of freedom below 210 (false alarm 4e-7).

    It would catch orders that are only even (chi-square of 12,000), as a small Feistel network draws them.
    """
    counts = Counter(tuple(permute(Key(k), np.arange(5), 5).tolist()) for k in range(12_000))
    expected = 12_000 / math.factorial(5)
    missing = math.factorial(5) - len(counts)
    assert sum((c - expected) ** 2 / expected for c in counts.values()) + missing * expected < 210


def test_neighbours_are_sent_far_apart_beyond_the_table() -> None:
    """All n - 1 distances between the images of neighbours: their mean is n / 3 within 6 standard errors."""
    n = 100_003
    sent = permute(Key(5), np.arange(n), n)
    distance = np.abs(np.diff(sent)).mean() / n
    assert abs(distance - 1 / 3) < 6 * math.sqrt(1 / 18 / n)


@pytest.mark.parametrize(("index", "n"), [(0, 0), (5, 5), (-1, 5), (0, 2**62 + 1)])
def test_outside_is_an_error(index: int, n: int) -> None:
    with pytest.raises(ConfigError):
        permute(Key(0), index, n)
    if 0 < n < 100:
        with pytest.raises(ConfigError):
            permute(Key(0), np.array([0, index]), n)


def test_indices_must_be_integers() -> None:
    with pytest.raises(ConfigError, match="integers"):
        permute(Key(0), np.array([0.5]), 3)
