"""Where a stage ends: exactly at a token, among equals, below or above what the stages before it have kept.

The native chain sums by levels of probability and lists only the level in which the end lies; the readable
one sorts. Both give the same bits, and the kept sets are also told here.
"""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.both_samplers import NATIVE, assert_equal, both, needs_native, restored  # noqa: F401

from twodice.random import noise
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample

pytestmark = needs_native

TOPLESS = (
    {"typical_p": 0.3},
    {"typical_p": 0.9},
    {"xtc_probability": 1.0, "xtc_threshold": 2e-4},
)
BEHIND = (
    {},
    {"top_p": 0.6},
    {"top_p": 1e-9},  # ends among the equals of the first, of which some are gone
    {"top_h": 0.5},
    {"top_k": 300},
    {"min_p": 0.7},
    {"min_p": 1e-3},  # its limit lies below what is kept
    {"epsilon_cutoff": 1.2e-4},
    {"eta_cutoff": 0.5},
    {"top_n_sigma": 1.0},
    {"mirostat_tau": 6.55},
    {"temperature": 0.3},
    {"temperature": 0.0},
    {"temperature": 0.9, "dynatemp_range": 0.4},
    {"typical_p": 0.6},
    {"xtc_probability": 1.0, "xtc_threshold": 1.1e-4},
    {"xtc_probability": 0.5, "xtc_threshold": 1.1e-4, "xtc_by_expectation": True},
)
STAGES = {"xtc_probability": "xtc", "mirostat_tau": "mirostat"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_stages_behind_one_that_drops_the_first_tokens_give_the_same_bits(dtype: torch.dtype) -> None:
    """More blocks than become a list: what is kept is a range with two ends, in bfloat16 among ties."""
    params = []
    for seed in range(3):
        for first in TOPLESS:
            for then in BEHIND:
                if not set(first) & set(then):
                    order = [STAGES.get(next(iter(one)), next(iter(one))) for one in (first, then) if one]
                    params.append(SamplingParams(seed=seed, order=order, **first, **then))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(8)
    logits = (torch.randn(len(params), 9000, generator=generator) * 0.4).to(dtype)
    native, reference = both(logits, params, 2)
    assert_equal(native, reference)
    assert (native.kept_mass < 0.95).sum() > 100
    for level in NATIVE.simd_levels():
        NATIVE.set_simd(level)
        alone = sample(logits, params, 2)
        assert torch.equal(alone.tokens, reference.tokens)
        if reference.state is not None:
            assert torch.equal(alone.state.nan_to_num(-1e9), reference.state.nan_to_num(-1e9))


@pytest.mark.parametrize("sigma", [0.05, 1.5])  # all in few levels of the sums; few in each
@pytest.mark.parametrize("listed", [False, True])
def test_a_prefix_and_a_range_that_end_exactly_at_a_token_give_the_same_bits(
    sigma: float, listed: bool
) -> None:
    """The mass up to one token after the other is what is asked for: there `reaches` and `exceeds` part."""
    logits = (
        torch.randn(300, generator=torch.Generator().manual_seed(9)).mul(sigma).sort(descending=True).values
    )
    z = logits.double() - logits[0].double()
    mass = noise.weights(z)
    total = int(mass.sum())
    surprise = math.log(total * 2.0**-42) - z
    entropy = float((mass * surprise).sum() / total)
    nearest = (surprise - entropy).abs().argsort(stable=True)
    parts = (mass * surprise).cumsum(0) / (mass * surprise).sum()
    listing = {"top_k": 300} if listed else {}  # of 301, one of them dead
    params = []
    for at in range(0, 299, 3):
        for more in (0, 1):  # one unit more, and the next token is needed
            upto = share_of(int(mass.cumsum(0)[at]) + more, total)
            within = share_of(int(mass[nearest].cumsum(0)[at]) + more, total)
            for stage in ({"top_p": upto}, {"typical_p": within}, {"top_h": float(parts[at])}):
                params.append(SamplingParams(seed=at, **stage, **listing))  # type: ignore[arg-type]
    rows = torch.cat([logits, torch.tensor([-torch.inf])]).expand(len(params), -1)
    native, reference = both(rows, params, 0)
    assert_equal(native, reference)
    length = native.kept[0].diff()
    assert torch.equal(length[0::6], torch.arange(0, 299, 3) + 1) and torch.equal(
        length[3::6], length[0::6] + 1
    )
    assert torch.equal(length[1::6], length[0::6]) and torch.equal(length[4::6], length[3::6])


def share_of(need: int, total: int) -> float:
    """The greatest float64 of which `total` times is rounded up to `need`."""
    share = need / total
    while math.ceil(share * total) > need:
        share = math.nextafter(share, 0.0)
    return share


def test_what_no_prefix_reaches_is_everything_that_is_there() -> None:
    """sglang's top-p keeps one token more where the mass is met exactly, and here everything meets it."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(9)).expand(3, -1)
    params = [SamplingParams(seed=1, top_p=1 - 2**-53, profile="sglang", top_k=k) for k in (None, 299, 5)]
    native, reference = both(logits, params, 0)
    assert_equal(native, reference)
    assert native.kept[0].diff().tolist() == [300, 299, 5]


def test_the_mass_of_a_row_is_that_of_blocks_too_which_no_stage_has_read() -> None:
    """Five tokens of mass 1 and 995 of 1 / e, together 371.0; one in a hundred of it is 3.7."""
    logits = torch.full((1, 1000), 3.0, dtype=torch.bfloat16)
    logits[0, : 5 * 128 : 128] = 4.0  # one a block, so that the other blocks cannot be among the five
    native, reference = both(logits, SamplingParams(seed=1, top_k=5, top_p=0.01, profile="sglang"), 0)
    assert_equal(native, reference)
    assert native.kept[1].tolist() == [0, 128, 256, 384]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_least_number_lives_where_a_limit_is_beyond_it(dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).min
    logits = torch.tensor([[0.0, least, -torch.inf]], dtype=dtype)
    stages = (
        {"min_p": 0.1},
        {"epsilon_cutoff": 0.1},
        {"typical_p": 0.99},
        {"top_p": 0.99},
        {"top_h": 0.999999},
    )
    params = [SamplingParams(seed=1, temperature=-least / 2, **one) for one in stages]  # type: ignore[arg-type]
    native, reference = both(logits.expand(len(params), -1), params, 0)
    assert_equal(native, reference)
    assert native.kept[0].diff().tolist() == [2, 2, 2, 2, 1]


def test_tokens_above_and_below_the_entropy_at_one_distance_are_counted_once() -> None:
    """Neighbours in float32, 1.1 nats apart, one above the entropy by 0.552 and three below it by 0.559.

    Nearest first they have 50.3% and 16.6% each. With XTC two equals of the first are gone before.
    """
    near, far = 16000001.0, 16000000.0
    same = {"temperature": 0.9, "typical_p": 0.55, "seed": 1}
    alone = SamplingParams(**same)  # type: ignore[arg-type]
    native, reference = both(torch.tensor([[near, far, far, far]]), alone, 0)
    assert_equal(native, reference)
    assert native.kept[1].tolist() == [0, 1, 2, 3]
    native, reference = both(torch.tensor([[near, far, far, far, far]]), alone, 0)
    assert_equal(native, reference)
    assert native.kept[1].tolist() == [1, 2, 3, 4]  # one more, and they are nearer, with 56.8% together
    last = SamplingParams(
        xtc_probability=1.0, xtc_threshold=0.2, order=["temperature", "xtc", "typical_p"], **same
    )  # type: ignore[arg-type]
    native, reference = both(torch.tensor([[near, near, near, far, far, far]]), last, 0)
    assert_equal(native, reference)
    assert native.kept[1].tolist() == [2, 3, 4, 5]


def test_masses_that_are_rounded_up_push_the_end_of_the_prefix_back() -> None:
    """998 tokens of 0.525 units of mass count 1 each: without these halves one token would reach the need."""
    logits = torch.full((1, 1000), -29.7565)
    logits[0, 0], logits[0, 1] = 0.0, -20.9234
    native, reference = both(logits, SamplingParams(seed=1, top_p=1 - 1e-9), 0)
    assert_equal(native, reference)
    assert native.kept[1].tolist() == [0, 1]
