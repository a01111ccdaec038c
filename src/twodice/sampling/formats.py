"""Settings in other people's files and requests: ``generation_config.json``, OpenAI-style fields.

The file knows their names and their neutral values; ranges are those of ``fields``. It loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from twodice.errors import ConfigError, nearest
from twodice.sampling.fields import FIELDS, is_off, token_ids
from twodice.sampling.params import SamplingParams

GENERATION: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
}
"""Settings that ``generation_config.json`` has, and what stands there for "off"; None is not written.

transformers reads a missing field as *its* default (top_k = 50), so neutral values are spelled out.
"""

# Ours that stand there in other words: see `_words`.
_FROM_WORDS = ("banned_tokens", "logit_bias", "min_tokens", "stop_tokens")

# Fields of transformers' GenerationConfig that change which token is drawn and that we do not serve, with
# their neutral values.
_UNSERVED: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "force_words_ids": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "diversity_penalty": 0.0,
    "constraints": None,
    "dola_layers": None,
    "token_healing": False,
    "forced_decoder_ids": None,
}

# The other fields of GenerationConfig: how long a text is, what is returned, how fast it comes.
_NO_CHOICE = frozenset(
    "do_sample eos_token_id suppress_tokens bad_words_ids sequence_bias min_new_tokens max_length "
    "max_new_tokens max_time stop_strings early_stopping length_penalty num_return_sequences bos_token_id "
    "pad_token_id decoder_start_token_id use_cache cache_implementation cache_config max_cache_len "
    "return_legacy_cache prefill_chunk_size low_memory compile_config disable_compile "
    "continuous_batching_config output_attentions output_hidden_states output_scores output_logits "
    "return_dict_in_generate remove_invalid_values renormalize_logits is_assistant num_assistant_tokens "
    "num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit "
    "assistant_ensemble_weight assistant_lookbehind target_lookbehind prompt_lookup_num_tokens "
    "max_matching_ngram_size speculation_type use_mtp transformers_version".split()
)


def from_generation_config(config: Mapping[str, Any] | Any, *, seed: int | None = None) -> SamplingParams:
    """Read the sampling fields of a ``generation_config.json`` (a mapping, or transformers' object).

    ``do_sample`` false, also where it is missing, means temperature 0. A missing or null ``top_k`` is *off*
    here: what is not written is not guessed. ``suppress_tokens`` and ``bad_words_ids`` of one id each are
    `banned_tokens`, ``sequence_bias`` of one id each is `logit_bias`, ``min_new_tokens`` with
    ``eos_token_id`` is `min_tokens` with `stop_tokens`. Fields that are not about the choice of a token
    (lengths, special tokens) are none of our business; a field that changes the choice and that we cannot
    serve is an error.

    Raises
    ------
    ConfigError
        If a field is unknown (with the nearest name), a value is out of range, or the config asks for beams,
        for words of several tokens, or for another stage that is not there; if it samples at temperature 0.
    """
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise ConfigError(f"generation_config must be a mapping, or transformers' object; got {config!r}")
    mapping: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    # Arrays and their scalars as lists and numbers, which the file itself would have.
    mapping = {
        str(name): value.tolist() if hasattr(value, "tolist") else value for name, value in mapping.items()
    }
    known = _NO_CHOICE.union(GENERATION, _UNSERVED)
    for name in mapping:
        if name not in known and not name.startswith("_"):  # transformers' own marks begin so
            raise ConfigError(
                f"unknown field of generation_config {name!r}{nearest(name, known)}; remove it if it "
                "does not change which token is drawn"
            )
    unserved = {
        name: mapping[name]
        for name, neutral in _UNSERVED.items()
        if mapping.get(name) not in (None, neutral, [], (), {})
    }
    if unserved:
        raise ConfigError(f"generation_config asks for {unserved}, which twodice does not serve; remove it")
    found = {name: mapping[name] for name in GENERATION if mapping.get(name) is not None}
    do_sample = mapping.get("do_sample")
    if do_sample not in (None, True, False):
        raise ConfigError(f"do_sample must be true, false or null; got {do_sample!r}")
    if not do_sample:
        found["temperature"] = 0.0
    elif found.get("temperature") == 0:
        raise ConfigError("do_sample asks for a draw and temperature=0 for none; drop one of the two")
    found |= _words(mapping)
    return SamplingParams(**found, seed=seed)


def _words(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Bans, biases and a least length in our own names."""
    found: dict[str, Any] = {}
    eos = mapping.get("eos_token_id")
    ends = [] if eos is None else eos if isinstance(eos, list | tuple) else [eos]
    suppressed = mapping.get("suppress_tokens")
    banned = set(token_ids("banned_tokens", suppressed) if suppressed else ())
    # transformers leaves the end token out of its bad words: a text could not end
    words = mapping.get("bad_words_ids") or ()
    if not isinstance(words, list | tuple):
        raise ConfigError(f"bad_words_ids must be a list of words, each a list of ids; got {words!r}")
    banned |= {_one("bad_words_ids", word) for word in words} - {end for end in ends if isinstance(end, int)}
    if banned:
        found["banned_tokens"] = token_ids("banned_tokens", banned)
    bias = mapping.get("sequence_bias")
    if bias:
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        try:
            found["logit_bias"] = {_one("sequence_bias", words): add for words, add in pairs}
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"sequence_bias must be pairs of ids and a number; got {bias!r}") from None
    if mapping.get("min_new_tokens"):
        if not ends:
            raise ConfigError(
                f"min_new_tokens={mapping['min_new_tokens']} holds eos_token_id back, and there is none; "
                "give it, or drop min_new_tokens"
            )
        found |= {"min_tokens": mapping["min_new_tokens"], "stop_tokens": ends}
    return found


def _one(name: str, word: Any) -> int:
    """The id of a word of one token."""
    if not isinstance(word, int | list | tuple):
        raise ConfigError(f"{name} must name words, each a list of ids; got {word!r}")
    ids = (word,) if isinstance(word, int) else tuple(word)
    if len(ids) != 1:
        raise ConfigError(
            f"{name} may name words of one token here; got {word!r}, of {len(ids)}: drop it, or pass it to "
            "the engine that serves it"
        )
    return ids[0]  # type: ignore[no-any-return]


def to_generation_config(params: SamplingParams) -> dict[str, Any]:
    """Return every sampling field of ``generation_config.json``, neutral values spelled out.

    Raises
    ------
    ConfigError
        If a setting has no place in that file (XTC, a profile, ...). The seed is left out: it belongs to a
        request.
    """
    for name in FIELDS:
        served = name in GENERATION or name in _FROM_WORDS or name == "seed"
        if not served and not is_off(name, getattr(params, name)):
            raise ConfigError(
                f"{name} has no place in generation_config.json; drop it there and give it per request"
            )
    written: dict[str, Any] = {"do_sample": not params.greedy}
    for name, neutral in GENERATION.items():
        value = getattr(params, name)
        if is_off(name, value) or (name == "temperature" and params.greedy):
            value = neutral
        if value is not None:
            written[name] = value
    bias: Any = params.logit_bias or ()
    # -inf is a ban, and no JSON
    banned = {*(params.banned_tokens or ()), *(id for id, add in bias if add == -math.inf)}
    if banned:
        written["suppress_tokens"] = sorted(banned)
    finite = [[[id], add] for id, add in bias if add > -math.inf]
    if finite:
        written["sequence_bias"] = finite
    if params.min_tokens:
        assert params.stop_tokens is not None, "checked at birth"
        written |= {"min_new_tokens": params.min_tokens, "eos_token_id": list(params.stop_tokens)}
    return written


# Fields of an OpenAI-style request by their names here, with the intervals of that API where they are
# narrower than ours.
_OPENAI = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "logit_bias": (-100.0, 100.0),
    "seed": None,
}
_EXTENSIONS = {
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "typical_p": "typical_p",
    "min_tokens": "min_tokens",
    "stop_token_ids": "stop_tokens",
    "allowed_token_ids": "allowed_tokens",
}
"""Fields that vLLM, SGLang and other servers add, and the settings that they are here."""

_OTHER_BUSINESS = frozenset(
    "model messages prompt input suffix echo n best_of stop stream stream_options max_tokens "
    "max_completion_tokens max_output_tokens logprobs top_logprobs user metadata store service_tier "
    "safety_identifier prompt_cache_key parallel_tool_calls ignore_eos skip_special_tokens".split()
)
"""Fields of a request that say nothing about the choice of a token among logits: the server's business."""

_UNSERVED_BY_OPENAI: dict[str, Any] = dict.fromkeys(
    "reasoning_effort audio prediction verbosity guided_json guided_regex guided_choice guided_grammar "
    "structured_outputs".split()
) | {
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "modalities": ["text"],
    "use_beam_search": False,
    "length_penalty": 1.0,
    "bad_words": [],
}
"""Fields that change which tokens can come and that a sampler alone does not serve, with the value that asks
for nothing: clients send it unasked."""


def from_openai(request: Mapping[str, Any]) -> SamplingParams:
    """Read the sampling fields of an OpenAI-style request (completions or chat).

    Served: temperature, top_p, presence_penalty, frequency_penalty, logit_bias (names of ids as text), seed,
    and the extensions top_k, min_p, repetition_penalty, typical_p, min_tokens with stop_token_ids,
    allowed_token_ids. Null is absent. What says nothing about the choice of a token (messages, max_tokens, n,
    stop, logprobs, ...) is passed over: it is the server's, which must read it, ``n`` too: completions of one
    request differ by the `completion` given to `sample`. What changes the choice and is not served (tools, a
    response format, a grammar) is an error, unless its value asks for nothing (no tools, format text).

    Raises
    ------
    ConfigError
        If a field is unknown (with the nearest name), not served, or out of the interval of the API.
    """
    if not isinstance(request, Mapping):
        raise ConfigError(f"a request must map names of fields to values; got {request!r}")
    found: dict[str, Any] = {}
    for name, value in request.items():
        if name in _OTHER_BUSINESS or value is None:
            if name not in _KNOWN:
                raise _unknown(name)
        elif name in _UNSERVED_BY_OPENAI:
            if value == _UNSERVED_BY_OPENAI[name]:
                continue
            raise ConfigError(
                f"{name} changes which tokens can come, and a sampler does not serve it; got {value!r}: give "
                "`sample` an allowed_mask, or drop it"
            )
        elif name in _OPENAI:
            found[name] = value
        elif name in _EXTENSIONS:
            found[_EXTENSIONS[name]] = value
        else:
            raise _unknown(name)
    if "min_tokens" not in found:  # there it ends a text, here it only says what min_tokens holds back
        found.pop("stop_tokens", None)
    params = SamplingParams(**found)
    _check_openai(params)
    return params


_KNOWN = _OTHER_BUSINESS.union(_UNSERVED_BY_OPENAI, _OPENAI, _EXTENSIONS)


def _unknown(name: Any) -> ConfigError:
    return ConfigError(
        f"unknown field of a request {name!r}{nearest(str(name), _KNOWN)}; sampling has "
        f"{', '.join([*_OPENAI, *_EXTENSIONS])}"
    )


def _check_openai(params: SamplingParams) -> None:
    for name, bounds in _OPENAI.items():
        value = getattr(params, name)
        if bounds is None or value is None:
            continue
        low, high = bounds
        for one in (add for _, add in value) if name == "logit_bias" else (value,):
            if not low <= one <= high:
                raise ConfigError(
                    f"{name} of a request must be in [{low:g}, {high:g}]; got {one!r} ({FIELDS[name].help})"
                )


def to_openai(params: SamplingParams) -> dict[str, Any]:
    """Return the settings as fields of an OpenAI-style request; what is off is left out.

    The temperature is always there: servers differ in what they take a missing one for.

    Raises
    ------
    ConfigError
        If a setting has no field there, or a value is out of the interval of the API.
    """
    names = {name: name for name in _OPENAI} | {ours: theirs for theirs, ours in _EXTENSIONS.items()}
    _check_openai(params)
    written: dict[str, Any] = {"temperature": params.temperature}
    for name in FIELDS:
        value = getattr(params, name)
        # There stop_token_ids end a text; without min_tokens ours do nothing.
        if is_off(name, value) or (name == "stop_tokens" and not params.min_tokens):
            continue
        if name not in names:
            raise ConfigError(f"{name} has no field in an OpenAI-style request; drop it")
        if name == "logit_bias":
            value = {str(id): add for id, add in value}
        written[names[name]] = list(value) if isinstance(value, tuple) else value
    return written
