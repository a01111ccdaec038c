"""The native sampling chain at every instruction level, and the readable one, held to be equal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from twodice.kernels import dispatch
from twodice.kernels.sampling_settings import NEEDS, Sampled
from twodice.sampling.sample import sample

NATIVE = dispatch.native
FLOATS = tuple(name for name in NEEDS if name not in ("rank", "kept"))

needs_native = pytest.mark.skipif(NATIVE is None, reason="no native module to compare with")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    level = NATIVE.simd()
    yield
    dispatch.native = NATIVE
    NATIVE.set_simd(level)


def both(logits: torch.Tensor, params: object, position: object, **more: object) -> tuple[Sampled, Sampled]:
    """The same call on the native kernels at every level (equal among themselves) and on the reference."""
    call = lambda: sample(logits, params, position, need=NEEDS, on_bad_row="flag", **more)  # type: ignore[arg-type]  # noqa: E731
    native = []
    for level in NATIVE.simd_levels():
        NATIVE.set_simd(level)
        dispatch.native = NATIVE
        native.append(call())
    dispatch.native = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = call()
    dispatch.native = NATIVE
    for other in native[1:]:
        assert_equal(native[0], other)
    return native[0], reference


def assert_equal(a: Sampled, b: Sampled) -> None:
    assert torch.equal(a.status, b.status)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.rank, b.rank)
    assert torch.equal(a.kept[0], b.kept[0]) and torch.equal(a.kept[1], b.kept[1])
    assert a.seeds == b.seeds
    assert (a.state is None) == (b.state is None)
    assert a.state is None or torch.equal(a.state.nan_to_num(-1e9), b.state.nan_to_num(-1e9))
    for name in FLOATS:  # sums of up to V terms in another order; everything that decides is an integer
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-11, atol=1e-11, equal_nan=True)
