"""Penalties before top-k: the native chain asks the history for the ids alone that may be among the first.

The readable one penalises every id. Both give the same bits, however much of the top the history holds.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tests.support.both_samplers import NATIVE, assert_equal, both, needs_native, restored  # noqa: F401
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from twodice.kernels import dispatch
from twodice.sampling.explain import edited
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample

pytestmark = needs_native

VOCABULARY = 12_345  # 97 blocks of 128 and a shorter one
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1}
OF_PROFILE = {
    None: PENALTIES,
    "hf": {"repetition_penalty": 1.3},
    "vllm": PENALTIES,
    "llama.cpp": PENALTIES,
    "sglang": PENALTIES,
}


def histories(logits: torch.Tensor, lengths: list[int], top: int, seed: int = 0) -> Any:
    """A history a row, half of it drawn from the row's `top` greatest tokens, half from anywhere."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row, length in zip(logits, lengths, strict=True):
        likely = row.float().nan_to_num(-1e9).topk(top).indices
        near = likely[torch.randint(0, top, (length,), generator=generator)]
        far = torch.randint(0, logits.shape[1], (length,), generator=generator)
        rows.append(torch.where(torch.rand(length, generator=generator) < 0.5, near, far))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat(rows), offsets, torch.tensor([length // 3 for length in lengths])


def check(logits: torch.Tensor, params: Any, history: Any, **more: Any) -> None:
    native, reference = both(logits, params, 5, history=history, **more)
    assert_equal(native, reference)
    for level in NATIVE.simd_levels():  # and where nothing reads the row again
        NATIVE.set_simd(level)
        dispatch.native = NATIVE
        alone = sample(logits, params, 5, history=history, on_bad_row="flag", **more)
        assert torch.equal(alone.tokens, reference.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("top", [3, 40, 4000])  # of the history: few of the first, all of them, everybody
def test_the_tokens_that_top_k_keeps_behind_penalties_are_those_of_the_reference(
    dtype: torch.dtype, top: int
) -> None:
    lengths = [0, 1, 63, 64, 65, 130, 1000, 4096]
    logits = (torch.randn(len(lengths), VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    history = histories(logits, lengths, top)
    for k in (1, 2, 20, 70, 90, 500):
        for profile, penalties in OF_PROFILE.items():
            params = [
                SamplingParams(top_k=k, temperature=0.7, seed=i, profile=profile, **penalties)  # type: ignore[arg-type]
                for i in range(len(lengths))
            ]
            check(logits, params, history)


@pytest.mark.parametrize("scale", [0.0, 0.5])  # all equal; many equals at the cut
def test_equals_at_the_cut_stay_in_the_order_of_their_ids(scale: float) -> None:
    logits = (torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(2)) * scale).round()
    history = histories(logits, [500] * 6, 2000)
    for profile, penalties in OF_PROFILE.items():
        for k in (1, 10, 40):
            params = [
                SamplingParams(top_k=k, seed=i, profile=profile, **penalties)  # type: ignore[arg-type]
                for i in range(6)
            ]
            check(logits, params, history)


def test_what_other_edits_touched_is_penalised_once() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, VOCABULARY, generator=generator) * 2
    history = histories(logits, [700] * 6, 30)
    first = logits.argmax(1).tolist()
    common = {"top_k": 12, "temperature": 0.8, **PENALTIES}
    params = [
        SamplingParams(seed=0, logit_bias={first[0]: 3.0, 7: 9.0}, **common),  # type: ignore[arg-type]
        SamplingParams(seed=1, logit_bias={first[1]: -9.0}, **common),  # type: ignore[arg-type]
        SamplingParams(seed=2, dry_multiplier=0.8, dry_allowed_length=1, **common),  # type: ignore[arg-type]
        SamplingParams(seed=3, no_repeat_ngram_size=1, **common),  # type: ignore[arg-type]
        SamplingParams(seed=4, banned_tokens=[first[4]], **common),  # type: ignore[arg-type]
        SamplingParams(seed=5, allowed_tokens=list(range(0, VOCABULARY, 3)), **common),  # type: ignore[arg-type]
    ]
    check(logits, params, history)
    mask = torch.randint(-(2**31), 2**31, (6, (VOCABULARY + 31) // 32), generator=generator).to(torch.int32)
    mask[:3] = -1
    mask[1, 5] = 0
    check(logits, params, history, allowed_mask=mask)


def test_values_that_penalties_take_to_minus_infinity_are_no_tokens() -> None:
    logits = torch.full((3, VOCABULARY), -torch.inf)
    logits[0, ::7] = -3e38  # all of them go; a row with nothing left
    logits[1, ::7] = -3e38
    logits[1, 0] = -1e38  # stays
    logits[2, 3::128] = -2e38
    ids = torch.arange(0, VOCABULARY, 7)
    history = (ids.repeat(3), torch.arange(4) * len(ids), torch.zeros(3, dtype=torch.int64))
    params = [SamplingParams(top_k=5, repetition_penalty=2.0, seed=i) for i in range(3)]
    check(logits, params, history)
    found = sample(logits, params, 0, history=history, on_bad_row="flag")
    assert found.status.tolist() == [3, 0, 0] and found.tokens[1] == 0


def test_a_window_and_penalties_that_raise_are_served_too() -> None:
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(4))
    history = histories(logits, [900] * 4, 60)
    params = [
        SamplingParams(top_k=9, seed=0, penalty_range=64, **PENALTIES),  # type: ignore[arg-type]
        SamplingParams(top_k=9, seed=1, repetition_penalty=0.7),
        SamplingParams(top_k=9, seed=2, frequency_penalty=-0.2),
        SamplingParams(
            top_k=9, seed=3, presence_penalty=0.2, top_n_sigma=1.0, order=["top_n_sigma", "top_k"]
        ),
    ]
    check(logits, params, history)


@pytest.mark.parametrize(
    "behind",
    [{"min_p": 0.3}, {"top_p": 0.6}, {"typical_p": 0.5}, {"temperature": 1.5, "dynatemp_range": 0.5}, {}],
)
@pytest.mark.parametrize("penalties", [{"presence_penalty": 1e6}, {"repetition_penalty": 50.0}])
def test_what_follows_counts_from_the_greatest_that_is_left(behind: Any, penalties: Any) -> None:
    """The greatest before the penalties is far above; a row where nearly all of the first are gone."""
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(5)).half() * 3
    for top, length in ((1, 5), (15, 200), (300, 3000), (VOCABULARY, 20_000)):
        history = histories(logits, [length] * 5, top)
        params = [SamplingParams(top_k=12, seed=i, **behind, **penalties) for i in range(5)]
        check(logits, params, history)
        check(torch.stack([logits, logits], 2)[:, :, 1], params, history)  # strided


def test_rows_leave_nothing_behind_for_the_next_one() -> None:
    """Rows that go by few ids stand between rows whose penalties wait at blocks; nobody reads a row again."""
    logits = torch.randn(40, VOCABULARY, generator=torch.Generator().manual_seed(6)) * 2
    history = histories(logits, [0, 700, 3000, 40] * 10, 50)
    kinds: list[dict[str, Any]] = [
        {"top_k": 10}, {"min_p": 0.2}, {"top_k": 500}, {"temperature": 0.0},
        {"top_k": 10, "logit_bias": {3: 2.0}}, {"top_p": 0.5}, {"top_k": 3, "presence_penalty": 1e5},
    ]  # fmt: skip
    params = [SamplingParams(**{**PENALTIES, "seed": i, **kinds[i % len(kinds)]}) for i in range(40)]
    together = sample(logits, params, 1, history=history)
    ids, offsets, prompts = history
    for i in reversed(range(40)):
        own = (ids[offsets[i] : offsets[i + 1]], offsets[i : i + 2] - offsets[i], prompts[i : i + 1])
        assert sample(logits[i], params[i], 1, history=own).tokens[0] == together.tokens[i]
    dispatch.native = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sample(logits, params, 1, history=history).tokens.equal(together.tokens)


def test_float64_logits_are_edited_by_float64_numbers() -> None:
    """As transformers does; float32 numbers would part what is a tie."""
    x = torch.tensor([[4.4, -1.1, 1.0, 2.0]], dtype=torch.float64)
    history = ([0, 1], [0, 2], [0])
    wanted = RepetitionPenaltyLogitsProcessor(1.1)(torch.tensor([[0, 1]]), x.clone())
    found = edited(x, SamplingParams(repetition_penalty=1.1, profile="hf"), history=history)
    assert found.equal(wanted)
    settings = SamplingParams(
        seed=1, presence_penalty=0.1, frequency_penalty=0.2, logit_bias={3: 0.1, 2: -1e300}
    )
    found = edited(x, settings, history=history)
    assert found.tolist() == [[(4.4 - 0.2) - 0.1, (-1.1 - 0.2) - 0.1, float("-inf"), 2.0 + 0.1]]
    native, reference = both(x, settings, 0, history=history)
    assert_equal(native, reference)
    tie = torch.tensor([[1.1, 1.0]], dtype=torch.float64)
    greedy = SamplingParams(repetition_penalty=1.1, temperature=0)
    assert sample(tie, greedy, 0, history=([0], [0, 1], [0])).tokens.tolist() == [0]
