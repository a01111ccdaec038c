"""A split vocabulary gives what the whole one gives; and a shard sends no more than it must."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import sampling_rows

from twodice.errors import ConfigError, RequestError, ShapeError
from twodice.kernels import dispatch
from twodice.kernels.sampling_settings import NEEDS, Sampled
from twodice.sampling import shards
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample
from twodice.sampling.shards import merge_shards, shard_candidates


def cuts_of(number: int, vocabulary: int) -> list[int]:
    """Seams of 1, 2, 3 or more uneven shards, some of them empty."""
    generator = np.random.default_rng((number, 9))
    inner = sorted(int(i) for i in generator.integers(0, vocabulary + 1, size=(1, 2, 0, 6)[number % 4]))
    return [0, *inner, vocabulary]


def split(x: torch.Tensor, cuts: list[int], params: Any, position: Any, **more: Any) -> list[Any]:
    vocabulary = more.pop("vocabulary", x.shape[1])
    return [
        pickle.loads(pickle.dumps(shard_candidates(
            x[:, a:b], params, position, begin=a, vocabulary=vocabulary, **more)))
        for a, b in itertools.pairwise(cuts)
    ]  # fmt: skip


def assert_equal(found: Sampled, whole: Sampled) -> None:
    assert torch.equal(found.tokens, whole.tokens) and torch.equal(found.status, whole.status)
    assert found.seeds == whole.seeds and (found.state is None) == (whole.state is None)
    if whole.state is not None:
        assert torch.equal(found.state.nan_to_num(-1e9), whole.state.nan_to_num(-1e9))
    for name in NEEDS:
        a, b = getattr(found, name), getattr(whole, name)
        if b is None:
            continue
        if name == "kept":
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        elif name == "rank":
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, equal_nan=True)


def compare(number: int) -> int:
    vocabulary = (7, 40, 129, 1, 300)[number % 5]
    rows = 24
    x = sampling_rows.batch(number, rows, vocabulary)
    params = sampling_rows.settings(number, rows, vocabulary)
    position = torch.arange(rows) + number
    more = {
        "completion": torch.arange(rows) % 3,
        "history": sampling_rows.history(number, rows, vocabulary),
        "allowed_mask": sampling_rows.mask(number, rows, vocabulary),
    }
    need = ((), ("rank", "kept"), NEEDS, ("logprob", "entropy"), ("raw_logprob",), ("kept_mass",))[number % 6]
    state = sampling_rows.state(number, params, vocabulary)
    parts = split(x, cuts_of(number, vocabulary), params, position, need=need, **more)
    found = merge_shards(parts[::-1], params, position, state=state, need=need, on_bad_row="flag", **more)
    whole = sample(x, params, position, state=state, need=need, on_bad_row="flag", **more)
    assert_equal(found, whole)
    return rows


def test_adversarial_rows_and_settings_give_what_the_whole_row_gives() -> None:
    assert sum(compare(number) for number in range(90)) > 2000


@pytest.mark.slow
def test_twenty_five_thousand_adversarial_rows_give_what_the_whole_row_gives() -> None:
    assert sum(compare(number) for number in range(1000, 2050)) > 25_000


SENDS_LITTLE = [
    (SamplingParams(seed=1), 2),
    (SamplingParams(seed=1, temperature=0.3, repetition_penalty=1.3), 2),
    (SamplingParams(seed=1, temperature=0.0, top_p=0.9), 1),
    (SamplingParams(seed=1, top_k=20, top_p=0.9, typical_p=0.8, profile="hf"), 20),
    (SamplingParams(seed=1, min_p=0.5), 60),
]


@pytest.mark.parametrize(("params", "most"), SENDS_LITTLE)
def test_a_shard_sends_little_where_the_first_filter_needs_no_sum(params: SamplingParams, most: int) -> None:
    x = torch.randn(40, 3000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    past = (torch.arange(80) * 3, torch.arange(0, 81, 2), torch.zeros(40, dtype=torch.int64))
    parts = split(x, [0, 900, 3000], params, torch.arange(40), history=past)
    assert max(int(part.offsets.diff().max()) for part in parts) <= most
    for part in parts:  # z is counted from the highest
        highest = x[:, part.begin : part.end].argmax(1) + part.begin
        sent = zip(part.offsets.tolist()[:-1], part.offsets.tolist()[1:], highest.tolist(), strict=True)
        assert params.repetition_penalty or all(top in part.ids[a:b] for a, b, top in sent)
    found = merge_shards(parts, params, torch.arange(40), history=past)
    assert_equal(found, sample(x, params, torch.arange(40), history=past))


@pytest.mark.parametrize("need", [(), ("rank",), ("raw_logprob",)])
def test_a_filter_that_reads_a_sum_makes_a_shard_send_all_that_lives(need: tuple[str, ...]) -> None:
    x = torch.zeros(1, 10)
    x[0, 3] = -torch.inf
    params = SamplingParams(seed=0, top_p=0.5) if not need else SamplingParams(seed=0)
    assert shard_candidates(x, params, 0, begin=0, vocabulary=10, need=need).ids.numel() == 9


def test_a_joint_top_p_behind_top_k_reads_a_sum_too() -> None:
    """SGLang's top-p counts over everything: what top-k drops is part of the sum."""
    tail = torch.linspace(0.0049, 0.0051, 50)  # no ties: a shard would send three of them
    x = torch.log(torch.cat([torch.tensor([0.3, 0.25, 0.2]), tail])).repeat(40, 1)
    params, position = SamplingParams(seed=2, top_k=3, top_p=0.6, profile="sglang"), torch.arange(40)
    parts = split(x, [0, 3, 53], params, position, need=("kept",))
    found = merge_shards(parts, params, position, need=("kept",))
    assert_equal(found, sample(x, params, position, need=("kept",)))
    assert found.kept[0].diff().tolist() == [3] * 40, "of what top-k leaves 0.6 would keep two"


def test_padding_the_vocabulary_changes_nothing() -> None:
    x = torch.randn(30, 100, generator=torch.Generator().manual_seed(3))
    wide = torch.cat([x, torch.full((30, 28), -torch.inf)], 1)
    for params in (
        SamplingParams(seed=4),
        SamplingParams(seed=4, top_k=7),
        SamplingParams(seed=4, top_p=0.8),
    ):
        parts = split(wide, [0, 64, 128], params, torch.arange(30))
        assert_equal(merge_shards(parts, params, torch.arange(30)), sample(x, params, torch.arange(30)))


def test_shards_that_send_too_little_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two saboteurs: a k that is one too small, and noise by the place in the shard instead of by the id."""
    x = torch.randn(400, 200, generator=torch.Generator().manual_seed(5))
    position = torch.arange(400)
    cuts = [0, 100, 200]
    params = SamplingParams(seed=6, top_k=3)
    whole = sample(x, params, position).tokens
    assert torch.equal(merge_shards(split(x, cuts, params, position), params, position).tokens, whole)
    call = split(x, cuts, params, position)[0].call
    fewer = split(x, cuts, SamplingParams(seed=6, top_k=2), position)
    fewer = [dataclasses.replace(part, call=call) for part in fewer]
    assert not torch.equal(merge_shards(fewer, params, position).tokens, whole)
    params = SamplingParams(seed=6)
    whole = sample(x, params, position).tokens
    assert torch.equal(merge_shards(split(x, cuts, params, position), params, position).tokens, whole)
    right = shards._scores_that_count
    monkeypatch.setattr(shards, "_scores_that_count", lambda x, t, draw, begin: right(x, t, draw, 0))
    found = merge_shards(split(x, cuts, params, position), params, position).tokens
    assert not torch.equal(found, whole)


def test_scores_that_are_near_are_left_to_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ids of one score do not come by themselves: a wide margin stands for them."""
    x = torch.randn(50, 60, generator=torch.Generator().manual_seed(8)) * 2
    x[7] = -torch.inf
    x[8, :31] = torch.nan
    position, params = torch.arange(50), SamplingParams(seed=3, temperature=0.8)
    sent = []
    for margin in (1e-9, 0.5, 1e9):
        monkeypatch.setattr(shards, "MARGIN", margin)
        parts = split(x, [0, 31, 60], params, position)
        sent.append(sum(part.ids.numel() for part in parts))
        found = merge_shards(parts, params, position, on_bad_row="flag")
        assert_equal(found, sample(x, params, position, on_bad_row="flag"))
    assert sent[0] < sent[1] < sent[2] == int((x != -torch.inf).sum())


@pytest.mark.skipif(dispatch.native is None, reason="no native kernels: the reference draws by torch")
def test_a_shard_computes_the_noise_of_two_ids_a_row_and_not_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    right = shards.gumbel

    def counted(ids: torch.Tensor, *more: Any) -> torch.Tensor:
        asked.append(ids.numel())
        return right(ids, *more)

    monkeypatch.setattr(shards, "gumbel", counted)
    x = torch.randn(20, 3000, generator=torch.Generator().manual_seed(2))
    shard_candidates(x, SamplingParams(seed=1), torch.arange(20), begin=5, vocabulary=4000)
    assert sum(asked) == 40


def test_no_rows_and_empty_shards_are_served() -> None:
    x, params = torch.zeros(0, 8), SamplingParams(seed=0)
    assert merge_shards(split(x, [0, 3, 3, 8], params, 0), params, 0).tokens.shape == (0,)


def test_a_merge_of_another_call_is_refused() -> None:
    """What a shard left out was decided by its settings and coordinates; others would draw amiss."""
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(7))
    params = [SamplingParams(seed=i, top_k=k) for i, k in enumerate((3, None, 9))]
    parts = split(x, [0, 32, 64], params, 4)
    one_a_row = (torch.full((3,), 4), torch.zeros(3, dtype=torch.int64))
    sent = pickle.loads(pickle.dumps(parts))
    for position, completion in ((4, 0), one_a_row, ([4, 4, 4], [0, 0, 0])):
        found = merge_shards(sent, params, position, completion=completion)
        assert torch.equal(found.tokens, sample(x, params, 4).tokens)
    others = [
        (params[::-1], 4, 0),
        (SamplingParams(seed=0, top_k=3), 4, 0),
        (params, 5, 0),
        (params, [4, 4, 5], 0),
        (params, 4, 1),
    ]
    for settings, position, completion in others:
        with pytest.raises(RequestError, match="must be those that every shard was given"):
            merge_shards(parts, settings, position, completion=completion)
    with pytest.raises(RequestError, match="must be those that every shard was given"):
        merge_shards([parts[0], *split(x, [32, 64], params, 5)], params, 4)
    with pytest.raises(ShapeError, match="one a row, 3; got 2"):
        merge_shards(parts, params[:2], 4)
    with pytest.raises(RequestError, match="must be those that every shard was given"):
        merge_shards(iter(parts), iter(params[::-1]), 4)
    assert torch.equal(merge_shards(iter(parts), iter(params), 4).tokens, sample(x, params, 4).tokens)


def test_a_merge_of_another_history_or_mask_is_refused() -> None:
    x = torch.tensor([[4.0, 3.0, 2.5, 0.0]])
    params = SamplingParams(seed=0, top_k=2, repetition_penalty=2.0)
    past, mask = ([0], [0, 1], [0]), torch.tensor([[0b0111]], dtype=torch.int32)
    parts = split(x, [0, 2, 4], params, 0, history=past, allowed_mask=mask)
    found = merge_shards(parts, params, 0, history=past, allowed_mask=mask)
    assert torch.equal(found.tokens, sample(x, params, 0, history=past, allowed_mask=mask).tokens)
    for other, words in (
        (([3], [0, 1], [0]), mask),
        (([0, 0], [0, 2], [0]), mask),
        (past, mask - 1),
        (past, None),
    ):
        with pytest.raises(RequestError, match="must be those that every shard was given"):
            merge_shards(parts, params, 0, history=other, allowed_mask=words)


def test_a_shard_of_logits_with_a_graph_sends_none() -> None:
    x = torch.zeros(1, 8, requires_grad=True)
    assert not shard_candidates(x, SamplingParams(seed=0), 0, begin=0, vocabulary=8).logits.requires_grad


def test_what_does_not_fit_is_an_error() -> None:
    x, params = torch.zeros(2, 8), SamplingParams(seed=0, top_k=3)
    parts = split(x, [0, 4, 8], params, 0)
    with pytest.raises(ShapeError, match=r"cover the ids \[0, 8\) once each; got \[0, 4\)"):
        merge_shards(parts[:1], params, 0)
    with pytest.raises(ShapeError, match="cover the ids"):
        merge_shards([*parts, parts[0]], params, 0)
    with pytest.raises(ShapeError, match="got none"):
        merge_shards([], params, 0)
    with pytest.raises(ShapeError, match="what shard_candidates returned; got Tensor"):
        merge_shards([x, x], params, 0)  # type: ignore[list-item]
    with pytest.raises(ShapeError, match=r"begin must be an integer; got 0\.0"):
        shard_candidates(x, params, 0, begin=0.0, vocabulary=8)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="same rows"):
        merge_shards([parts[0], *split(x[:1], [4, 8], params, 0, vocabulary=8)][:2], params, 0)
    with pytest.raises(ConfigError, match="raw_logprob needs what the shards did not send"):
        merge_shards(parts, params, 0, need=("raw_logprob",))
    with pytest.raises(ShapeError, match=r"of one type; got torch.float32 and torch.float64"):
        merge_shards([parts[0], *split(x.double(), [4, 8], params, 0, vocabulary=8)], params, 0)
    with pytest.raises(ShapeError, match=r"16, 32 or 64 bits; .* of torch\.float8_e4m3fn"):
        shard_candidates(x.to(torch.float8_e4m3fn), params, 0, begin=0, vocabulary=8)
    with pytest.raises(RequestError, match="must have a seed"):
        shard_candidates(x, SamplingParams(), 0, begin=0, vocabulary=8)
    with pytest.raises(ShapeError, match="must lie in the vocabulary"):
        shard_candidates(x, params, 0, begin=1, vocabulary=8)
    with pytest.raises(ShapeError, match="one a row, 2; got 3"):
        shard_candidates(x, [params] * 3, 0, begin=0, vocabulary=8)
    with pytest.raises(RequestError, match=r"\[0, 8\), .* got banned_tokens of row 0 with 9"):
        shard_candidates(x, SamplingParams(seed=0, banned_tokens=[9]), 0, begin=0, vocabulary=8)
    with pytest.raises(RequestError, match="row 0 has NaN"):
        merge_shards(split(x * torch.nan, [0, 4, 8], params, 0), params, 0)
