"""Attention as a function for one's own models."""

from __future__ import annotations

import doctest

import pytest
import torch

import twodice
from twodice.dropout import attend
from twodice.errors import ConfigError, ShapeError
from twodice.kernels.attention import attention as kernel
from twodice.random.keys import Key


def test_it_is_public_and_its_example_runs() -> None:
    assert twodice.attention is attend.attention
    assert doctest.testmod(attend).failed == 0


def test_rates_become_thresholds_and_dropkey_has_a_stream_of_its_own() -> None:
    x = torch.linspace(-1, 1, 2 * 2 * 5 * 4).reshape(2, 2, 5, 4)
    plain = kernel(x, x, x, 16384, 7, 3, drop_keys=32768, keys_key=Key(7).child("keys"), causal=True)
    for p in (0.25, torch.tensor(0.25)):
        assert torch.equal(twodice.attention(x, x, x, p, key=7, step=3, drop_keys=0.5, causal=True), plain)
    assert not torch.equal(twodice.attention(x, x, x, 0.25, key=7, step=3, causal=True), plain)


def test_lists_serve_as_coordinates() -> None:
    x = torch.linspace(-1, 1, 2 * 2 * 5 * 4).reshape(2, 2, 5, 4)
    given = torch.tensor([4, 2**31])
    listed = twodice.attention(x, x, x, 0.5, key=7, step=3, examples=given.tolist())
    assert torch.equal(listed, twodice.attention(x, x, x, 0.5, key=7, step=3, examples=given))


def test_what_does_not_fit_is_named() -> None:
    x = torch.ones(2, 2, 5, 4)
    with pytest.raises(ConfigError, match="must be a number in"):
        twodice.attention(x, x, x, 1.5, key=7, step=3)
    with pytest.raises(ConfigError, match="must be a number in"):
        twodice.attention(x, x, x, 0.5, key=7, step=3, drop_keys=-0.1)
    with pytest.raises(ShapeError, match="examples must be"):
        twodice.attention(x, x, x, 0.5, key=7, step=3, examples=[1, 2, 3])
