"""What sampling in Triton must be: its readable twin, bit for bit. Run by ``test_sampling_triton.py``.

By hand: TRITON_INTERPRET=1 python -m pytest tests/unit/kernels/sampling_triton_cases.py. Without that
variable the cases run on the GPU. Blocks are small, so that each row takes several, and the list of
candidates has so little room that it overflows. ``TWODICE_TRITON_ROWS`` is how many adversarial rows are
tried.
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
from tests.support.triton_kernels import DEVICE, INTERPRETED, interpret_quickly

from twodice.kernels import dispatch, sampling_triton
from twodice.kernels.noise_triton import exp, gumbel, log, weights
from twodice.kernels.sampling_reference import reference
from twodice.kernels.sampling_settings import Draw, Past, Sampled, Settings
from twodice.kernels.sampling_triton import not_served, sample_triton
from twodice.random import noise
from twodice.sampling.chain import pack
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample

# The interpreter computes with numpy, which warns where a device does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ROWS = int(os.environ.get("TWODICE_TRITON_ROWS", "100"))
SIZES = ({"block": 16, "room": 32}, {"block": 8, "room": 128}, {"block": 32, "room": 16})
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


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        interpret_quickly(monkeypatch)


@triton.jit
def arithmetic_kernel(
    z, x, ids, out_exp, out_weights, out_log, out_gumbel, position, k0, k1, N: tl.constexpr
):
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
    found = [
        torch.empty(n, dtype=d, device=DEVICE) for d in (torch.float64, torch.int64) + (torch.float64,) * 2
    ]
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


def both(
    logits: torch.Tensor,
    settings: Settings,
    draw: Draw,
    past: Past | None = None,
    mask: torch.Tensor | None = None,
    **sizes: int,
) -> tuple[Sampled, Sampled]:
    """The same call on the Triton kernels and on the reference."""
    rows = logits.shape[0]
    assert not_served(logits, settings, ("rank",)) is None
    ours = sample_triton(logits.to(DEVICE), settings, draw, past, mask, ("rank",), **sizes)
    wanted = reference(
        logits,
        settings,
        draw.keys.expand(rows),
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
    sizes = SIZES[number % len(SIZES)] | {"tile": 64 if vocabulary < 100 else 256}
    assert_equal(*both(logits, packed.settings, draw, past, mask, **sizes), number, params)
    return rows


def test_adversarial_rows_give_the_same_bits() -> None:
    done = number = 0
    while done < ROWS:
        done += compare(number)
        number += 1


def test_the_token_behind_a_prefix_that_reaches_p_exactly_goes() -> None:
    params = tuple(SamplingParams(seed=s, top_p=0.5) for s in range(12))
    packed = pack(params)
    free = pack(tuple(SamplingParams(seed=s) for s in range(12)))
    logits, draw = torch.zeros(12, 2), Draw(packed.keys, 0, 0)
    ours, wanted = both(logits, packed.settings, draw, block=8, tile=8, room=8)
    assert_equal(ours, wanted)
    assert not ours.tokens.any()
    assert both(logits, free.settings, draw)[0].tokens.any()  # it would have been drawn


def test_top_p_counts_the_mass_that_min_p_removes_behind_it() -> None:
    """Masses 4, 3, 2, 1: top-k leaves 9, half of which needs two tokens; the 7 that min-p leaves do not."""
    logits = torch.full((6, 24), -torch.inf)
    logits[:, [0, 8, 16, 17]] = torch.tensor([4.0, 3.0, 2.0, 1.0]).log()
    for order, second in ((("top_k", "top_p", "min_p"), True), (("top_k", "min_p", "top_p"), False)):
        settings = {"top_k": 3, "top_p": 0.5, "min_p": 0.6, "order": ("temperature", *order)}
        packed = pack(tuple(SamplingParams(seed=s, **settings) for s in range(6)))  # type: ignore[arg-type]
        for room in (8, 2):  # candidates in a list, and too many for it
            ours, wanted = both(logits, packed.settings, Draw(packed.keys, 0, 0), block=8, tile=8, room=room)
            assert_equal(ours, wanted)
            assert bool(ours.tokens.any()) is second


def test_a_tail_of_many_tokens_far_below_the_top_is_drawn() -> None:
    """One token and 5,999 that are 9 nats below it and hold 43 % of the mass."""
    params = tuple(SamplingParams(seed=s, top_p=(None, 0.99)[s % 2]) for s in range(8))
    packed = pack(params)
    logits = torch.full((8, 6000), -9.0)
    logits[:, 4321] = 0
    ours, wanted = both(logits, packed.settings, Draw(packed.keys, 0, 0))
    assert_equal(ours, wanted)
    assert (ours.tokens[::2] != 4321).any() and (ours.tokens[1::2] != 4321).any()


def test_blocks_of_the_real_size_give_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(3)
    params = (
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_k=5),
        SamplingParams(seed=3, top_p=0.95),
        SamplingParams(seed=4, top_k=900, top_p=0.9),
        SamplingParams(seed=5, min_p=0.02),
        SamplingParams(seed=6, top_p=0.3, temperature=0.2, min_p=0.01),
        SamplingParams(seed=7, temperature=0.0),
        SamplingParams(seed=8, top_p=0.9, temperature=1.7, profile="llama.cpp"),
    )
    packed = pack(params)
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(len(params), 3000, generator=generator) * 3).to(dtype)
        assert_equal(*both(logits, packed.settings, Draw(packed.keys, 5, 0)))


@pytest.mark.parametrize(
    ("params", "need", "by_triton"),
    [
        (SamplingParams(seed=1, top_k=3), (), True),
        (SamplingParams(seed=2, top_p=0.6, banned_tokens=[1], repetition_penalty=1.5), ("rank",), True),
        (SamplingParams(seed=3, typical_p=0.6), (), False),
        (SamplingParams(seed=4, min_p=0.1), ("logprob",), False),
    ],
)
def test_a_tensor_on_a_gpu_goes_to_triton_where_it_is_served(
    params: SamplingParams, need: tuple[str, ...], by_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    logits[2, 7] = torch.nan
    mask = torch.tensor([[-1, -1], [0xFFF0, 0], [-1, -1]], dtype=torch.int32)
    history = torch.tensor([1, 2, 2, 5]), torch.tensor([0, 2, 2, 4]), torch.tensor([1, 0, 0])
    more: dict[str, Any] = {"history": history, "allowed_mask": mask, "need": need, "on_bad_row": "flag"}
    wanted = sample(logits, params, 9, **more)
    calls = []
    monkeypatch.setattr(
        sampling_triton, "sample_triton", lambda *given: calls.append(1) or sample_triton(*given)
    )
    monkeypatch.setattr(dispatch, "native", None)
    if DEVICE == "cpu":  # the interpreter takes the host for the device
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = sample(logits.to(DEVICE), params, 9, **more)
    assert len(calls) == by_triton
    assert torch.equal(found.tokens.cpu(), wanted.tokens) and torch.equal(found.status.cpu(), wanted.status)
    assert wanted.status.tolist() == [0, 0, 1]
    if "rank" in need:
        assert torch.equal(found.rank.cpu(), wanted.rank)


def test_what_is_not_served_is_said_in_words() -> None:
    def why(params: SamplingParams, *need: str, dtype: torch.dtype = torch.float32) -> str | None:
        return not_served(torch.zeros(1, 4, dtype=dtype), pack(params).settings, need)

    assert why(SamplingParams(top_k=3, top_p=0.5), "rank") is None
    assert why(SamplingParams(), dtype=torch.float64) == "torch.float64"
    assert why(SamplingParams(), "rank", "kept") == "need='kept'"
    assert why(SamplingParams(typical_p=0.5)) == "a stage beyond temperature, top-k, top-p and min-p"
    assert why(SamplingParams(top_k=3, profile="hf")) == "the rules of another engine"
