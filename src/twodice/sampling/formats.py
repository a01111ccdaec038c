"""Settings in other people's files and requests: ``generation_config.json``, OpenAI-style fields.

The file knows their names and their neutral values; ranges are those of ``fields``. It loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twodice.errors import ConfigError
from twodice.sampling.fields import is_off
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

# Fields of transformers' GenerationConfig that change which token is drawn and that we do not serve, with
# their neutral values.
_UNSERVED: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": 0,
}


def from_generation_config(config: Mapping[str, Any] | Any, *, seed: int | None = None) -> SamplingParams:
    """Read the sampling fields of a ``generation_config.json`` (a mapping, or transformers' object).

    ``do_sample`` false, also where it is missing, means temperature 0. A missing or null ``top_k`` is *off*
    here: what is not written is not guessed. Fields that are not about the choice of a token (lengths,
    special tokens) are none of our business; a field that changes the choice and that we cannot serve is an
    error.

    Raises
    ------
    ConfigError
        If a value is out of range, or the config asks for beams or another stage that is not there.
    """
    mapping: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    unserved = {
        name: mapping[name]
        for name, neutral in _UNSERVED.items()
        if mapping.get(name) not in (None, neutral, [], (), {})
    }
    if unserved:
        raise ConfigError(f"generation_config asks for {unserved}, which twodice does not serve; remove it")
    found = {name: mapping[name] for name in GENERATION if mapping.get(name) is not None}
    if not mapping.get("do_sample", False):
        found["temperature"] = 0.0
    return SamplingParams(**found, seed=seed)


def to_generation_config(params: SamplingParams) -> dict[str, Any]:
    """Return every sampling field of ``generation_config.json``, neutral values spelled out.

    Raises
    ------
    ConfigError
        If a setting has no place in that file (logit_bias, XTC, a profile, ...). The seed is left out: it
        belongs to a request.
    """
    from twodice.sampling.fields import FIELDS

    for name in FIELDS:
        if name not in GENERATION and name != "seed" and not is_off(name, getattr(params, name)):
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
    return written
