"""Other people's files and requests: read, written, and refused with the nearest name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from twodice.errors import ConfigError
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample

WORDS = {
    "do_sample": True, "top_k": 0, "suppress_tokens": [4, 2], "bad_words_ids": [[7], [1]],
    "eos_token_id": [1, 9],
    "sequence_bias": [[[3], 2.5], [[5], -1.0]], "min_new_tokens": 4,
}  # fmt: skip


def test_bans_biases_and_a_least_length_of_a_generation_config_are_read() -> None:
    params = SamplingParams.from_generation_config(WORDS)
    assert params.banned_tokens == (2, 4, 7), "an end token is not banned by bad words, as in transformers"
    assert params.logit_bias == ((3, 2.5), (5, -1.0))
    assert (params.min_tokens, params.stop_tokens) == (4, (1, 9))
    assert SamplingParams.from_generation_config(WORDS | {"eos_token_id": 1}).stop_tokens == (1,)
    by_tuple = SamplingParams.from_generation_config({"sequence_bias": {(3,): 2.5}})
    assert by_tuple.logit_bias == ((3, 2.5),)


def test_they_do_what_transformers_does_with_them() -> None:
    x = torch.linspace(-1, 1, 12)[None]
    ids = torch.tensor([[0, 0, 3]])  # a prompt of two and one token of text
    theirs = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor({(3,): 2.5, (5,): -1.0}),
            NoBadWordsLogitsProcessor([[7], [1]], [1, 9]),
            MinNewTokensLengthLogitsProcessor(2, 4, [1, 9]),
            SuppressTokensLogitsProcessor([4, 2]),
        ]
    )(ids, x.clone())[0]
    params = SamplingParams.from_generation_config(WORDS, seed=0)
    found = sample(x, params, 3, history=(ids[0], [0, 3], [2]), need=("kept", "logprob"))
    kept = found.kept[1]
    assert set(kept.tolist()) == set((theirs > -torch.inf).nonzero()[:, 0].tolist())
    assert kept.tolist() == theirs.sort(descending=True).indices[: len(kept)].tolist()
    assert float(found.logprob) == pytest.approx(float(theirs.log_softmax(0)[int(found.tokens)]), abs=1e-6)


def test_what_is_written_is_json_transformers_reads_it_and_it_comes_back() -> None:
    params = SamplingParams.from_generation_config(WORDS)
    written = json.loads(json.dumps(params.to_generation_config(), allow_nan=False))
    back = SamplingParams.from_generation_config(written)
    assert back.to_generation_config() == written and back.banned_tokens == params.banned_tokens
    config = GenerationConfig(**written)
    assert config.suppress_tokens == [2, 4, 7] and config.min_new_tokens == 4
    assert SamplingParams.from_generation_config(config) == back
    banned = SamplingParams(logit_bias={1: -math.inf, 2: 1.0}).to_generation_config()
    assert banned["suppress_tokens"] == [1] and banned["sequence_bias"] == [[[2], 1.0]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bad_words_ids": [[3, 4]]}, r"bad_words_ids may name words of one token here; got \[3, 4\], of 2"),
        ({"sequence_bias": [[[3, 4], 1.0]]}, "sequence_bias may name words of one token"),
        ({"sequence_bias": [3]}, "sequence_bias must be pairs of ids and a number"),
        ({"min_new_tokens": 5}, "min_new_tokens=5 holds eos_token_id back, and there is none"),
        ({"suppress_tokens": [-1]}, "banned_tokens must be in"),
        ({"begin_suppress_tokens": [3]}, "does not serve"),
        ({"watermarking_config": {"bias": 2}}, "does not serve"),
        ({"dola_layers": "high"}, "does not serve"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "num_beams.*does not serve"),
        (
            {"tempreature": 0.5},
            "unknown field of generation_config 'tempreature'; did you mean 'temperature'",
        ),
        ({"do_sample": True, "topk": 5}, "did you mean 'top_k'"),
        ({"do_sample": "false"}, "do_sample must be true, false or null; got 'false'"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0 for none; drop one of the two"),
    ],
)
def test_a_generation_config_that_cannot_be_served_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams.from_generation_config(config)


def test_every_field_of_transformers_is_known_and_null_is_absent() -> None:
    nulls = dict.fromkeys(GenerationConfig().to_dict())
    assert len(nulls) > 60 and SamplingParams.from_generation_config(nulls).greedy
    read = SamplingParams.from_generation_config(
        GenerationConfig(do_sample=True, temperature=0.5, top_k=None)
    )
    assert read == SamplingParams(temperature=0.5)
    noted = {
        "do_sample": True,
        "_from_model_config": True,
        "transformers_version": "5.0",
        "length_penalty": 2.0,
    }
    assert SamplingParams.from_generation_config(noted) == SamplingParams()


REQUEST = {
    "model": "m", "messages": [], "n": 2, "max_tokens": 9, "stop": ["x"], "stream": True,
    "top_logprobs": None, "tools": None, "temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {"50256": -100, "11": 1.5}, "seed": 7, "top_k": 40, "min_p": 0.05,
    "repetition_penalty": 1.1, "min_tokens": 3, "stop_token_ids": [2],
}  # fmt: skip


def test_a_request_is_read_and_comes_back() -> None:
    params = SamplingParams.from_openai(REQUEST)
    assert params == SamplingParams(
        temperature=0.7, top_p=0.9, presence_penalty=0.5, frequency_penalty=-0.5, seed=7, top_k=40,
        min_p=0.05, logit_bias={50256: -100.0, 11: 1.5}, repetition_penalty=1.1, min_tokens=3,
        stop_tokens=[2],
    )  # fmt: skip
    written = json.loads(json.dumps(params.to_openai(), allow_nan=False))
    assert written["logit_bias"] == {"11": 1.5, "50256": -100.0} and written["stop_token_ids"] == [2]
    assert SamplingParams.from_openai(written) == params
    assert SamplingParams.from_openai({}) == SamplingParams()
    assert SamplingParams().to_openai() == {"temperature": 1.0}
    assert SamplingParams.from_openai({"stop_token_ids": [2]}) == SamplingParams(), "the server ends the text"


def test_fields_that_ask_for_nothing_are_passed_over() -> None:
    unasked = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none",
               "use_beam_search": False, "length_penalty": 1, "bad_words": [], "modalities": ["text"],
               "audio": None}  # fmt: skip
    assert SamplingParams.from_openai({"top_p": 0.5, **unasked}) == SamplingParams(top_p=0.5)
    for name, value in (
        ("tool_choice", "auto"),
        ("use_beam_search", True),
        ("modalities", ["text", "audio"]),
    ):
        with pytest.raises(ConfigError, match=f"{name} changes which tokens can come"):
            SamplingParams.from_openai({name: value})


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"topp": 0.9}, "unknown field of a request 'topp'; did you mean 'top_p'"),
        ({"tempreature": None}, "did you mean 'temperature'"),
        ({"temperature": 3}, r"temperature of a request must be in \[0, 2\]; got 3"),
        ({"temperature": "hot"}, "temperature must be a number; got 'hot'"),
        ({"top_p": 1.5}, r"top_p must be in \[0, 1\]; got 1.5"),
        ({"presence_penalty": -2.5}, r"presence_penalty of a request must be in \[-2, 2\]"),
        ({"logit_bias": {"5": 101}}, r"logit_bias of a request must be in \[-100, 100\]; got 101"),
        ({"logit_bias": {"five": 1}}, "logit_bias must map token ids to numbers"),
        ({"response_format": {"type": "json_object"}}, "response_format changes which tokens can come"),
        ({"min_tokens": 3}, "min_tokens holds stop_tokens back, and there are none"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"logit_bias": {"1_0": 1}}, "must be written as 10; got '1_0'"),
        ({"logit_bias": [[5, 1.0], [5, 2.0]]}, "name each token once; got 5 twice"),
    ],
)
def test_a_bad_request_is_refused(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams.from_openai(request_)


def test_a_request_that_is_greedy_has_a_negative_seed_or_an_empty_bias_is_read() -> None:
    asked = {"temperature": 0, "seed": -5, "logit_bias": {}, "top_logprobs": 3, "logprobs": True, "n": 3}
    assert SamplingParams.from_openai(asked) == SamplingParams(temperature=0, seed=-5)
    assert SamplingParams.from_openai({"min_tokens": 0, "stop_token_ids": [2]}).to_openai() == {
        "temperature": 1.0
    }, "stop_token_ids end a text there"


def test_what_a_request_has_no_field_for_is_not_written() -> None:
    with pytest.raises(ConfigError, match="xtc_probability has no field in an OpenAI-style request"):
        SamplingParams(xtc_probability=0.5).to_openai()
    with pytest.raises(ConfigError, match=r"logit_bias of a request must be in \[-100, 100\]; got -inf"):
        SamplingParams(logit_bias={1: -math.inf}).to_openai()
