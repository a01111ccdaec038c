"""`explain`: the figures are those of the draw, in the row's own order, with what each edit moved."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from twodice.errors import ConfigError, RequestError, ShapeError
from twodice.sampling.explain import EDITS, explain
from twodice.sampling.fields import FIELDS
from twodice.sampling.params import SamplingParams
from twodice.sampling.profiles import SWITCH
from twodice.sampling.sample import sample

X = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
PAST = (torch.tensor([5, 9, 7, 5, 9]), torch.tensor([0, 5]), torch.tensor([2]))
EVERY: dict[str, Any] = {
    "temperature": 0.8, "dynatemp_range": 0.3, "top_n_sigma": 2.0, "top_k": 30, "top_p": 0.98, "min_p": 1e-3,
    "top_h": 0.95, "typical_p": 0.97, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3, "xtc_probability": 0.9,
    "xtc_threshold": 0.1, "mirostat_tau": 3.0, "repetition_penalty": 1.2, "presence_penalty": 0.3,
    "frequency_penalty": 0.2, "no_repeat_ngram_size": 3, "dry_multiplier": 0.5,
    "logit_bias": {1: 2.0, 3: -1.0}, "allowed_tokens": range(39), "banned_tokens": [0], "min_tokens": 9,
    "stop_tokens": [8], "seed": 4,
}  # fmt: skip


def naive(values: torch.Tensor) -> float:
    p = values.double().softmax(0)
    return -sum(v * math.log(v) for v in p.tolist() if v > 0)


def test_every_setting_is_an_edit_a_stage_or_a_part_of_one() -> None:
    switches = {*EDITS, *SWITCH.values(), "dynatemp_range"}
    rest = {"order", "profile", "seed"}
    assert all((set(f.needs) or {name}) & switches for name, f in FIELDS.items() if name not in rest)


@pytest.mark.parametrize("position", range(8))
def test_the_figures_are_those_of_the_draw(position: int) -> None:
    params = SamplingParams(**EVERY)
    mask = torch.tensor([[-1, 0b10111111]], dtype=torch.int32)
    given: dict[str, Any] = {"history": PAST, "completion": 2, "allowed_mask": mask}
    found = explain(X, params, position=position, state=4.5, **given)
    need = ("logprob", "raw_logprob", "rank", "kept", "kept_mass", "entropy", "temperature_entropy")
    drawn = sample(X, params, position, need=need, state=[4.5], **given)
    assert drawn.kept is not None
    assert (found.token, found.rank, found.kept) == (
        int(drawn.tokens),
        int(drawn.rank),
        len(drawn.kept[1]),
    )
    assert found.odds == math.exp(float(drawn.logprob))
    assert found.probability == math.exp(float(drawn.raw_logprob))
    assert found.kept_mass == float(drawn.kept_mass) and found.entropy == float(drawn.entropy)
    assert (found.state, found.next_state) == (4.5, float(drawn.state))
    assert found.order == params.stages
    assert [one.name.split("=")[0] for one in found.stages] == [SWITCH[name] for name in params.stages[1:]]
    last = found.stages[-1]
    assert (last.kept, last.mass, last.entropy) == (found.kept, found.kept_mass, found.entropy)
    counts = [35, *(one.kept for one in found.stages)]
    assert [one.removed for one in found.stages] == [
        before - left for before, left in itertools.pairwise(counts)
    ]
    # H at the temperature in force is what `sample` says, so the temperature is the right one.
    # 38 has no bit, 39 is not allowed, 0 is banned, 8 is a stop token, 7 would complete 5 9 7 again.
    after = X.clone().double()
    assert [(e.name.split("=")[0], e.banned) for e in found.edits if e.banned] == [
        ("allowed_mask", 1), ("allowed_tokens: 39 ids", 1), ("banned_tokens: 1 ids", 1), ("min_tokens", 1),
        ("no_repeat_ngram_size", 1),
    ]  # fmt: skip
    for edit in found.edits:
        for token, _, _, value in edit.moved:
            after[token] = value
    after[[38, 39, 0, 8, 7]] = -torch.inf
    assert naive(after / found.temperature) == pytest.approx(float(drawn.temperature_entropy), rel=1e-6)


def test_edits_say_what_they_moved_and_by_how_much() -> None:
    x = torch.tensor([4.0, 1.0, -1.0, 0.0])
    past = (torch.tensor([0, 2, 2]), torch.tensor([0, 3]), torch.tensor([1]))
    params = SamplingParams(
        logit_bias={1: 1.0}, banned_tokens=[3], repetition_penalty=2.0, presence_penalty=0.5, seed=0
    )
    found = explain(x, params, str, history=past)
    bias, banned, repetition, presence = found.edits
    assert (bias.name, bias.moved, bias.banned) == ("logit_bias: 1 ids", ((1, "1", 1.0, 2.0),), 0)
    assert (banned.moved, banned.banned, banned.banned_top[0][:2]) == ((), 1, (3, "3"))
    assert repetition.moved == ((0, "0", 4.0, 2.0), (2, "2", -1.0, -2.0))
    assert presence.moved == ((2, "2", -2.0, -2.5),)
    assert found.model_entropy == pytest.approx(naive(x), rel=1e-9)
    assert found.edited_entropy == pytest.approx(naive(torch.tensor([2.0, 2.0, -2.5])), rel=1e-9)


def test_a_mask_is_told_behind_the_bias() -> None:
    mask = torch.tensor([[0b0101]], dtype=torch.int32)
    params = SamplingParams(logit_bias={1: 3.0, 2: 1.0}, banned_tokens=[2], seed=0)
    bias, masked, banned = explain(torch.zeros(4), params, allowed_mask=mask).edits
    assert (bias.name, masked.name, banned.name) == (
        "logit_bias: 2 ids",
        "allowed_mask",
        "banned_tokens: 1 ids",
    )
    assert [token for token, *_ in bias.moved] == [1, 2] and (masked.banned, banned.banned) == (2, 1)


def test_stages_are_told_in_the_order_of_the_row() -> None:
    settings: dict[str, Any] = {"temperature": 0.5, "top_k": 9, "top_p": 0.7, "min_p": 0.1, "seed": 1}
    own = explain(X, SamplingParams(**settings))
    other = explain(X, SamplingParams(**settings, order=("min_p", "top_p", "temperature", "top_k")))
    theirs = explain(X, SamplingParams(**settings, profile="llama.cpp"))
    assert [s.name for s in own.stages] == ["top_k=9", "top_p=0.7", "min_p=0.1"]
    assert [s.name for s in other.stages] == ["min_p=0.1", "top_p=0.7", "top_k=9"]
    assert theirs.order == ("top_k", "top_p", "min_p", "temperature")
    assert [s.temperature for s in own.stages] == [0.5] * 3
    assert [s.temperature for s in other.stages] == [1.0, 1.0, 0.5]
    assert [s.temperature for s in theirs.stages] == [1.0] * 3 and theirs.temperature == 0.5
    removed = [i for i, _, _ in own.stages[0].removed_top]
    assert removed == X.sort(descending=True).indices[9:14].tolist()


def test_greedy_is_a_stage_that_leaves_one_token() -> None:
    found = explain(X, SamplingParams(temperature=0))
    (only,) = found.stages
    assert (only.name, only.kept, only.removed, found.temperature, found.odds) == (
        "temperature=0.0",
        1,
        39,
        0.0,
        1.0,
    )
    assert found.token == int(X.argmax()) and found.probability == pytest.approx(float(X.softmax(0).max()))


def test_a_row_without_a_seed_is_explained_under_the_one_that_it_was_given() -> None:
    found = explain(X, SamplingParams(top_p=0.9), position=6)
    again = explain(X, SamplingParams(top_p=0.9, seed=found.seed), position=6)
    assert again == found and found.seed < 2**53


def test_it_becomes_json_and_cannot_be_changed() -> None:
    found = explain(X, SamplingParams(**EVERY), str, history=PAST, top=2)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told == found.to_dict() and told["state"]["before"] is None
    assert [s["stage"] for s in told["stages"]] == [s.name for s in found.stages]
    assert len(told["believed"]) == 2 and told["believed"][0]["text"] == str(int(X.argmax()))
    assert max(len(s["removed_top"]) for s in told["stages"]) <= 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.token = 3  # type: ignore[misc]


class Words:
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def decode(self, ids: list[int]) -> str:
        assert ids[0] < self.size
        return f"<{ids[0]}>"


@pytest.mark.parametrize("size", [41, 35, 0])
def test_a_tokenizer_of_another_vocabulary_is_refused(size: int) -> None:
    with pytest.raises(RequestError, match=rf"vocabulary of the logits, 40 tokens .* got one of {size}"):
        explain(X, SamplingParams(seed=0), Words(size))


def test_a_vocabulary_that_the_model_padded_has_tokens_without_text() -> None:
    x = X.clone()
    x[39] = 50.0
    assert explain(x, SamplingParams(seed=0), Words(38)).text == ""
    assert explain(X, SamplingParams(top_k=1, seed=0), Words(40)).text == f"<{int(X.argmax())}>"


def test_a_tokenizer_of_the_package_tokenizers_serves_special_tokens_too() -> None:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(39)}, unk_token="w0"))
    words.add_special_tokens(["</s>"])
    x = X.clone()
    x[39] = 50.0
    assert explain(x, SamplingParams(seed=0), words).text == "</s>"
    assert explain(X, SamplingParams(top_k=1, seed=0), words).text == f"w{int(X.argmax())}"
    with pytest.raises(RequestError, match="got one of 40"):
        explain(torch.zeros(80), SamplingParams(seed=0), words)


class NoSize:
    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: explain(torch.zeros(2, 5), SamplingParams()), ShapeError, r"one row.*got \(2, 5\)"),
        (lambda: explain(torch.zeros(0, 5), SamplingParams()), ShapeError, "one row"),
        (lambda: explain(X, [SamplingParams()]), ConfigError, "one SamplingParams; got list"),  # type: ignore[arg-type]
        (lambda: explain(X, SamplingParams(), 7), ConfigError, "decode"),
        (
            lambda: explain(X, SamplingParams(), NoSize()),
            ConfigError,
            "got NoSize: give a function from an id",
        ),
        (lambda: explain(X, SamplingParams(), top=-1), ConfigError, "top must be"),
        (lambda: explain(X * math.nan, SamplingParams()), RequestError, "NaN"),
        (lambda: explain(X, SamplingParams(min_tokens=1, stop_tokens=[3])), RequestError, "history"),
    ],
)
def test_what_cannot_be_explained_says_why(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
