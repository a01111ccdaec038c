"""Settings: one table of intervals, errors that name field, value and interval, generation_config.json."""

from __future__ import annotations

import math
import pickle

import pytest

from twodice.errors import ConfigError
from twodice.sampling.fields import FIELDS
from twodice.sampling.params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -2),
        ("top_p", 1.2),
        ("top_p", -1e-9), ("min_p", 1.5), ("repetition_penalty", 0.0), ("repetition_penalty", math.inf),
        ("seed", 2**64),
    ],
)  # fmt: skip
def test_a_value_out_of_range_names_field_value_and_interval(name: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{name: value})
    for part in (name, repr(value), FIELDS[name].interval):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"top_k": 2.5}, {"top_p": "0.9"}, {"seed": True}, {"temperature": None}]
)
def test_a_value_of_the_wrong_kind_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SamplingParams(**settings)  # type: ignore[arg-type]


def test_contradictions_say_what_to_drop() -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        SamplingParams(allowed_tokens=[])
    with pytest.raises(ConfigError, match="token id"):
        SamplingParams(allowed_tokens=[-1])
    with pytest.raises(ConfigError, match=r"logit_bias.*at token 3"):
        SamplingParams(logit_bias={3: math.nan})


def test_equal_settings_are_one_key_of_a_dictionary() -> None:
    a = SamplingParams(logit_bias={5: 1.0, 2: -1.0}, allowed_tokens=[5, 2, 2], seed=7)
    b = SamplingParams(logit_bias={2: -1, 5: 1}, allowed_tokens=(2, 5), seed=7)
    assert a == b and hash(a) == hash(b) and len({a, b}) == 1
    assert a.allowed_tokens == (2, 5) and a != SamplingParams(seed=7)


def test_the_hash_of_another_process_does_not_travel_with_pickle() -> None:
    sent = SamplingParams(seed=7)
    object.__setattr__(sent, "_hash", 1)  # as another process may have it
    here = pickle.loads(pickle.dumps(sent))
    assert here == SamplingParams(seed=7) and hash(here) == hash(SamplingParams(seed=7))


def test_settings_print_as_what_is_set_and_read_back() -> None:
    params = SamplingParams(temperature=0.7, top_k=5, min_p=0.0, banned_tokens=[3], profile=None)
    assert repr(params) == "SamplingParams(temperature=0.7, top_k=5, min_p=0.0, banned_tokens=(3,))"
    assert eval(repr(params)) == params and repr(SamplingParams()) == "SamplingParams()"


def test_an_unknown_name_is_an_error_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'top_k'"):
        SamplingParams.parse({"topk": 5})


def test_generation_config_writes_every_value_out_and_reads_it_back() -> None:
    written = SamplingParams(temperature=0.8, min_p=0.05).to_generation_config()
    assert written == {
        "do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.05,
        "repetition_penalty": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
        "no_repeat_ngram_size": 0,
    }  # fmt: skip
    back = SamplingParams.from_generation_config(written, seed=3)
    assert (back.temperature, back.top_k, back.top_p, back.min_p, back.seed) == (0.8, 0, 1.0, 0.05, 3)
    assert SamplingParams.from_generation_config({}).greedy
    assert not SamplingParams(temperature=0).to_generation_config()["do_sample"]


def test_generation_config_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(ConfigError, match="num_beams"):
        SamplingParams.from_generation_config({"num_beams": 4})
    with pytest.raises(ConfigError, match="top_p must be in"):
        SamplingParams.from_generation_config({"do_sample": True, "top_p": 7})
    with pytest.raises(ConfigError, match="xtc_probability has no place"):
        SamplingParams(xtc_probability=0.5).to_generation_config()


def test_transformers_reads_what_we_write() -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(**SamplingParams(top_k=20).to_generation_config())
    assert config.top_k == 20 and config.top_p == 1.0
    assert SamplingParams.from_generation_config(config).top_k == 20
