"""`sample`: the law (a token depends on its own coordinates alone), rules at the edges, statuses, errors."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from twodice.errors import ConfigError, RequestError, ShapeError
from twodice.kernels import dispatch
from twodice.kernels.sampling_settings import NEEDS, Status
from twodice.random.keys import Key
from twodice.sampling.chain import keys_of
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample
from twodice.sampling.speculative import verify


def logits_of(rows: int, vocabulary: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def kept_of(logits: torch.Tensor, params: SamplingParams) -> list[int]:
    found = sample(logits, params, 0, need=("kept",))
    assert found.kept is not None
    return found.kept[1].tolist()


def test_a_state_that_was_a_list_in_between_loses_no_bit() -> None:
    params = SamplingParams(mirostat_tau=2.0, mirostat_eta=0.0, seed=0)
    found = sample(torch.zeros(1, 64), params, 0, state=[6.1])
    assert found.state is not None and found.state.tolist() == [6.1]


def test_what_was_not_asked_for_is_not_printed() -> None:
    x = torch.tensor([[0.0, 9.0]])
    assert repr(sample(x, SamplingParams(temperature=0, seed=5), 0)) == (
        "Sampled(tokens=tensor([1]), status=tensor([0], dtype=torch.int32), seeds=(5,))"
    )
    asked = repr(sample(x, SamplingParams(seed=5, mirostat_tau=2.0), 0, need=("rank",)))
    assert re.findall(r"(\w+)=(?!torch)", asked) == ["tokens", "status", "seeds", "rank", "state"]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (0, "()"),
        (1, "(1000000,)"),
        (8, f"({', '.join(str(10**6 + i) for i in range(8))})"),
        (9, "(1000000, 1000001, 1000002, ..., 1000006, 1000007, 1000008)"),
        (300, "(1000000, 1000001, 1000002, ..., 1000297, 1000298, 1000299)"),
    ],
)
def test_many_seeds_are_printed_as_tensors_are(rows: int, told: str) -> None:
    params = [SamplingParams(seed=10**6 + i) for i in range(rows)]
    found = sample(torch.zeros(rows, 4), params, 0)
    both = verify(torch.zeros(rows, 1, 4), torch.zeros(rows, 0), params, 0)
    for result in (found, both):
        assert f" seeds={told}" in repr(result) and len(result.seeds) == rows


def test_a_loop_gives_back_the_state_when_the_row_that_had_it_has_left() -> None:
    x, plain, moves = torch.zeros(2, 64), SamplingParams(seed=1), SamplingParams(seed=2, mirostat_tau=2.0)
    mixed = sample(x, [plain, moves], 0)
    assert mixed.state is not None and mixed.state.isnan().tolist() == [True, False]
    alone = sample(x[:1], plain, 1, state=mixed.state[:1])
    assert alone.state is None
    again = sample(x[:1], plain, 2, state=alone.state)
    assert torch.equal(again.tokens, sample(x[:1], plain, 2).tokens)


def test_a_seeded_row_gives_the_same_token_alone_among_any_neighbours_and_at_any_place() -> None:
    x = logits_of(24, 300)
    params = [SamplingParams(seed=i, top_k=[None, 5, 50][i % 3], top_p=[None, 0.9][i % 2]) for i in range(24)]
    position = torch.arange(24) * 3
    together = sample(x, params, position).tokens.tolist()
    alone = [int(sample(x[i], params[i], 3 * i).tokens) for i in range(24)]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1)).tolist()
    moved = sample(x[order], [params[i] for i in order], position[order]).tokens.tolist()
    assert together == alone
    assert [together[i] for i in order] == moved


def test_padding_the_vocabulary_changes_no_token() -> None:
    x = logits_of(30, 100)
    wide = torch.cat([x, torch.full((30, 33), -torch.inf)], 1)
    for params in (
        SamplingParams(seed=3),
        SamplingParams(seed=3, top_k=7),
        SamplingParams(seed=3, top_p=0.8),
    ):
        assert torch.equal(
            sample(x, params, torch.arange(30)).tokens, sample(wide, params, torch.arange(30)).tokens
        )


def test_position_completion_and_seed_each_name_another_draw() -> None:
    x = torch.zeros(1, 5000)
    draws = [
        int(sample(x, SamplingParams(seed=seed), position, completion=completion).tokens)
        for seed, position, completion in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]
    ]
    assert len(set(draws)) == 4


def test_a_row_without_a_seed_is_given_one_and_can_be_had_again() -> None:
    x = logits_of(6, 2000, scale=0.1)
    first = sample(x, SamplingParams(top_p=0.9), 4)
    assert len(set(first.seeds)) == 6
    again = sample(x, [SamplingParams(top_p=0.9, seed=s) for s in first.seeds], 4)
    assert torch.equal(first.tokens, again.tokens) and again.seeds == first.seeds
    assert sample(x, SamplingParams(top_p=0.9), 4).seeds != first.seeds


def test_settings_that_only_narrow_keep_the_token_where_they_can() -> None:
    """Coupled draws: a token that survives a narrower filter is still the one drawn."""
    x = logits_of(200, 50)
    position = torch.arange(200)
    wide = sample(x, SamplingParams(seed=5), position, need=("rank",))
    narrow = sample(x, SamplingParams(seed=5, top_k=5), position)
    same = wide.rank < 5
    assert int(same.sum()) > 20
    assert torch.equal(wide.tokens[same], narrow.tokens[same])


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_top_k_keeps_exactly_k_and_of_equals_the_lower_ids(k: int) -> None:
    x = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 2.0]]).bfloat16()
    assert kept_of(x, SamplingParams(top_k=k, seed=0)) == [1, 3, 5, 0, 2, 4][:k]


@pytest.mark.parametrize("k", [None, 0, -1, 6, 7])
def test_top_k_is_off_at_none_zero_minus_one_and_from_the_vocabulary_up(k: int | None) -> None:
    assert len(kept_of(logits_of(1, 6), SamplingParams(top_k=k, seed=0))) == 6


def test_top_p_keeps_the_token_that_crosses_and_reaches_its_mass_exactly() -> None:
    x = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64))
    sizes = [
        len(kept_of(x, SamplingParams(top_p=p, seed=0))) for p in (0.0, 0.4, 0.5, 0.51, 0.75, 0.76, 0.9, 1.0)
    ]
    assert sizes == [1, 1, 1, 2, 2, 3, 4, 4]


def test_top_p_sees_what_top_k_left() -> None:
    x = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64))
    assert len(kept_of(x, SamplingParams(top_p=0.56, seed=0))) == 2
    assert len(kept_of(x, SamplingParams(top_p=0.56, top_k=2, seed=0))) == 1


def test_temperature_comes_before_top_p() -> None:
    x = torch.log(torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64))
    assert len(kept_of(x, SamplingParams(top_p=0.6, temperature=0.25, seed=0))) == 1
    assert len(kept_of(x, SamplingParams(top_p=0.6, temperature=4.0, seed=0))) == 2


def test_min_p_keeps_equality_and_zero_is_off() -> None:
    x = torch.tensor([[0.0, -1.0, -2.0, -torch.inf]])
    assert len(kept_of(x, SamplingParams(min_p=1.0, seed=0))) == 1
    assert len(kept_of(x, SamplingParams(min_p=0.3678, seed=0))) == 2
    assert len(kept_of(x, SamplingParams(min_p=0.0, seed=0))) == 3


def test_temperature_zero_is_the_first_argmax_and_needs_no_seed() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0], [-0.0, 0.0, 0.0]])
    found = sample(x, SamplingParams(temperature=0), 0, need=NEEDS)
    assert found.tokens.tolist() == [1, 0]
    assert (
        found.logprob.tolist() == [0, 0]
        and found.entropy.tolist() == [0, 0]
        and found.kept[0].tolist() == [0, 1, 2]
    )


def test_bias_and_allowed_tokens_choose() -> None:
    x = logits_of(1, 10)
    assert kept_of(x, SamplingParams(allowed_tokens=[7, 2], seed=0)) in ([7, 2], [2, 7])
    assert int(sample(x, SamplingParams(logit_bias={4: 1e6}, seed=0), 0).tokens) == 4
    assert 4 not in kept_of(x, SamplingParams(logit_bias={4: float("-inf")}, seed=0))


@pytest.mark.parametrize(
    ("bad", "status"), [("nan", Status.NAN), ("inf", Status.INFINITE), ("-inf", Status.EMPTY)]
)
def test_a_bad_row_is_an_error_or_a_status_and_never_a_token(bad: str, status: Status) -> None:
    x = logits_of(3, 20)
    x[1, 7 if bad != "-inf" else slice(None)] = float(bad)
    found = sample(x, SamplingParams(seed=0, top_k=3), 0, on_bad_row="flag", need=NEEDS)
    assert found.status.tolist() == [0, status, 0] and int(found.tokens[1]) == -1
    assert bool(found.logprob[1].isnan()) and found.kept[0].tolist() == [0, 3, 3, 6]
    with pytest.raises(RequestError, match="row 1 has"):
        sample(x, SamplingParams(seed=0), 0)


def test_all_allowed_tokens_impossible_is_an_empty_row() -> None:
    x = torch.tensor([[0.0, -torch.inf]])
    assert (
        int(sample(x, SamplingParams(allowed_tokens=[1], seed=0), 0, on_bad_row="flag").status)
        == Status.EMPTY
    )


def test_an_empty_batch_gives_nothing() -> None:
    found = sample(torch.zeros(0, 5), [], 0, need=NEEDS)
    assert found.tokens.shape == (0,) and found.seeds == () and found.kept[0].tolist() == [0]


def test_log_probabilities_agree_with_log_softmax() -> None:
    x = logits_of(20, 60)
    found = sample(x, SamplingParams(temperature=0.7, top_k=9, seed=1), torch.arange(20), need=NEEDS)
    at = found.tokens[:, None]
    raw = x.double().log_softmax(1).gather(1, at)[:, 0]
    warm = (x.double() / 0.7).log_softmax(1)
    kept = torch.full_like(warm, -torch.inf).scatter(1, found.kept[1].view(20, 9), 0.0) + warm
    torch.testing.assert_close(found.raw_logprob, raw, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.temperature_logprob, warm.gather(1, at)[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.logprob, kept.log_softmax(1).gather(1, at)[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.kept_mass, kept.exp().sum(1), rtol=1e-6, atol=1e-6)
    p = kept.softmax(1)
    torch.testing.assert_close(found.entropy, -(p * p.clamp(min=1e-300).log()).sum(1), rtol=1e-6, atol=1e-6)
    assert torch.equal(found.rank, (x > x.gather(1, at)).sum(1))


def test_kept_sets_and_probabilities_are_those_of_transformers_where_the_meanings_agree() -> None:
    """No ties at the cut and no p within rounding of a prefix's mass: there both mean the same."""
    x = logits_of(64, 200)
    history = torch.randint(0, 200, (64, 12), generator=torch.Generator().manual_seed(2))
    flat = (history.reshape(-1), torch.arange(65) * 12, torch.zeros(64, dtype=torch.int64))
    for temperature, k, p, min_p, penalty in [
        (0.7, 20, 1.0, 0.0, 1.0), (1.0, 0, 0.9, 0.0, 1.0), (1.5, 40, 0.8, 0.0, 1.3), (1.0, 0, 1.0, 0.07, 0.8),
        (0.9, 50, 0.95, 0.02, 1.1),
    ]:  # fmt: skip
        chain = LogitsProcessorList(
            [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
        )
        if k:
            chain.append(TopKLogitsWarper(k))
        if p < 1:
            chain.append(TopPLogitsWarper(p))
        if min_p:
            chain.append(MinPLogitsWarper(min_p))
        theirs = chain(history, x.clone())
        params = SamplingParams(
            temperature=temperature, top_k=k, top_p=p, min_p=min_p, repetition_penalty=penalty, seed=1
        )
        ours = sample(x, params, torch.arange(64), history=flat, need=("kept", "logprob"))
        for i in range(64):
            kept = ours.kept[1][ours.kept[0][i] : ours.kept[0][i + 1]]
            assert set(kept.tolist()) == set(theirs[i].isfinite().nonzero()[:, 0].tolist())
        at = theirs.double().log_softmax(1).gather(1, ours.tokens[:, None])[:, 0]
        torch.testing.assert_close(ours.logprob, at, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: sample(x[None], SamplingParams(), 0), ShapeError, "rows, vocabulary"),
        (lambda x: sample(x, [SamplingParams()] * 3, 0), ShapeError, "one a row"),
        (lambda x: sample(x, SamplingParams(), -1), RequestError, r"\[0, 2\^32\)"),
        (lambda x: sample(x, SamplingParams(), [0, 2**32]), RequestError, "position"),
        (lambda x: sample(x, SamplingParams(), [0]), ShapeError, "one a row"),
        (lambda x: sample(x, SamplingParams(), 0, need=("logprobs",)), ConfigError, "did you mean 'logprob'"),
        (lambda x: sample(x, SamplingParams(allowed_tokens=[9]), 0), RequestError, r"in \[0, 9\)"),
        (lambda x: sample(x, SamplingParams(repetition_penalty=2), 0), RequestError, "history"),
        (
            lambda x: sample(x, SamplingParams(repetition_penalty=2), 0, history=([1.5], [0, 1, 1])),
            ShapeError,
            "ids of history must be integers",
        ),
        (lambda x: sample(x, SamplingParams(), 0, on_bad_row="ignore"), ConfigError, "raise"),
    ],
)
def test_calls_that_cannot_be_meant_say_why(call: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(logits_of(2, 9))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("history", "what"),
    [
        ("nonsense", "ids, offsets, prompt_lengths"),
        (([1, 2], [0, 1]), "history must be"),
        (([1, 2], [0, 1, 2], [0]), "prompt_lengths"),
        (([1, 2], [0, 1, 2], [0, 5]), "prompt_lengths"),
    ],
)
def test_a_wrong_history_is_refused_also_where_no_row_is_penalised(history: object, what: str) -> None:
    with pytest.raises(ShapeError, match=what):
        sample(torch.zeros(2, 8), SamplingParams(seed=1), 0, history=history)


def test_keys_of_many_seeds_are_children_by_name_in_both_languages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds = [0, 1, -1, 2**63, 2**64 - 1, -(2**63), *(i * 0x9E3779B97F4A7C15 % 2**64 for i in range(200))]
    wanted = [Key(seed).child("sampling").value for seed in seeds]
    for native in {id(dispatch.native): dispatch.native, 0: None}.values():
        monkeypatch.setattr(dispatch, "native", native)
        assert [key % 2**64 for key in keys_of(seeds).tolist()] == wanted


def test_none_in_a_row_starts_the_state_anew() -> None:
    x = torch.randn(2, 50, generator=torch.Generator().manual_seed(3))
    steered = SamplingParams(mirostat_tau=3.0, seed=1)
    told, held = sample(x, steered, 0, state=[float("nan"), 4.0]), sample(x, steered, 0, state=[None, 4.0])
    assert told.state is not None and held.state is not None
    assert torch.equal(told.tokens, held.tokens) and torch.equal(told.state, held.state)


def test_the_status_is_there_whenever_it_is_read() -> None:
    x = torch.randn(3, 50)
    found = sample(x, SamplingParams(seed=1), 0)
    assert found.status.dtype == torch.int32 and found.status.tolist() == [0, 0, 0]
    assert found.status is found.status and "status=tensor([0, 0, 0]" in repr(found)
    for again in (
        copy.copy(found),
        copy.deepcopy(found),
        pickle.loads(pickle.dumps(sample(x, SamplingParams(seed=1), 0))),
    ):
        assert again.status.tolist() == [0, 0, 0] and again.tokens.equal(found.tokens)
    fresh = sample(x, SamplingParams(seed=1), 0)
    with torch.device("meta"):
        assert fresh.status.device == fresh.tokens.device
    x[1], x[2, 3] = -torch.inf, torch.nan
    found = sample(x, SamplingParams(seed=1), 0, on_bad_row="flag")
    assert found.status.tolist() == [0, 3, 1] and found.tokens[1:].tolist() == [-1, -1]
    with pytest.raises(AttributeError, match="'Sampled' object has no attribute 'statuses'"):
        found.statuses  # type: ignore[attr-defined]  # noqa: B018


def test_settings_that_came_last_are_known_by_what_they_are_and_not_by_where_they_stand() -> None:
    x = torch.randn(2, 60, generator=torch.Generator().manual_seed(0))
    first, other = SamplingParams(seed=1, top_k=1), SamplingParams(seed=1, banned_tokens=x.argmax(1).tolist())
    batch = [first, first]
    assert sample(x, batch, 0).tokens.equal(x.argmax(1))
    batch[1] = other  # the same list
    assert sample(x, batch, 0).tokens[1] == sample(x[1], other, 0).tokens[0]
    assert sample(x, tuple(batch), 0).tokens.equal(sample(x, batch, 0).tokens)
    assert sample(x, [first, first], 0).tokens.equal(x.argmax(1))
