"""`translate`: what matches best in another engine, and a sentence for each thing that does not."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import sampling_rows
from tests.support.sampling_rows import row

import twodice
from twodice.errors import ConfigError
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample
from twodice.sampling.translate import ENGINES, OURS, WHOLE


def said(settings: dict[str, Any], from_: str, to: str) -> tuple[SamplingParams, str]:
    found = twodice.translate(SamplingParams(**settings), from_=from_, to=to)
    assert str(found).count("\n- ") == len(found.differences)
    return found.params, " ".join(found.differences)


@pytest.mark.parametrize(
    ("from_", "to", "settings", "words"),
    [
        (OURS, "vllm", {"xtc_probability": 0.5, "xtc_threshold": 0.2}, "xtc_probability is dropped: vllm"),
        ("vllm", "llama.cpp", {"temperature": 0.7, "top_p": 0.9},
         "llama.cpp after it, and both are set: the top_p that would keep the same tokens is not"),
        ("hf", "vllm", {"min_p": 0.1, "top_p": 0.9}, "hf runs top_p before min_p, vllm after it"),
        ("hf", OURS, {"top_k": 5}, "hf keeps every token that ties with the k-th, twodice exactly top_k"),
        ("vllm", "sglang", {"top_k": 5, "top_p": 0.9}, "sglang counts top_p over all tokens"),
        ("vllm", "sglang", {"top_p": 0.9}, "sglang keeps one token more where"),
        ("llama.cpp", "hf", {"top_p": 0.9}, "hf keeps the higher ids of a tie that top_p cuts"),
        ("vllm", "llama.cpp", {"presence_penalty": 0.5}, "presence_penalty in llama.cpp counts the"),
        ("llama.cpp", "vllm", {"repetition_penalty": 1.1}, "not at the last 64 tokens"),
        ("llama.cpp", "vllm", {"temperature": 0.004}, "vllm raises it to 0.01"),
        ("llama.cpp", "vllm", {"temperature": 1e-6}, "takes the most probable token below 1e-05"),
        (OURS, "vllm", {"presence_penalty": 3.0}, r"presence_penalty is brought into [-2, 2]"),
        (OURS, "sglang", {"top_p": 0.0}, "is top_k of 1"),
        ("vllm", "sglang", {"repetition_penalty": 1.1}, "in sglang looks at the text alone, in vllm at the"),
        ("sglang", "hf", {"repetition_penalty": 1.1, "logit_bias": {1: 2.0}}, "in hf before it"),
        (OURS, "sglang", {"temperature": 1e-7}, "sglang takes the most probable token below 1e-06"),
        (OURS, "hf", {"top_h": 0.0}, "top_h of 0, which hf refuses, is top_h of 1e-09"),
        (OURS, "hf", {"typical_p": 0.0}, "typical_p of 0, which hf refuses, is typical_p of 1e-09"),
        (OURS, "llama.cpp", {"top_n_sigma": 0.0}, "top_n_sigma of 0, which llama.cpp takes for off, is"),
        ("llama.cpp", "vllm", {"top_n_sigma": 0.0}, "top_n_sigma of 0 is dropped: llama.cpp takes"),
        (OURS, "llama.cpp", {"xtc_probability": 0.5, "xtc_by_expectation": True},
         "is dropped: llama.cpp throws"),
        (OURS, "llama.cpp", {"dry_multiplier": 0.8}, "no sequence breakers: llama.cpp has"),
        (OURS, "hf", {"dynatemp_range": 0.3, "min_p": 0.1}, "dynatemp_range is dropped: hf has none"),
        ("llama.cpp", "hf", {"dynatemp_range": 0.3, "min_p": 0.1}, "dynatemp_range is dropped: hf has none"),
        (OURS, "llama.cpp", {"mirostat_tau": 5.0, "top_k": 40}, "top_k is dropped: llama.cpp ignores it"),
        (OURS, "hf", {"top_h": 0.5}, "100 most probable tokens"),
        (OURS, "llama.cpp", {"typical_p": 0.5}, "cuts ties in typical_p by its sort"),
        (OURS, "hf", {}, "Say top_k 0: hf has top_k 50 where nothing is said"),
        (OURS, "llama.cpp", {"top_k": 3}, "Say temperature 1, top_p 1, min_p 0: llama.cpp has "),
        (OURS, "llama.cpp", {"dynatemp_range": 0.3, "top_k": 5}, "a temperature that moves counts"),
        ("llama.cpp", "hf", {"temperature": 0.0, "typical_p": 0.6}, "typical_p before temperature=0"),
        (OURS, "hf", {"epsilon_cutoff": 0.1}, "hf keeps all ties with the most probable"),
        ("llama.cpp", "vllm", {"temperature": 1e-6, "min_p": 0.1}, "most probable token below 1e-05"),
        ("vllm", "llama.cpp", {"temperature": 2.0, "min_p": 1e-300}, "min_p is 2.22507e-308"),
        (OURS, "vllm", {"min_tokens": 0, "stop_tokens": [3], "seed": 1}, "The seed names other noise there"),
        (OURS, "vllm", {"seed": 4}, "The seed names other noise there"),
        (OURS, "hf", {"temperature": 0}, "Say do_sample=False: hf refuses a temperature of 0."),
        ("vllm", "hf", {"temperature": 0.0, "top_p": 0.9, "seed": 3}, "Say do_sample=False"),
        ("vllm", "hf", {"temperature": 0.5}, "Say do_sample=True: hf draws nothing where nothing is said."),
        ("vllm", "llama.cpp", {"temperature": 0.004}, "temperature is 0.004: vllm raises it to 0.01."),
        ("vllm", OURS, {"temperature": 1e-7}, "takes the most probable token below 1e-05"),
        ("sglang", "vllm", {"temperature": 1e-8}, "sglang takes the most probable token below 1e-06"),
    ],
)  # fmt: skip
def test_each_difference_has_its_sentence(from_: str, to: str, settings: dict[str, Any], words: str) -> None:
    params, sentences = said(settings, from_, to)
    assert words in sentences
    assert params.profile == (None if to == OURS else to)


def test_nothing_is_said_where_nothing_differs() -> None:
    for settings, from_, to in (
        ({}, OURS, "vllm"),
        ({"temperature": 0.7, "repetition_penalty": 1.2}, "hf", "vllm"),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.9}, "hf", "vllm"),
        ({"temperature": 0.0, "top_p": 0.9, "top_k": 3}, "vllm", "llama.cpp"),
        ({"top_k": 5, "min_p": 0.1}, "hf", "vllm"),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.1}, "llama.cpp", OURS),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.9}, "vllm", "hf"),
        ({"temperature": 0}, "hf", OURS),
    ):
        # transformers draws only where it is told to.
        expected = "Say do_sample=True: hf draws nothing where nothing is said." if to == "hf" else ""
        assert said(settings, from_, to)[1] == expected, (settings, from_, to)


def test_windows_that_act_unasked_are_said() -> None:
    params, sentences = said({"repetition_penalty": 1.1, "dry_multiplier": 0.8}, OURS, "llama.cpp")
    assert params.penalty_range == params.dry_range == WHOLE
    assert "llama.cpp looks at 64 tokens where nothing is said, twodice at all" in sentences
    back, _ = said({"repetition_penalty": 1.1, "dry_multiplier": 0.8}, "llama.cpp", OURS)
    assert back.penalty_range == back.dry_range == 64


@pytest.mark.parametrize("t", [0.4, 1.7])
@pytest.mark.parametrize(("from_", "to"), [("hf", "llama.cpp"), ("llama.cpp", "sglang")])
def test_min_p_across_temperature_keeps_the_same_tokens(from_: str, to: str, t: float) -> None:
    params = SamplingParams(temperature=t, min_p=0.07, seed=1)
    found = twodice.translate(params, from_=from_, to=to).params
    generator = np.random.default_rng(0)
    for _ in range(50):
        x = torch.from_numpy(row(generator, "normal", 60))
        a, b, plain = (
            sample(x, SamplingParams(temperature=t, min_p=m, seed=1, profile=p), 0, need=("kept",)).kept[1]
            for m, p in ((0.07, from_), (found.min_p, to), (0.07, to))
        )
        assert torch.equal(a, b)
    assert not torch.equal(a, plain), "left as it is, min_p would keep others"


def test_whatever_is_said_the_other_engine_takes_it_and_ours_is_the_same_distribution() -> None:
    """Into twodice the order goes along, so that without ties and joint masses nothing is lost."""
    x = torch.from_numpy(row(np.random.default_rng(3), "normal", 80))
    for from_, settings in (
        ("llama.cpp", {"temperature": 1.6, "top_p": 0.8, "min_p": 0.05, "top_k": 30, "typical_p": 0.9}),
        ("hf", {"temperature": 0.6, "top_p": 0.8, "typical_p": 0.7, "top_h": 0.8, "eta_cutoff": 0.01}),
        ("vllm", {"temperature": 1.6, "min_p": 0.1, "top_k": 20, "top_p": 0.7}),
    ):
        params = SamplingParams(**settings, seed=2)  # type: ignore[arg-type]
        found = twodice.translate(params, from_=from_, to=OURS).params
        theirs = sample(x, SamplingParams(**settings, seed=2, profile=from_), 0, need=("kept", "entropy"))  # type: ignore[arg-type]
        ours = sample(x, found, 0, need=("kept", "entropy"))
        assert torch.equal(theirs.kept[1], ours.kept[1]) and torch.equal(theirs.entropy, ours.entropy)
        assert torch.equal(theirs.tokens, ours.tokens)


def test_a_coin_instead_of_the_expectation_leaves_room_for_stages_behind_it() -> None:
    settings = {"xtc_probability": 0.5, "xtc_by_expectation": True, "temperature": 0.7}
    params, sentences = said(settings, OURS, "llama.cpp")
    assert params.xtc_by_expectation is None and params.temperature == 0.7
    assert sentences.count("is dropped") == 1


def test_nothing_of_what_is_dropped_is_said_twice() -> None:
    for to in (OURS, "vllm", "hf"):
        assert said({"top_n_sigma": 0.0}, "llama.cpp", to)[1].count("top_n_sigma") == 1
    assert "breakers" not in said({"dry_multiplier": 0.8, "dry_breakers": [5]}, OURS, "llama.cpp")[1]


def test_where_nothing_is_said_the_other_engine_draws_from_the_same_distribution() -> None:
    """Over adversarial settings, rows and all pairs. Passed over: sentences that say what to say there, and
    those of values that were changed so that all stays the same."""
    generator, compared = np.random.default_rng(5), 0
    for number, to in itertools.product(range(60), ENGINES):
        for params in sampling_rows.settings(number, 6, 40):
            if params.order is not None:
                continue
            from_ = params.profile or OURS
            found = twodice.translate(params, from_=from_, to=to)
            harmless = ("The seed", "Say ", "min_p is ", f"penalty_range is {WHOLE}", f"dry_range is {WHOLE}")
            if any(not sentence.startswith(harmless) for sentence in found.differences):
                continue
            x = torch.from_numpy(row(generator, generator.choice(["normal", "peaked", "ties", "gaps"]), 40))
            history = (generator.integers(5, size=100), [0, 100], [40])
            theirs, ours = (
                sample(
                    x,
                    p,
                    100,
                    history=history,
                    state=[4.0] if "mirostat" in p.stages else None,
                    need=("kept", "entropy"),
                    on_bad_row="flag",
                )
                for p in (params, found.params)
            )
            assert torch.equal(theirs.status, ours.status), (from_, to, params)
            assert set(theirs.kept[1].tolist()) == set(ours.kept[1].tolist()), (from_, to, params)
            torch.testing.assert_close(theirs.entropy, ours.entropy, rtol=1e-9, atol=1e-9, equal_nan=True)
            compared += 1
    assert compared > 400


def test_every_pair_of_engines_takes_everything() -> None:
    everything = {
        "temperature": 0.8, "dynatemp_range": 0.2, "top_n_sigma": 1.5, "top_k": 40, "top_p": 0.9,
        "min_p": 0.05,
        "top_h": 0.9, "typical_p": 0.9, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4, "xtc_probability": 0.5,
        "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5,
        "no_repeat_ngram_size": 3,
        "dry_multiplier": 0.8, "logit_bias": {1: 200.0}, "min_tokens": 2, "stop_tokens": [3], "seed": 1,
    }  # fmt: skip
    for from_ in ENGINES:
        mine = dict(everything)
        while True:
            try:
                params = SamplingParams(**mine, profile=None if from_ == OURS else from_)  # type: ignore[arg-type]
                break
            except ConfigError as error:
                del mine[str(error).split(" has no ")[1].split(";")[0]]
        for to in ENGINES:
            found = twodice.translate(params, from_=from_, to=to)
            assert (found.differences == ()) == (from_ == to), (from_, to)
            assert found.params.logit_bias == ((1, 100.0 if to == "vllm" and from_ != to else 200.0),)
            assert len(set(found.differences)) == len(found.differences)


def test_what_cannot_be_translated_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"to must be one of .*did you mean 'vllm'"):
        twodice.translate(SamplingParams(), from_="hf", to="vlm")
    with pytest.raises(ConfigError, match="params has profile 'vllm' and from_ is 'hf'"):
        twodice.translate(SamplingParams(profile="vllm"), from_="hf", to="sglang")
    with pytest.raises(ConfigError, match="vllm has no xtc_probability"):
        twodice.translate(SamplingParams(xtc_probability=0.5), from_="vllm", to="hf")
