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
    state = sampling_rows.state(number, rows, vocabulary)
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
    found = merge_shards(parts, params, torch.arange(40), history=past)
    assert_equal(found, sample(x, params, torch.arange(40), history=past))


@pytest.mark.parametrize("need", [(), ("rank",), ("raw_logprob",)])
def test_a_filter_that_reads_a_sum_makes_a_shard_send_all_that_lives(need: tuple[str, ...]) -> None:
    x = torch.zeros(1, 10)
    x[0, 3] = -torch.inf
    params = SamplingParams(seed=0, top_p=0.5) if not need else SamplingParams(seed=0)
    assert shard_candidates(x, params, 0, begin=0, vocabulary=10, need=need).ids.numel() == 9


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
    """Two saboteurs: a k that is one too small, and the highest logits without the highest scores."""
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
    monkeypatch.setattr(shards, "MARGIN", -1.0)
    found = merge_shards(split(x, cuts, params, position), params, position).tokens
    assert not torch.equal(found, sample(x, params, position).tokens)


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
    with pytest.raises(RequestError, match="must have a seed"):
        shard_candidates(x, SamplingParams(), 0, begin=0, vocabulary=8)
    with pytest.raises(ShapeError, match="must lie in the vocabulary"):
        shard_candidates(x, params, 0, begin=1, vocabulary=8)
    with pytest.raises(ShapeError, match="one a row, 2; got 3"):
        shard_candidates(x, [params] * 3, 0, begin=0, vocabulary=8)
    with pytest.raises(RequestError, match=r"\[0, 8\); got 9"):
        shard_candidates(x, SamplingParams(seed=0, banned_tokens=[9]), 0, begin=0, vocabulary=8)
    with pytest.raises(RequestError, match="row 0 has NaN"):
        merge_shards(split(x * torch.nan, [0, 4, 8], params, 0), params, 0)
