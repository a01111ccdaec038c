"""Bad input is told apart: field, value and interval; which of two settings to drop; what shape must come."""

from __future__ import annotations

import json
import math
import re
import types
from typing import Any

import numpy as np
import pytest
import torch

from twodice.errors import ConfigError, RequestError, ShapeError, TwodiceError
from twodice.sampling.explain import explain
from twodice.sampling.fields import FIELDS
from twodice.sampling.params import SamplingParams
from twodice.sampling.processor import processor
from twodice.sampling.profiles import ORDER, PROFILES, check_order, profile
from twodice.sampling.sample import sample
from twodice.sampling.shards import merge_shards, shard_candidates
from twodice.sampling.speculative import verify
from twodice.sampling.translate import translate

WITH: dict[str, dict[str, Any]] = {
    "dynatemp_exponent": {"dynatemp_range": 0.1}, "xtc_threshold": {"xtc_probability": 0.1},
    "mirostat_eta": {"mirostat_tau": 1.0}, "penalty_range": {"presence_penalty": 0.1},
    "dry_base": {"dry_multiplier": 1.0}, "dry_allowed_length": {"dry_multiplier": 1.0},
    "dry_range": {"dry_multiplier": 1.0}, "dry_breakers": {"dry_multiplier": 1.0},
    "stop_tokens": {"min_tokens": 1}, "min_tokens": {"stop_tokens": [0]},
}  # fmt: skip


def ends(name: str) -> tuple[list[float], list[float]]:
    """Values just inside and just outside of both ends of a field's interval, read from its text."""
    field = FIELDS[name]
    whole = field.kind in (int, "ids")
    inside: list[float] = []
    outside: list[float] = []
    for text, bracket, out in zip(field.interval[1:-1].split(", "), "[]", (-1, 1), strict=True):
        open_end = field.interval[0 if out < 0 else -1] != bracket
        if "inf" in text:
            end = float(text)
            (outside if open_end else inside).append(end)
            continue
        sign, base, power = re.fullmatch(r"(-?)([\de.+-]+)\^?(\d*)", text).groups()  # type: ignore[union-attr]
        end = (int(base) ** int(power) if power else float(base)) * (-1 if sign else 1)
        if whole:
            end = int(end)
            inside.append(end - out if open_end else end)
            outside.append(end if open_end else end + out)
        else:
            inside.append(float(np.nextafter(end, -out * math.inf)) if open_end else end)
            outside.append(end if open_end else float(np.nextafter(end, out * math.inf)))
    return inside, outside


def give(name: str, value: Any) -> SamplingParams:
    kind = FIELDS[name].kind
    part = {3: value} if kind == "bias" else [value] if kind == "ids" else value
    return SamplingParams(**{name: part, **WITH.get(name, {})})


NUMBERS = [name for name, field in FIELDS.items() if field.kind not in (bool, "names")]


@pytest.mark.parametrize("name", NUMBERS)
def test_both_ends_of_every_interval_hold_and_beyond_them_the_error_names_it_all(name: str) -> None:
    inside, outside = ends(name)
    assert len(inside) + len(outside) >= 3
    for value in inside:
        give(name, value)
    for value in [*outside, *([math.nan] if FIELDS[name].kind not in (int, "ids") else [])]:
        with pytest.raises(ConfigError) as caught:
            give(name, value)
        for part in (name, repr(value), FIELDS[name].interval, FIELDS[name].help):
            assert part in str(caught.value)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["1", True, [1], torch.tensor([1, 2]), np.array([1.5, 2.5])])
def test_every_number_refuses_what_is_none(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        give(name, value)


def test_a_truth_is_no_number() -> None:
    with pytest.raises(ConfigError, match="xtc_by_expectation must be true or false; got 1"):
        SamplingParams(xtc_probability=0.5, xtc_by_expectation=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.needs])
def test_a_setting_that_acts_only_with_another_says_with_which(name: str) -> None:
    alone: Any = {bool: True, "ids": [1]}.get(FIELDS[name].kind, 1)
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{name: alone})
    assert " or ".join(FIELDS[name].needs) in str(caught.value) and f"drop {name}" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0, "dynatemp_range": 0.1}, "drop dynatemp_range, or give a temperature"),
        ({"min_tokens": 3}, "give them, or drop min_tokens"),
        ({"allowed_tokens": [1, 2], "banned_tokens": [2, 1, 3]}, "banned_tokens bans every one.*drop one"),
        (
            {"xtc_probability": 0.5, "xtc_by_expectation": True, "mirostat_tau": 1.0},
            "drop it, or drop mirostat_tau",
        ),
        (
            {
                "xtc_probability": 0.5, "xtc_by_expectation": True, "top_k": 3, "order": ("xtc", "top_k"),
            },
            "drop it, or drop top_k",
        ),
        ({"profile": "hf", "order": ORDER}, "drop order, or drop profile"),
        ({"profile": "llama.cpp", "mirostat_tau": 3.0, "top_k": 5}, "ignores top_k.*mirostat_tau.*drop one"),
        ({"order": ("top_p",), "top_k": 5}, "top_k is missing: add it, or drop it"),
        ({"order": ("top_p", "top_k", "top_p")}, "top_p twice: drop one"),
        ({"order": ("topp",)}, "got 'topp'; did you mean 'top_p'"),
        ({"order": ()} | {"temperature": 0.5}, "temperature is missing"),
        ({"profile": "vlm"}, "must be one of hf, vllm.*did you mean 'vllm'"),
        ({"profile": ["hf"]}, r"profile must be one of hf, vllm.*got \['hf'\]"),
        ({"profile": 3}, "profile must be one of hf, vllm.*got 3"),
        ({"order": "top_k"}, "order must be a list of stages.*got 'top_k'"),
        ({"order": 5}, "order must be a list of stages.*got 5"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_say_which_to_drop(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SamplingParams(**settings)


ON: dict[str, dict[str, Any]] = {
    "top_n_sigma": {"top_n_sigma": 1.0}, "top_h": {"top_h": 0.5}, "typical_p": {"typical_p": 0.5},
    "epsilon_cutoff": {"epsilon_cutoff": 0.1}, "eta_cutoff": {"eta_cutoff": 0.1},
    "xtc_probability": {"xtc_probability": 0.5}, "mirostat_tau": {"mirostat_tau": 2.0},
    "dynatemp_range": {"dynatemp_range": 0.2}, "dry_multiplier": {"dry_multiplier": 0.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2}, "presence_penalty": {"presence_penalty": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.1},
}  # fmt: skip
ABSENT = {
    "hf": {"top_n_sigma", "xtc_probability", "mirostat_tau", "dynatemp_range", "dry_multiplier",
           "presence_penalty"},
    "vllm": {"top_n_sigma", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "xtc_probability",
             "mirostat_tau", "dynatemp_range", "dry_multiplier", "no_repeat_ngram_size"},
    "llama.cpp": {"top_h", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size"},
    "sglang": {"top_n_sigma", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "xtc_probability",
               "mirostat_tau", "dynatemp_range", "dry_multiplier", "no_repeat_ngram_size"},
}  # fmt: skip


@pytest.mark.parametrize("engine", PROFILES)
@pytest.mark.parametrize("name", ON)
def test_a_profile_refuses_what_its_engine_does_not_have(engine: str, name: str) -> None:
    if name not in ABSENT[engine]:
        assert SamplingParams(profile=engine, **ON[name]).profile == engine
        return
    with pytest.raises(ConfigError, match=rf"{engine} has no {name}; drop it, or drop profile={engine!r}"):
        SamplingParams(profile=engine, **ON[name])


def test_orders_and_profiles_are_checked_where_they_are_asked_for() -> None:
    assert check_order(["top_k", "xtc"], ["xtc"]) == ("top_k", "xtc")
    with pytest.raises(ConfigError, match="xtc, mirostat is missing"):
        check_order(["top_k"], ["xtc", "mirostat"])
    with pytest.raises(ConfigError, match="did you mean 'sglang'"):
        profile("sg-lang")
    with pytest.raises(ConfigError, match=r"unknown sampling setting 'top_kk'.*'top_k'"):
        SamplingParams.parse({"top_kk": 1})


def test_an_empty_bias_is_none() -> None:
    assert SamplingParams(logit_bias={}) == SamplingParams()


X = torch.zeros(2, 40)
META = X.to("meta")
DRAFTED = torch.zeros(2, 2, 40)
SEEDED = SamplingParams(seed=1)
MIRO = SamplingParams(seed=1, mirostat_tau=3.0)
COUNTS = SamplingParams(frequency_penalty=0.5, seed=1)
PAST = ([1, 2, 3], [0, 1, 3], [0, 1])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        *((lambda call=call, params=params: call(params), ConfigError, "params must be .*" + got)
          for params, got in ((None, "None"), ({"top_k": 1}, "{'top_k': 1}"), ([SEEDED, None], "None"))
          for call in (lambda params: verify(DRAFTED, [[1], [1]], params, 0),
                       lambda params: shard_candidates(X, params, 0, begin=0, vocabulary=40),
                       lambda params: translate(params, from_="hf", to="vllm"))),
        (lambda: SamplingParams.parse(5), ConfigError, "settings must map names to values; got 5"),
        (lambda: SamplingParams.parse({7: 1}), ConfigError, "unknown sampling setting 7"),
        (lambda: SamplingParams.from_openai([1]), ConfigError, r"a request must map .* got \[1\]"),
        (lambda: SamplingParams.from_generation_config("f"), ConfigError, "must be a mapping.*got 'f'"),
        (lambda: SamplingParams.from_generation_config({"suppress_tokens": 5}), ConfigError,
         "banned_tokens must be a list of token ids; got 5"),
        *((lambda name=name, value=value: explain(X[:1], SEEDED, **{name: value}), ConfigError,
           f"{name} must be an integer, for there is one row; got")
          for name in ("position", "completion", "top")
          for value in ([3], None, True, np.True_, torch.tensor(True), 3.0, "3", torch.tensor([3]))),
        (lambda: explain(X[:1], SEEDED, top=-1), ConfigError, "top must be at least 0; got -1"),
        (lambda: explain(X[:1], SEEDED, position=2**32), RequestError, r"in \[0, 2\^32\); got 4294967296"),
        (lambda: explain(X[:1], MIRO, state=True), ShapeError, "state must be .*got torch.bool"),
        *((call, ShapeError, name + r" must have values; .* on the device 'meta'.*: compute it")
          for name, call in (
              ("logits", lambda: sample(META, SEEDED, 0)),
              ("logits", lambda: sample(META, SEEDED, 0, on_bad_row="flag")),
              ("logits", lambda: verify(DRAFTED.to("meta"), [[1], [1]], SEEDED, 0)),
              ("logits", lambda: explain(META[:1], SEEDED)),
              ("logits", lambda: shard_candidates(META, SEEDED, 0, begin=0, vocabulary=40)),
              ("position", lambda: sample(X, SEEDED, META[:, 0])),
              ("state", lambda: sample(X, MIRO, 0, state=META[:, 0])),
              ("the ids of history", lambda: sample(X, COUNTS, 0, history=(META[0], *PAST[1:]))),
              ("attention_mask", lambda: processor(SEEDED, attention_mask=META)))),
        *((call, ShapeError, "logits must be .*; got a list of tensors: torch.stack makes one of them")
          for call in (lambda: sample(list(X), SEEDED, 0),
                       lambda: verify(list(DRAFTED), [[1], [1]], SEEDED, 0),
                       lambda: shard_candidates(list(X), SEEDED, 0, begin=0, vocabulary=40))),
        (lambda: sample(None, SEEDED, 0), ShapeError, "numbers; got None$"),
        *((call, ShapeError, rf"{name} must be an integer or one a row, .* in \[0, 2\^32\); got {got}: give")
          for name, got, call in (
              ("position", "None", lambda: sample(X, SEEDED, None)),
              ("position", "None", lambda: verify(DRAFTED, [[1], [1]], SEEDED, None)),
              ("position", "None", lambda: shard_candidates(X, SEEDED, None, begin=0, vocabulary=40)),
              ("completion", "None", lambda: sample(X, SEEDED, 0, completion=None)),
              ("position", "'3'", lambda: sample(X, SEEDED, "3")))),
        (lambda: sample(X, SEEDED, [10**30, 1]), ShapeError, "position must .*got an integer beyond 64 bits"),
        (lambda: sample(X, SEEDED, np.array([1, 2**63 + 1], np.uint64)), RequestError,
         r"position must be .*, each below 2\^63; got 9223372036854775809"),
        (lambda: sample(types.SimpleNamespace(logits=X), SEEDED, 0), ShapeError,
         r"got SimpleNamespace, what a model returns: give its logits; \.logits\[:, -1\]"),
        *((lambda wrong=wrong: sample(wrong, SEEDED, 0), ShapeError, f"or numbers; got {got}$")
          for wrong, got in (("abc", "str"), ({"a": 1}, "dict"))),
        (lambda: sample(X, SEEDED, 10**5000), RequestError, "position must be .*; got an integer of 16610 b"),
        (lambda: SamplingParams(seed=-(10**5000)), ConfigError, "seed must .*; got an integer of 16610 b"),
        (lambda: SamplingParams(top_p=torch.tensor(0.5, device="meta")), ConfigError,
         "top_p must be a number"),
        (lambda: sample(X, SEEDED, 0, need=np.array(["ranks"])), ConfigError, "did you mean 'rank'"),
        (lambda: sample(X, SEEDED, 0, allowed_mask=[[2**32, 1], [3, 1]]), ShapeError,
         r"words of 32 bits, in \[-2\^31, 2\^32\); got 1 to 4294967296: put bit id % 32 into word"),
        (lambda: sample(X, SEEDED, 0, allowed_mask=[[-(2**31) - 1, 1], [3, 1]]), ShapeError,
         "words of 32 bits, .*got -2147483649 to 1"),
        (lambda: sample(X, SEEDED, 0, allowed_mask=np.ones((2, 1), np.uint64)), ShapeError,
         r"got \(2, 1\) of torch.uint64: .view\(np.int32\) splits words of 64 bits"),
        (lambda: verify(DRAFTED, [[1], [1]], SEEDED, 0, allowed_mask=torch.ones(2, 2, 2)), ShapeError,
         r"must be \(2, 2, 2\) int32.*got \(2, 2, 2\) of torch.float32"),
        *((lambda name=name, config=config: SamplingParams.from_generation_config(config), ConfigError, name)
          for name, config in (
              ("bad_words_ids must be a list of words", {"do_sample": True, "bad_words_ids": 5}),
              ("bad_words_ids must name words", {"do_sample": True, "bad_words_ids": [None]}),
              ("unknown field of generation_config '5'", {5: 1}))),
        (lambda: SamplingParams.from_openai({5: 1}), ConfigError, "unknown field of a request 5"),
        (lambda: SamplingParams(top_p=10**400), ConfigError, r"top_p must be in \[0, 1\]; got an integer of"),
        (lambda: SamplingParams(logit_bias={3: 10**400}), ConfigError,
         r"in \[-inf, 1e30\]; got an integer of 1329 bits"),
        (lambda: sample(X, [SEEDED] * 3, 0), ShapeError, "one a row, 2; got 3"),
        (lambda: sample(X, [], 0), ShapeError, "one a row, 2; got 0"),
        (lambda: sample(torch.zeros(2, 3, 4), SEEDED, 0), ShapeError, r"got \(2, 3, 4\)"),
        (lambda: sample(torch.zeros(2, 0), SEEDED, 0), ShapeError, r"got \(2, 0\)"),
        (lambda: sample(torch.zeros(2, 4).long(), SEEDED, 0), ShapeError, "floats; got .* torch.int64"),
        (lambda: sample(torch.zeros(1, 2**20 + 1), SEEDED, 0), ShapeError, r"at most 2\^20; got 1048577"),
        (lambda: sample(X, SEEDED, [0, 1, 2]), ShapeError,
         r"position must be .*\(2,\) integers; got shape \(3,\)"),
        (lambda: sample(X, SEEDED, 0.5), ShapeError, "position must be an integer"),
        (lambda: sample(X, SEEDED, [0.5, 1.5]), ShapeError, "position must be an integer"),
        (lambda: sample(X, SEEDED, 2**32), RequestError, r"position must be in \[0, 2\^32\); got 4294967296"),
        (lambda: sample(X, SEEDED, 0, completion=-1), RequestError, r"completion must be in .* got -1"),
        (lambda: sample(X, SEEDED, 0, completion=[0]), ShapeError, "completion"),
        (lambda: sample(X, SEEDED, 0, need="ranks"), ConfigError, "did you mean 'rank'"),
        (lambda: sample(X, SEEDED, 0, on_bad_row="skip"), ConfigError, "'raise' or 'flag'; got 'skip'"),
        (lambda: sample(X, SEEDED, 0, allowed_mask=torch.zeros(2, 1, dtype=torch.int32)), ShapeError,
         r"allowed_mask must be \(2, 2\) int32.*got \(2, 1\)"),
        (lambda: sample(X, SEEDED, 0, allowed_mask=torch.zeros(1, 2, dtype=torch.int32)), ShapeError,
         r"got \(1, 2\)"),
        (lambda: sample(X, SEEDED, 0, allowed_mask=torch.ones(2, 2)), ShapeError, "of torch.float32"),
        (lambda: sample(X, MIRO, 0, state=sample(X, MIRO, 0)), ShapeError, "got a Sampled: give its .state"),
        (lambda: sample(X, SEEDED, 0, state=[1.0]), ShapeError, r"state .*\(2,\); got shape \(1,\)"),
        (lambda: sample(X, SEEDED, 0, state=torch.zeros(2, 1)), ShapeError, r"got shape \(2, 1\)"),
        (lambda: sample(X, SEEDED, 0, state=[1.0, math.inf]), RequestError, r"state .*finite.*\[1.0, inf\]"),
        (lambda: verify(DRAFTED, [[1], [1]], SamplingParams(seed=1, mirostat_tau=2), 0, state=[-math.inf, 1]),
         RequestError, "state must be finite"),
        (lambda: sample(X, SEEDED, 0, state=[math.nan, 4.0]), RequestError,
         "row 1 sets no mirostat_tau; got 4.0 there: set it, or give NaN there, or None"),
        (lambda: sample(X, [MIRO, SEEDED], 0, state=[4.0, 5.0]), RequestError,
         "row 1 sets no mirostat_tau; got 5.0 there"),
        (lambda: sample(X, MIRO, 0, state=[True, False]), ShapeError, "got torch.bool"),
        (lambda: verify(DRAFTED, [[1], [1]], SEEDED, 0, state=[math.nan, 4.0]), RequestError,
         "row 1 sets no mirostat_tau; got 4.0 there"),
        (lambda: explain(X[0], SEEDED, position=0, state=4.0), RequestError,
         "row 0 sets no mirostat_tau; got 4.0 there"),
        (lambda: sample(X.to(torch.float8_e5m2), SEEDED, 0), ShapeError, "64-bit floats; .*float8_e5m2"),
        (lambda: sample(X.to_sparse(), SEEDED, 0), ShapeError, r"must be dense; .*sparse_coo: .to_dense\(\)"),
        (lambda: verify(X[None].to_sparse(), [[1]], SEEDED, 0), ShapeError, r"must be dense; .*to_dense\(\)"),
        (lambda: shard_candidates(X.to_sparse(), SEEDED, 0, begin=0, vocabulary=40), ShapeError,
         r"must be dense; .*to_dense\(\)"),
        (lambda: sample(X, SEEDED, 0, allowed_mask=torch.ones(2, 2).to_sparse()), ShapeError,
         r"allowed_mask must be dense"),
        (lambda: sample(X, COUNTS, 0, history=(torch.tensor(PAST[0]).to_sparse(), *PAST[1:])), ShapeError,
         "ids of history must be dense"),
        (lambda: sample(X, COUNTS, 0, history=(torch.tensor(PAST[0]) * 1j, *PAST[1:])), ShapeError,
         "must be integers; got torch.complex64"),
        (lambda: sample(X, MIRO, 0, state=torch.tensor([True, False])), ShapeError,
         "one number a row.*got torch.bool"),
        (lambda: verify(X[None], [[1]], SEEDED, 0, on_bad_row="flagg"), ConfigError, "got 'flagg'"),
        (lambda: merge_shards(None, SEEDED, 0), ShapeError, "shard_candidates returned; got NoneType"),
        (lambda: sample(X, COUNTS, 0), RequestError, "need history"),
        (lambda: sample(X, COUNTS, 0, history=(*PAST[:2], None)), RequestError, "got no prompt_lengths"),
        (lambda: sample(X, COUNTS, 0, history=PAST[:2]), RequestError, "got no prompt_lengths"),
        (lambda: sample(X, COUNTS, 0, history=7), ShapeError, "got int"),
        (lambda: sample(X, COUNTS, 0, history=(["a", "b"], *PAST[1:])), ShapeError, "with text in it, 'a'"),
        (lambda: sample(X, SEEDED, 0, allowed_mask=[None, [1]]), ShapeError, r"must be \(2,\) int32"),
        (lambda: sample(X, COUNTS, 0, history=(*PAST, [0])), ShapeError, "ids, offsets, prompt_lengths"),
        (lambda: sample(X, COUNTS, 0, history=([1, 2, 40], *PAST[1:])), RequestError, "got 1 to 40"),
        (lambda: sample(X, COUNTS, 0, history=([1, -2, 4], *PAST[1:])), RequestError, "got -2 to 4"),
        (lambda: sample(X, COUNTS, 0, history=(PAST[0], [0, 3], PAST[2])), ShapeError, r"offsets \(2,\)"),
        (lambda: sample(X, COUNTS, 0, history=(PAST[0], [0, 2, 1], PAST[2])), ShapeError, "rise from 0 to 3"),
        (lambda: sample(X, COUNTS, 0, history=(PAST[0], [1, 2, 3], PAST[2])), ShapeError, "rise from 0 to 3"),
        (lambda: sample(X, COUNTS, 0, history=(*PAST[:2], [2, 0])), ShapeError, "prompt_lengths"),
        (lambda: sample(X, COUNTS, 0, history=(*PAST[:2], [0])), ShapeError, "prompt_lengths"),
        (lambda: sample(X, SamplingParams(logit_bias={40: 1.0}), 0), RequestError, r"\[0, 40\), .*with 40"),
        (lambda: sample(X, SamplingParams(banned_tokens=range(40)), 0), RequestError,
         r"row 0 has no token left .*1 more rows: \[1\]"),
    ],
)  # fmt: skip
def test_a_call_that_cannot_be_meant_says_what_must_come_and_what_came(
    call: Any, error: type[TwodiceError], words: str
) -> None:
    with pytest.raises(error, match=words):
        call()


def test_a_misspelt_setting_is_told_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"'temprature'; did you mean 'temperature'\?"):
        SamplingParams(temprature=0.8)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(0.8)  # type: ignore[misc]


@pytest.mark.parametrize(
    "settings",
    [
        {"allowed_tokens": [1, 7]}, {"banned_tokens": [7]}, {"logit_bias": {7: 1.0}},
        {"stop_tokens": [7], "min_tokens": 1}, {"dry_multiplier": 1.0, "dry_breakers": [7]},
    ],
)  # fmt: skip
def test_ids_of_another_vocabulary_name_setting_row_and_id(settings: dict[str, Any]) -> None:
    logits = torch.zeros(2, 5)
    field = "dry_breakers" if "dry_breakers" in settings else next(iter(settings))
    with pytest.raises(RequestError, match=rf"\[0, 5\).*{field} with 7"):
        sample(logits, SamplingParams(seed=0, **settings), 0)
    with pytest.raises(RequestError, match=rf"{field} of row 1 with 7"):
        sample(logits, [SamplingParams(seed=0), SamplingParams(seed=0, **settings)], 0)


def test_a_processor_names_what_is_no_settings_and_no_mask() -> None:
    for given in (5, {"top_k": 5}, [{"top_k": 5}], None):
        with pytest.raises(ConfigError, match="params must be one SamplingParams or one a prompt; got"):
            processor(given)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="attention_mask must be a tensor"):
        processor(SamplingParams(), attention_mask="mask")  # type: ignore[arg-type]


def test_need_that_is_no_name_lists_the_names() -> None:
    with pytest.raises(ConfigError, match=r"need names fields of Sampled; got 5; there are .*logprob"):
        sample(torch.zeros(1, 5), SamplingParams(seed=0), 0, need=5)  # type: ignore[arg-type]


SCALARS = [np.int64, np.int32, np.uint64, np.uint8, torch.tensor, np.array]


@pytest.mark.parametrize("make", SCALARS)
def test_an_integer_of_another_library_is_that_integer(make: Any) -> None:
    three, two = make(3), make(2)
    assert sample(X, SEEDED, three, completion=two).tokens.equal(sample(X, SEEDED, 3, completion=2).tokens)
    found = explain(X[0], SEEDED, position=three, completion=two, top=two)
    assert found == explain(X[0], SEEDED, position=3, completion=2, top=2)
    assert json.dumps(found.to_dict()), "Python's own numbers go into the record"
    assert SamplingParams(top_k=three, seed=two) == SamplingParams(top_k=3, seed=2)
    assert processor(SEEDED, n=two, pad_token_id=three)(torch.tensor([[3, 1], [3, 1]]), X).shape == X.shape
    part = shard_candidates(X, SEEDED, three, begin=make(0), vocabulary=make(40))
    assert (type(part.begin), type(part.end), type(part.vocabulary)) == (int, int, int)
    assert merge_shards([part], SEEDED, 3).tokens.equal(sample(X, SEEDED, 3).tokens)


@pytest.mark.parametrize("make", [np.float32, np.float64, torch.tensor, np.array, lambda value: [value]])
def test_a_state_of_one_row_may_be_any_number(make: Any) -> None:
    assert explain(X[0], MIRO, state=make(4.5)) == explain(X[0], MIRO, state=4.5)


def test_a_truth_of_numpy_is_a_truth_and_no_number() -> None:
    params = SamplingParams(xtc_probability=0.5, xtc_by_expectation=np.True_)
    assert params.xtc_by_expectation is True
    for truth in (np.True_, torch.tensor(True)):
        with pytest.raises(ConfigError, match="top_k must be an integer; got"):
            SamplingParams(top_k=truth)


def test_explain_tells_of_a_bad_row_in_words_that_it_has() -> None:
    with pytest.raises(RequestError, match=r"row 0 has NaN among.*nothing to explain") as caught:
        explain(torch.full((5,), torch.nan), SEEDED)
    assert "on_bad_row" not in str(caught.value)


def test_a_mask_may_be_what_engines_and_lists_have() -> None:
    words = [[0x90000003, 0xFF], [0xFFFFFFFF, 1]]
    signed = [[word - 2**32 if word >= 2**31 else word for word in row] for row in words]
    wanted = sample(X, SEEDED, 0, allowed_mask=torch.tensor(signed, dtype=torch.int32), need=("kept",))
    assert wanted.kept is not None and wanted.kept[1][:4].tolist() == [0, 1, 28, 31]
    for mask in (words, signed, np.array(words), np.array(words, np.uint32), np.array(words, np.uint64),
                 np.array(signed, np.int32), torch.tensor(words), torch.tensor(signed)):  # fmt: skip
        found = sample(X, SEEDED, 0, allowed_mask=mask, need=("kept",))
        assert found.kept is not None and found.kept[1].equal(wanted.kept[1])
        assert found.tokens.equal(wanted.tokens)
        both = verify(DRAFTED, [[-1], [-1]], SEEDED, 0, allowed_mask=[[row, row] for row in words])
        assert both.next_tokens.equal(wanted.tokens)


def test_a_row_of_a_mask_that_is_none_is_free() -> None:
    row = torch.tensor([3, 0], dtype=torch.int32)
    mask = torch.stack([torch.full((2,), -1, dtype=torch.int32), row])
    both = [torch.full((1, 2), -1, dtype=torch.int32), row[None]]  # as xgrammar makes them for one request
    for given in ([None, row], [None, [3, 0]], (None, row.numpy()), both, list(mask), list(mask.numpy())):
        found = sample(X, SEEDED, 0, allowed_mask=given, need=("kept",))
        assert found.kept is not None and found.kept[0].tolist() == [0, 40, 42]
        assert found.tokens.equal(sample(X, SEEDED, 0, allowed_mask=mask).tokens)
    one = sample(X[1:], SEEDED, 0, allowed_mask=row[None]).tokens
    for alone in (row, [3, 0], (3, 0), [row], [[3, 0]]):
        assert sample(X[1], SEEDED, 0, allowed_mask=alone).tokens.equal(one)
    assert sample(X[:0], SEEDED, 0, allowed_mask=[]).tokens.shape == (0,)
    places = verify(DRAFTED, [[-1], [-1]], SEEDED, 0, allowed_mask=[[None, row], [row, None]])
    assert places.next_tokens.equal(sample(X, SEEDED, 0, allowed_mask=mask).tokens)
    for wrong, words in (
        (
            [None, [1]],
            r"row 1 of allowed_mask must be \(2,\) int32.*SamplingParams\(allowed_tokens=",
        ),
        ([None], "a list of 1"),
        (mask[:, :1], "got \\(2, 1\\) .* for a vocabulary of 40"),
        ([np.ones(40, bool), None], r"np.packbits\(np.pad\(allowed, \(0, -len\(allowed\) % 32\)\)"),
    ):
        with pytest.raises(ShapeError, match=words):
            sample(X, SEEDED, 0, allowed_mask=wrong)


def test_the_error_for_a_mask_of_truths_says_how_to_pack_it() -> None:
    allowed = np.random.default_rng(0).random((2, 40)) < 0.3
    with pytest.raises(ShapeError, match=r"of torch.bool: of truths `allowed` ") as caught:
        sample(X, SEEDED, 0, allowed_mask=allowed)
    how = re.search(r"`allowed` (.*) makes it$", str(caught.value)).group(1)  # type: ignore[union-attr]
    found = sample(X, SEEDED, 0, allowed_mask=eval(how, {"np": np, "allowed": allowed}), need=("kept",))
    assert found.kept is not None and found.kept[1].tolist() == np.nonzero(allowed)[1].tolist()


def test_a_generation_config_may_hold_arrays() -> None:
    config = {"do_sample": np.True_, "suppress_tokens": np.array([4, 2]), "top_k": np.int64(5)}
    assert SamplingParams.from_generation_config(config) == SamplingParams(top_k=5, banned_tokens=[2, 4])
