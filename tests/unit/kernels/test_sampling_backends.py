"""The native chain and the readable one give the same choices, kept sets, ranks and statuses, bit for bit."""

from __future__ import annotations

import dataclasses
import warnings
from functools import lru_cache

import numpy as np
import pytest
import torch
from tests.support import sampling_rows
from tests.support.both_samplers import NATIVE, assert_equal, both, needs_native, restored  # noqa: F401

from twodice.kernels import dispatch
from twodice.kernels.sampling import history_fits
from twodice.kernels.sampling_settings import NEEDS, Past
from twodice.random import noise
from twodice.sampling.explain import edited
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample

VOCABULARIES = (1, 7, 8, 129, 130, 257, 1000)

pytestmark = needs_native


def compare(number: int) -> int:
    vocabulary = VOCABULARIES[number % len(VOCABULARIES)]
    rows = min((17, 8, 3, 0, 64)[number % 5], 12 if vocabulary > 500 else 64)
    logits = sampling_rows.batch(number, rows, vocabulary)
    params = sampling_rows.settings(number, rows, vocabulary)
    position, completion = torch.arange(rows) + number, torch.arange(rows) % 3
    assert_equal(
        *both(
            logits,
            params,
            position,
            completion=completion,
            history=sampling_rows.history(number, rows, vocabulary),
            allowed_mask=sampling_rows.mask(number, rows, vocabulary),
            state=sampling_rows.state(number, params, vocabulary),
        )
    )
    return rows


def test_adversarial_rows_give_the_same_bits_on_every_backend() -> None:
    assert sum(compare(number) for number in range(150)) > 2000


EDITS = (
    {"repetition_penalty": 1.3},
    {"presence_penalty": -0.7, "frequency_penalty": 0.2},
    {"repetition_penalty": 0.6, "frequency_penalty": 0.3, "penalty_range": 50},
    {"frequency_penalty": -0.05},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "dry_multiplier": 0.8,
     "logit_bias": {7: 2.5, 4097: -9.0}},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "banned_tokens": [0, 640, 4999]},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "allowed_tokens": [3, 200, 201, 2500, 4998]},
)  # fmt: skip
FILTERS = (
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 0.0},
    {"typical_p": 0.5},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_that_are_read_late_are_edited_all_the_same(dtype: torch.dtype, masked: bool) -> None:
    """Many blocks, few of them read: edits before and after the one that waits for its block."""
    generator = torch.Generator().manual_seed(5)
    rows, vocabulary, n = len(EDITS) * len(FILTERS), 5000, 300
    logits = torch.randn(rows, vocabulary, generator=generator).mul_(2).to(dtype)
    # What was said is what is likely, over and over, so that penalties move what is kept.
    likely = logits.double().topk(40).indices
    ids = likely.gather(1, torch.randint(0, 40, (rows, n), generator=generator)).flatten()
    past = (ids, torch.arange(rows + 1) * n, torch.full((rows,), n // 3))
    params = [SamplingParams(seed=3, **edit, **one) for edit in EDITS for one in FILTERS]  # type: ignore[arg-type]
    mask = None
    if masked:  # words that ban all, none, and some
        mask = torch.randint(-(2**31), 2**31, (rows, 157), dtype=torch.int64, generator=generator).to(
            torch.int32
        )
        mask[:, ::3], mask[:, 40:80] = -1, 0
    native, reference = both(logits, params, 11, history=past, allowed_mask=mask)
    assert_equal(native, reference)
    alone = sample(logits, params, 11, history=past, allowed_mask=mask, on_bad_row="flag")
    assert torch.equal(alone.tokens, reference.tokens)  # with nothing else asked for, fewer blocks are read


@pytest.mark.slow
def test_a_hundred_thousand_adversarial_rows_give_the_same_bits() -> None:
    assert sum(compare(number) for number in range(1000, 8000)) > 100_000


@pytest.mark.slow
def test_ten_million_adversarial_rows_give_the_same_tokens() -> None:
    """Tokens, statuses, states and ranks over vocabularies of 1 to 1,024, every stage on somewhere.

    Settings are used again on many logits, since making them would take longer than drawing; edits, which
    the reference makes row by row, have every tenth batch.
    """
    vocabularies = (1, 2, 3, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33)
    large = (64, 65, 127, 128, 129, 200, 257, 1000, 1024)
    rows, compared, number = 4096, 0, 0
    while compared < 10_000_000:
        is_large = number % 16 == 15
        vocabulary = large[number // 16 % 9] if is_large else vocabularies[number % 15]
        few = rows if not is_large else 128
        params = settings_again(number % 140, few, vocabulary, with_edits=number % 10 == 0)
        logits = sampling_rows.many(number, few, vocabulary)
        more = {"state": sampling_rows.state(number, params, vocabulary)}
        if number % 10 == 0:
            more |= {"history": sampling_rows.history(number, few, vocabulary)}
        call = lambda: sample(logits, params, number, need=("rank",), on_bad_row="flag", **more)  # noqa: B023, E731
        dispatch.native = NATIVE
        native = call()
        dispatch.native = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = call()
        for name in ("tokens", "status", "rank", "state"):
            ours, theirs = getattr(native, name), getattr(reference, name)
            if ours is not None or theirs is not None:
                assert torch.equal(ours.double().nan_to_num(-1e9), theirs.double().nan_to_num(-1e9)), number
        compared, number = compared + few, number + 1


@lru_cache(maxsize=200)
def settings_again(number: int, rows: int, vocabulary: int, with_edits: bool) -> tuple[SamplingParams, ...]:
    found = sampling_rows.settings(number, min(rows, 64), vocabulary)
    if not with_edits:
        edits = (*sampling_rows.EDITS, "penalty_range", "dry_base", "dry_allowed_length", "dry_range",
                 "dry_breakers", "min_tokens", "stop_tokens")  # fmt: skip
        none = dict.fromkeys(edits)
        found = [dataclasses.replace(one, **none) for one in found]  # type: ignore[arg-type]
    return tuple(found[i % len(found)] for i in range(rows))


def test_a_history_fits_alike_with_and_without_the_native_check() -> None:
    far = 2**62
    for ids, offsets, prompts in (
        ([0, 4, 2], [0, 1, 3], [1, 0]), ([], [0, 0, 0], [0, 0]), ([0, 5, 2], [0, 1, 3], [1, 0]),
        ([0, -1, 2], [0, 1, 3], None), ([0, 4, 2], [0, 4, 3], None), ([0, 4, 2], [1, 1, 3], None),
        ([0, 4, 2], [0, 1, 2], None), ([0, 4, 2], [0, 1, 3], [2, 0]), ([0, 4, 2], [0, 1, 3], [0, -1]),
        ([0, 4, -far * 2], [0, 1, 3], None), ([0, 4, far], [0, 1, 3], None), ([0, 4, 2], [0, -far, 3], None),
    ):  # fmt: skip
        whole = [None if x is None else torch.tensor(x, dtype=torch.int64) for x in (ids, offsets, prompts)]
        past = Past(*whole)  # type: ignore[arg-type]
        dispatch.native = NATIVE
        native = history_fits(past, 5)
        dispatch.native = None
        assert native == history_fits(past, 5), (ids, offsets, prompts)


def test_a_deviation_whose_square_root_rounds_otherwise_cuts_alike() -> None:
    """The variance is one unit in the last place below 1: a square root of torch was once rounded to 1."""
    logits = torch.tensor([[0.5, -0.5, -0.0, 0.0, -3.0, -0.5, 0.5, 0.0, 0.0]])
    assert_equal(*both(logits, SamplingParams(seed=1, top_n_sigma=0.5), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigma", [0.01, 1.0, 4.0])
def test_a_large_vocabulary_gives_the_same_bits(dtype: torch.dtype, sigma: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(8, 50_257, generator=generator) * sigma).to(dtype)
    params = [
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_k=50),
        SamplingParams(seed=3, top_p=0.95),
        SamplingParams(seed=4, top_k=20_000, top_p=0.9),
        SamplingParams(seed=5, min_p=0.02),
        SamplingParams(seed=6, top_p=0.9999, temperature=1.7),
        SamplingParams(seed=7, top_k=400, min_p=0.1),
        SamplingParams(seed=8, top_p=0.3, temperature=0.2),
    ]
    assert_equal(*both(logits, params, 5))


def wide_rows(number: int) -> tuple[torch.Tensor, list[SamplingParams]]:
    """Rows of 1,024 tokens and more under top-p, where the native kernel draws without knowing the cut."""
    generator = np.random.default_rng((number, 9))
    vocabulary = int(generator.choice([1024, 1500, 5000]))
    kinds = [kind for kind in sampling_rows.KINDS if kind not in ("nan", "+inf", "all -inf")]
    rows = [
        sampling_rows.row(generator, str(generator.choice(kinds)), vocabulary) * generator.choice([0.1, 1, 3])
        for _ in range(8)
    ]
    logits = torch.from_numpy(np.stack(rows)).to(torch.bfloat16 if number % 3 == 0 else torch.float32)
    params = [
        SamplingParams(
            seed=int(generator.integers(2**40)),
            top_p=float(generator.choice([0.0, 0.05, 0.3, 0.5, 0.9, 0.95, 0.999, 0.9999999])),
            temperature=float(generator.choice([0.01, 0.7, 1.0, 1.0, 1.5, 100.0])),
            profile=[None, None, "hf"][generator.integers(3)],
        )
        for _ in range(8)
    ]
    return logits, params


@pytest.mark.parametrize(
    "numbers", [range(40), pytest.param(range(1000, 4000), marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_top_p_drawn_without_its_cut_gives_the_token_that_the_cut_gives(numbers: range) -> None:
    """Without a need the cut is not looked for; with `kept` it is, and the reference sorts."""
    for number in numbers:
        logits, params = wide_rows(number)
        dispatch.native = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = sample(logits, params, number, need=("kept",))
        dispatch.native = NATIVE
        for level in NATIVE.simd_levels():
            NATIVE.set_simd(level)
            assert torch.equal(sample(logits, params, number).tokens, reference.tokens)
            full = sample(logits, params, number, need=("kept",))
            assert torch.equal(full.tokens, reference.tokens) and torch.equal(full.kept[1], reference.kept[1])


@pytest.mark.parametrize("profile", [None, "hf"])
@pytest.mark.parametrize(
    ("kind", "vocabulary"),
    [("distinct", 3000), ("distinct", 9000), ("ties", 9000), ("steep", 3000), ("steep", 9000), ("few", 9000),
     ("penalised", 9000), ("far", 3000), ("far", 9000)],
)  # fmt: skip
def test_top_p_whose_cut_stands_at_the_token_drawn_from_everything(
    kind: str, vocabulary: int, profile: str | None
) -> None:
    """The mass up to the token is what p asks for, or differs from it by little, by more, by much.

    The kept sets are the reference's (the tests above); asked for, the cut is found before the draw.
    """
    generator = torch.Generator().manual_seed(6)
    place, normal = torch.arange(vocabulary), torch.randn(vocabulary, generator=generator)
    few = torch.where(place % 128 == 50, -2.0, torch.where((place > 3) & (place < 8), 0.0, -1e4))
    far = normal * 2 + 1e7  # the next float32 is a whole unit away
    x = {"ties": normal.mul(2).round() / 8, "steep": normal * 3, "few": few, "far": far}.get(
        kind, normal * 0.3
    )
    same = {"temperature": 0.8, "profile": profile}
    past = None
    after = x
    if kind == "penalised":  # a third of the tokens, of which most wait when masses are summed
        same["repetition_penalty"] = 50.0
        past = torch.randint(0, vocabulary, (vocabulary // 3,), generator=generator)
        after = edited(x[None], SamplingParams(repetition_penalty=50.0), history=history(past, 1))[0]
    seeds = range(12)
    params = [SamplingParams(seed=seed, **same) for seed in seeds]  # type: ignore[arg-type]
    drawn = sample(x.expand(len(seeds), -1), params, 0, history=history(past, len(seeds))).tokens.tolist()
    order = after.argsort(descending=True, stable=True)
    if profile == "hf":  # the higher id first
        order = vocabulary - 1 - after.flip(0).argsort(descending=True, stable=True)
    upto = noise.weights((after.double() - after.max().double()) / 0.8)[order].cumsum(0)
    params = []
    for seed, token in zip(seeds, drawn, strict=True):
        at = int((order == token).nonzero())
        for last in (at - 1, at):  # without it, with it
            share = int(upto[last]) / int(upto[-1])
            for away in (0.0, 1e-16, 1e-12, 1e-8, 3e-6, 1e-5, 3e-5, 1e-3, 0.05):
                for p in (share * (1 - away), share * (1 + away)):
                    params.append(SamplingParams(seed=seed, top_p=min(p, 1.0), **same))  # type: ignore[arg-type]
    more = {"logits": x.expand(len(params), -1), "params": params, "position": 0}
    more["history"] = history(past, len(params))
    exact = sample(need=("kept",), **more).tokens  # type: ignore[arg-type]
    for level in NATIVE.simd_levels():
        NATIVE.set_simd(level)
        assert torch.equal(sample(**more).tokens, exact)  # type: ignore[arg-type]


def history(ids: torch.Tensor | None, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The same ids as the text of every row."""
    if ids is None:
        return None
    return ids.repeat(rows), torch.arange(rows + 1) * len(ids), torch.zeros(rows, dtype=torch.int64)


@pytest.mark.parametrize("sigma", [0.3, 4.0])
def test_what_is_asked_for_alone_is_what_is_asked_for_with_all_else(sigma: float) -> None:
    """Each field by itself, as the kernel does no more than what the fields need."""
    more = ({"top_p": 0.4}, {"top_p": 0.9}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.8},
            {"top_k": 30}, {"min_p": 0.1}, {"top_p": 0.9, "min_p": 0.6}, {"top_p": 0.5, "profile": "sglang"},
            {"temperature": 0.7, "banned_tokens": range(0, 9000, 2)})  # fmt: skip
    params = [SamplingParams(seed=i, **one) for i in range(12) for one in more]  # type: ignore[arg-type]
    logits = torch.randn(len(params), 9000, generator=torch.Generator().manual_seed(7)) * sigma
    full = sample(logits, params, 0, need=NEEDS)
    assert torch.equal(sample(logits, params, 0).tokens, full.tokens)
    for name in NEEDS:
        alone = sample(logits, params, 0, need=(name,))
        assert torch.equal(alone.tokens, full.tokens)
        if name == "kept":
            assert torch.equal(alone.kept[0], full.kept[0]) and torch.equal(alone.kept[1], full.kept[1])
        else:
            torch.testing.assert_close(getattr(alone, name), getattr(full, name), rtol=1e-11, atol=1e-11)


def test_tokens_far_below_the_first_are_drawn_at_their_own_rate() -> None:
    """262,143 tokens of z = -16 have 3% of the mass together.

    At temperature 2 a row is drawn as it is read, at 1 it is not; neither division rounds, so z is the same.
    """
    logits = torch.full((2**18,), -16.0)
    logits[0] = 0
    rows = 200
    params = [SamplingParams(seed=s) for s in range(rows)]
    found = sample(logits.expand(rows, -1), params, 0).tokens
    warm = [SamplingParams(seed=s, temperature=2.0) for s in range(rows)]
    assert torch.equal(sample((logits * 2).expand(rows, -1), warm, 0).tokens, found)
    assert 0 < int((found > 0).sum()) < 30


def test_the_number_of_threads_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(16, 40_000, generator=generator)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(
                sample(logits, [SamplingParams(seed=i, top_p=0.9) for i in range(16)], 3, need=NEEDS)
            )
    finally:
        torch.set_num_threads(before)
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])


def test_float32_copies_of_half_precision_logits_give_the_same_tokens() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(20, 500, generator=generator)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = logits.to(dtype)
        params = [SamplingParams(seed=i, top_k=40, top_p=0.9) for i in range(20)]
        assert_equal(sample(narrow, params, 1, need=NEEDS), sample(narrow.float(), params, 1, need=NEEDS))


def test_every_exponent_and_sign_of_float16_is_widened_exactly() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    for k in (1, 7, 64):
        assert_equal(*both(every.reshape(2, -1), SamplingParams(seed=1, top_k=k, temperature=1e4), 0))


def test_a_temperature_that_brings_back_what_float32_cannot_hold_gives_the_same_bits() -> None:
    """Logits 6e38 apart: their difference overflows float32, divided by 1e38 it is 6."""
    logits = torch.full((64, 256), -3e38)
    logits[:, 0] = 3e38
    native, reference = both(logits, [SamplingParams(temperature=1e38, seed=s) for s in range(64)], 0)
    assert_equal(native, reference)
    assert native.tokens.unique().numel() > 1


@pytest.mark.parametrize(
    ("logits", "temperature"),
    [
        (torch.arange(256, dtype=torch.int32).view(torch.float32), 3e-43),  # the least subnormals
        (torch.arange(256, dtype=torch.float64) * 1e-46, 1e-44),
    ],
)
def test_a_temperature_whose_inverse_float32_cannot_hold_gives_the_same_bits(
    logits: torch.Tensor, temperature: float
) -> None:
    """Differences of the order of the temperature, whose inverse is beyond float32."""
    params = [SamplingParams(temperature=temperature, seed=s) for s in range(64)]
    native, reference = both(logits.repeat(64, 1), params, 0)
    assert_equal(native, reference)
    assert native.tokens.unique().numel() > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "steps",
    [
        (0, 999),
        (0, 999, 1001),
        (0, 995.5, 1001),
        (0, 999, 1001, 2000, 2002, 2002.5),
        (0, 1e6),  # where float32 would err by a tenth of a unit
    ],
)
def test_a_row_that_rises_far_while_it_is_read_is_drawn_from_what_stands_near_its_end(
    steps: tuple[float, ...], dtype: torch.dtype
) -> None:
    """Sixteen blocks are read in one go; z is measured from the first of them until it goes beyond 1,000."""
    rows, temperature = 64, 0.75
    logits = torch.full((2048 * (len(steps) - 1) + 128,), -1e7, dtype=dtype)
    for i, step in enumerate(steps):  # a hundred tokens on each step, one on the last but where there are two
        many = 100 if i + 1 < len(steps) or i == 1 else 1
        logits[2048 * i : 2048 * i + many] = step * temperature
    params = [SamplingParams(temperature=temperature, seed=s) for s in range(rows)]
    native, reference = both(logits.expand(rows, -1), params, 0)
    assert_equal(native, reference)
    assert native.tokens.unique().numel() > 5


def test_a_token_whose_leading_bits_are_just_at_the_limit_is_drawn() -> None:
    """Positions, found by search, at which the winner's 16 bits are the greatest that could win."""
    logits = torch.cat([torch.arange(512) * 1e-3, torch.tensor([-1e4])])
    position = torch.tensor([29771, 32852, 60457, 66764, 69955, 80666])
    native, reference = both(logits.expand(6, -1), SamplingParams(seed=1), position)
    assert_equal(native, reference)


def test_log_probabilities_of_equal_and_huge_logits_are_not_lost_in_rounding() -> None:
    for found in both(torch.full((1, 2), -3e38), SamplingParams(seed=0), 0):
        assert found.raw_logprob is not None
        assert found.raw_logprob.item() == pytest.approx(-0.6931471805599453, abs=1e-12)
