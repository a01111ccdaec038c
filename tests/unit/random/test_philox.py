"""Philox gives the published words in every implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twodice.kernels import dispatch
from twodice.random.philox import philox4x32

# Random123, kat_vectors, philox 4x32 with 10 rounds.
VECTORS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_known_answers(counter: tuple[int, ...], key: int, words: tuple[int, ...]) -> None:
    assert philox4x32(*counter, key) == words
    in_numpy = philox4x32(*(np.array([c], dtype=np.uint64) for c in counter), key)
    assert tuple(int(w[0]) for w in in_numpy) == words
    in_torch = philox4x32(*(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in in_torch) == words
    if dispatch.native is not None:
        assert dispatch.native.philox4x32(*counter, key) == words


def test_words_broadcast() -> None:
    c0, c1 = torch.arange(5)[:, None], torch.arange(3)[None]
    words = philox4x32(c0, c1, torch.tensor(9), torch.tensor(2**32 - 1), 2**63 + 5)
    assert words[0].shape == (5, 3)
    assert tuple(int(w[4, 2]) for w in words) == philox4x32(4, 2, 9, 2**32 - 1, 2**63 + 5)
