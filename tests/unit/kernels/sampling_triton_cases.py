"""What sampling in Triton must be: its readable twin, bit for bit. Run by ``test_sampling_triton.py``.

By hand: TRITON_INTERPRET=1 python -m pytest tests/unit/kernels/sampling_triton_cases.py. Without that variable
the cases run on the GPU. Blocks are small, so that each row takes several, and the list of candidates has so
little room that it overflows. ``TWODICE_TRITON_ROWS`` is how many adversarial rows are tried.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from tests.support import sampling_rows
from tests.support.triton_kernels import DEVICE

from twodice.kernels.noise_triton import exp, gumbel, log, weights
from twodice.kernels.sampling import Draw
from twodice.kernels.sampling_reference import reference
from twodice.kernels.sampling_settings import Past, Sampled, Settings
from twodice.kernels.sampling_triton import not_served, sample_triton
from twodice.random import noise
from twodice.sampling.chain import pack
from twodice.sampling.params import SamplingParams

# The interpreter computes with numpy, which warns where a device does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ROWS = int(os.environ.get("TWODICE_TRITON_ROWS", "150"))
SIZES = {"block": 16, "tile": 64, "room": 32}
STAGES = ("temperature", "top_k", "top_p", "min_p")
ORDERS = (
    STAGES,
    STAGES,
    ("top_k", "top_p", "min_p", "temperature"),
    ("temperature", "min_p", "top_p", "top_k"),
    ("min_p", "top_k", "temperature", "top_p"),
    ("top_p", "temperature", "top_k", "min_p"),
)
KEYS = np.array([2**64 - 1, 2**63 + 5, 17], np.uint64)


@triton.jit
def arithmetic_kernel(z, x, ids, out_exp, out_weights, out_log, out_gumbel, position, k0, k1, N: tl.constexpr):
    i = tl.arange(0, N)
    of_z = tl.load(z + i)
    tl.store(out_exp + i, exp(of_z))
    tl.store(out_weights + i, weights(of_z))
    tl.store(out_log + i, log(tl.load(x + i)))
    k0, k1 = k0.to(tl.uint32), k1.to(tl.uint32)
    of_ids = tl.load(ids + i).to(tl.uint32)
    tl.store(out_gumbel + i, gumbel(of_ids, position.to(tl.uint32), of_ids & 1, 0, k0, k1))


def test_the_arithmetic_of_noise_has_the_bits_of_its_readable_twin() -> None:
    n = 8192
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(n, dtype=torch.float64, generator=generator)
    z = -(uniform * 10 ** torch.linspace(-12, 3, n, dtype=torch.float64))
    z[:5] = torch.tensor([0.0, -0.0, -torch.inf, -700.0, -701.0])
    x = torch.exp(1400 * (uniform - 0.5))
    x[:4] = torch.tensor([1.0, 2.0**-1022, 0.5**0.5, 1 - 2.0**-53], dtype=torch.float64)
    ids = torch.randint(0, 2**32, (n,), generator=generator)
    found = [torch.empty(n, dtype=d, device=DEVICE) for d in (torch.float64, torch.int64) + (torch.float64,) * 2]
    inputs = [values.to(DEVICE) for values in (z, x, ids)]
    arithmetic_kernel[(1,)](*inputs, *found, 2**31 - 9, -5, 7, N=n, enable_fp_fusion=False)
    key = 7 << 32 | (2**32 - 5)
    wanted = (
        noise.exp(z),
        noise.weights(z),
        noise.log(x),
        noise.gumbel(ids, 2**31 - 9, ids & 1, 0, key - 2**64 if key >= 2**63 else key),
    )
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.cpu(), theirs)


def both(logits: torch.Tensor, settings: Settings, draw: Draw, past=None, mask=None, **sizes) -> tuple[Sampled, Sampled]:  # fmt: skip
    """The same call on the Triton kernels and on the reference."""
    rows = logits.shape[0]
    assert not_served(logits, settings, ("rank",)) is None
    ours = sample_triton(logits.to(DEVICE), settings, draw, past, mask, ("rank",), **(SIZES | sizes))
    wanted = reference(
        logits,
        settings,
        torch.from_numpy(draw.keys.view(np.int64)).expand(rows),
        torch.as_tensor(draw.position).expand(rows),
        torch.as_tensor(draw.completion).expand(rows),
        past,
        mask,
        need=("rank",),
    )
    return ours, wanted


def assert_equal(ours: Sampled, wanted: Sampled, *told: Any) -> None:
    for name in ("status", "tokens", "rank"):
        a, b = getattr(ours, name).cpu(), getattr(wanted, name)
        assert a.dtype == b.dtype and torch.equal(a, b), (name, a, b, *told)


def setting(generator: np.random.Generator, vocabulary: int, *, edited: bool) -> SamplingParams:
    """Settings that the kernels serve, many at the edges of their intervals."""

    def pick(values: Any) -> Any:
        return values[generator.integers(len(values))]

    found: dict[str, Any] = {"seed": int(generator.integers(2**62)), "order": pick(ORDERS)}
    found["temperature"] = pick([0.0, 1e-6, 0.7, 1.0, 1.0, 1.3, 1e6, 1e-300, 5e-324])
    if generator.random() < 0.5:
        found["top_k"] = pick([0, -1, 1, 2, 3, 5, 20, 50, vocabulary - 1, vocabulary, vocabulary + 1])
    if generator.random() < 0.5:
        found["top_p"] = pick([0.0, 0.1, 0.5, 0.95, 0.999999, 1.0])
    if generator.random() < 0.4:
        found["min_p"] = pick([0.0, 1e-9, 0.05, 0.5, 1.0])
    if edited:
        found |= {
            "logit_bias": {int(i): 2.5 for i in generator.integers(vocabulary, size=3)},
            "banned_tokens": [int(generator.integers(vocabulary))],
            "presence_penalty": 0.5,
            "frequency_penalty": 0.25,
            "repetition_penalty": 1.2,
        }
    return SamplingParams(**found)


def compare(number: int) -> int:
    vocabulary = (7, 33, 1, 130, 257, 64, 700)[number % 7]
    rows = (5, 8, 3, 1, 0)[number % 5]
    generator = np.random.default_rng((number, 5))
    logits = sampling_rows.batch(number, rows, vocabulary)
    if logits.dtype == torch.float64:
        logits = logits.to(torch.float32)
    edited = number % 6 == 5
    params = tuple(setting(generator, vocabulary, edited=edited) for _ in range(rows)) or SamplingParams()
    packed = pack(params[0] if isinstance(params, tuple) and rows == 1 else params)
    draw = Draw(packed.keys, torch.arange(rows) + 2**32 - 99, number % 3)
    past = Past(*sampling_rows.history(number, rows, vocabulary)) if edited and rows else None
    mask = sampling_rows.mask(number, rows, vocabulary) if number % 12 == 8 and rows else None
    assert_equal(*both(logits, packed.settings, draw, past, mask), number, params)
    return rows


def test_adversarial_rows_give_the_same_bits() -> None:
    done = number = 0
    while done < ROWS:
        done += compare(number)
        number += 1
    print(done)
