"""The native kernels work on torch's threads, and multiply by torch's product or by that of scipy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import twodice
from twodice.kernels import dispatch, lent
from twodice.kernels.attention import attention

needs_team = pytest.mark.skipif(
    lent._address("GOMP_parallel") is None, reason="no runtime of OpenMP to be found"
)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    lent.product.cache_clear()


needs_native = pytest.mark.skipif(dispatch.native is None, reason="no native module")

COUNT = """
import os, sys, torch
from twodice.kernels import dispatch
if sys.argv[2] == "dropout":
    from twodice.kernels.dropout import dropout  # lends
elif sys.argv[2] == "attention":
    from twodice.kernels.attention import attention  # lends
else:
    from twodice.kernels.sampling import native  # lends
    from twodice.kernels.sampling_settings import Draw
    from twodice.sampling.chain import pack
    from twodice.sampling.params import SamplingParams
torch.set_num_threads(2)
x = torch.ones(4, 1024, 256)
torch.mul(x, 2.0)
if sys.argv[1] == "own":
    dispatch.native.lend_threads(0)
before = len(os.listdir("/proc/self/task"))
if sys.argv[2] == "dropout":
    dropout(x, 6554, 1, 2)
elif sys.argv[2] == "sampling":
    packed = pack(SamplingParams(seed=1))
    native(x[0], packed.settings, Draw(packed.keys, 1, 0))
else:
    attention(x[None, :1], x[None, :1], x[None, :1], 6554, 1, 2)  # one head, whose rows are shared
print(len(os.listdir("/proc/self/task")) - before)
"""


@needs_team
@needs_native
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no list of threads here")
@pytest.mark.parametrize("operation", ["dropout", "attention", "sampling"])
@pytest.mark.parametrize(("which", "more"), [("lent", 0), ("own", 1)])
def test_native_kernels_start_no_threads_beside_those_of_torch(which: str, more: int, operation: str) -> None:
    command = [sys.executable, "-c", COUNT, which, operation]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) == more


@needs_native
def test_lent_threads_and_those_of_our_own_give_the_same_bits() -> None:
    torch.set_num_threads(3)
    x = torch.arange(5 * 1000 * 300, dtype=torch.float32).view(5, 1000, 300)
    try:
        dispatch.native.lend_threads(0)
        own = twodice.dropout(x, 0.1, key=1, step=2)
    finally:
        lent.lend()
    of_torch = twodice.dropout(x, 0.1, key=1, step=2)
    torch.set_num_threads(1)
    assert torch.equal(own, of_torch) and torch.equal(own, twodice.dropout(x, 0.1, key=1, step=2))


def attended() -> list[torch.Tensor]:
    """The result of attention and its gradients."""
    x = torch.arange(2 * 3 * 70 * 3 * 16, dtype=torch.float32).remainder(17).div(17).view(2, 3, 70, 48)
    q, k, v = (part.detach().requires_grad_() for part in x.split(16, dim=3))
    y = attention(q, k, v, 6554, 1, 2, causal=True)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (q, k, v))]


@needs_team
@needs_native
def test_attention_on_lent_threads_and_on_one_gives_the_same_bits() -> None:
    torch.set_num_threads(3)
    many = attended()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(many, attended(), strict=True))


@needs_native
def test_without_torchs_product_that_of_scipy_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, of_torch = attended(), lent.product()
    monkeypatch.setattr(lent, "_address", lambda name: None)
    lent.product.cache_clear()
    assert lent.product() != of_torch
    for found, first in zip(attended(), expected, strict=True):
        torch.testing.assert_close(found, first, atol=1e-5, rtol=1e-5)
