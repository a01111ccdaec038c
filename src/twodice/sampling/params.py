"""The settings of the chain: one frozen object, every range as an interval in one table.

`FIELDS` is that table: docs, help texts, checks and ``generation_config.json`` read it. This module knows no
logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from twodice.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Field:
    """What one setting may be: its interval, the value that switches it off, and its help text.

    `generation` is the name in ``generation_config.json``, or None where that file has no such field, and
    `written_neutral` what stands there for "off" (transformers reads a missing field as *its* default, top_k
    = 50).
    """

    name: str
    kind: type
    low: float
    high: float
    open_low: bool
    open_high: bool
    neutral: float | None
    help: str
    generation: str | None
    written_neutral: float | None

    @property
    def interval(self) -> str:
        """The interval in words of mathematics: ``[0, 1]``."""
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"{left}{_short(self.low)}, {_short(self.high)}{right}"

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the interval (NaN does not)."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below


def _short(value: float) -> str:
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == int(value) and abs(value) >= 2**53:
        return f"{'-' if value < 0 else ''}2^{int(math.log2(abs(value)))}"
    return f"{value:g}"


INF = math.inf
FIELDS: dict[str, Field] = {
    field.name: field
    for field in (
        Field("temperature", float, 0, INF, False, True, 1.0,
              "divides the logits; 0 takes the most probable token", "temperature", 1.0),
        Field("top_k", int, -1, 2**53, False, True, 0,
              "keep exactly the k most probable tokens; None, 0 and -1 are off", "top_k", 0),
        Field("top_p", float, 0, 1, False, False, 1.0,
              "keep the shortest run of most probable tokens whose mass reaches p; 0 keeps one, 1 is off",
              "top_p", 1.0),
        Field("min_p", float, 0, 1, False, False, 0.0,
              "keep tokens at least this many times as probable as the most probable; 0 is off",
              "min_p", 0.0),
        Field("repetition_penalty", float, 1e-6, 1e6, False, False, 1.0,
              "tokens of the sequence, prompt included: positive logits are divided by it, others multiplied",
              "repetition_penalty", 1.0),
        Field("logit_bias", float, -INF, 1e30, False, False, None,
              "a number that is added to the logit of each token id named; -inf bans it", None, None),
        Field("allowed_tokens", int, 0, 2**32, False, True, None,
              "the only token ids that may be drawn; None allows all", None, None),
        Field("seed", int, -(2**63), 2**64, False, True, None,
              "names the noise; None takes a new one from the operating system and returns it", None, None),
    )
}  # fmt: skip


def _reject(name: str, value: object, extra: str = "") -> ConfigError:
    field = FIELDS[name]
    return ConfigError(f"{name} must be in {field.interval}; got {value!r}{extra} ({field.help})")


def _number(name: str, value: Any, part: str = "") -> float:
    """Return `value` as the kind that the table asks for, or raise with field, value and interval."""
    field = FIELDS[name]
    whole = field.kind is int
    if isinstance(value, bool) or not hasattr(value, "__index__" if whole else "__float__"):
        raise ConfigError(
            f"{name}{part} must be {'an integer' if whole else 'a number'}; got {value!r} ({field.help})"
        )
    number = value.__index__() if whole else float(value)
    if not field.holds(number):
        raise _reject(name, value, part)
    return number


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    pairs: Iterable[Any] = value.items() if isinstance(value, Mapping) else value
    found: dict[int, float] = {}
    try:
        for token, number in pairs:
            if isinstance(token, str):  # JSON has no integer names
                token = int(token)
            found[int(_number("allowed_tokens", token))] = _number(
                "logit_bias", number, f" at token {token!r}"
            )
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise ConfigError(str(error).replace("allowed_tokens", "a token id of logit_bias")) from None
        raise ConfigError(f"logit_bias must map token ids to numbers; got {value!r}") from None
    return tuple(sorted(found.items()))


def _allowed(value: Any) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(_number("allowed_tokens", token, " as a token id")) for token in value}))
    except TypeError:
        raise ConfigError(f"allowed_tokens must be a list of token ids; got {value!r}") from None
    if not found:
        raise ConfigError("allowed_tokens must name at least one token; got none: None allows all tokens")
    return found


@dataclass(frozen=True, eq=True)
class SamplingParams:
    """How a token is drawn from logits. ``SamplingParams()`` draws from the model's own distribution.

    Parameters
    ----------
    temperature : float
        In [0, inf); 1 is neutral, 0 is the first argmax and uses no draw.
    top_k : int or None
        In [-1, 2^53); exactly k tokens stay, among equal logits the lower ids. None, 0 and -1 are off; more
        than the vocabulary is off.
    top_p : float or None
        In [0, 1]; the shortest non-empty run in order of rank whose mass reaches p, the token that crosses
        included. None and 1 are off. Holtzman et al. 2020, "The curious case of neural text degeneration".
    min_p : float or None
        In [0, 1]; tokens with at least min_p times the probability of the first. None and 0 are off. Nguyen
        et al. 2024.
    repetition_penalty : float or None
        In [1e-6, 1e6]; tokens of the history (prompt and text alike): positive logits divided, others
        multiplied. None and 1 are off. Keskar et al. 2019 (CTRL); for negative logits as transformers does,
        not as the paper does.
    logit_bias : mapping of int to float, or None
        Added to the logits before everything else, in [-inf, 1e30]. Kept as sorted pairs.
    allowed_tokens : iterable of int, or None
        The only ids that may be drawn; at least one. Kept sorted, each once.
    seed : int or None
        In [-2^63, 2^64). None takes a fresh seed for each call and row and returns it.

    Raises
    ------
    ConfigError
        Naming the field, the value and the interval.

    Notes
    -----
    *Randomness*: the noise is a function of (seed, position, completion, token id) alone. Two rows of one
    call with the same seed, position and completion have the same noise: give n continuations of one prompt
    the completions 0 to n - 1.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = None
    allowed_tokens: Iterable[int] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.temperature is None:
            raise ConfigError(
                f"temperature must be in {FIELDS['temperature'].interval}; got None: 1 is neutral"
            )
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"):
            value = getattr(self, name)
            if value is not None:
                put(self, name, _number(name, value))
        if self.logit_bias is not None:
            put(self, "logit_bias", _bias(self.logit_bias))
        if self.allowed_tokens is not None:
            put(self, "allowed_tokens", _allowed(self.allowed_tokens))
        put(self, "_hash", hash(tuple(getattr(self, f.name) for f in fields(self))))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        # Without the hash: that of None differs between processes before Python 3.12.
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_hash", hash(tuple(getattr(self, f.name) for f in fields(self))))

    @property
    def greedy(self) -> bool:
        """Whether no draw is used: temperature 0."""
        return self.temperature == 0

    @classmethod
    def from_generation_config(
        cls, config: Mapping[str, Any] | Any, *, seed: int | None = None
    ) -> SamplingParams:
        """Read the sampling fields of a ``generation_config.json`` (a mapping, or transformers' object).

        ``do_sample`` false, also where it is missing, means temperature 0. A missing or null ``top_k`` is
        *off* here: what is not written is not guessed. Fields that are not about the choice of a token
        (lengths, special tokens) are none of our business; a field that changes the choice and that we cannot
        serve is an error.

        Raises
        ------
        ConfigError
            If a value is out of range, or the config asks for beams, typical-p or another stage that is not
            there.
        """
        mapping: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        unserved = {
            name: mapping[name]
            for name, neutral in _UNSERVED.items()
            if name in mapping and mapping[name] is not None and mapping[name] != neutral
        }
        if unserved:
            raise ConfigError(
                f"generation_config asks for {unserved}, which twodice does not serve; remove it"
            )
        found = {
            name: mapping[field.generation]
            for name, field in FIELDS.items()
            if field.generation is not None and mapping.get(field.generation) is not None
        }
        if not mapping.get("do_sample", False):
            found["temperature"] = 0.0
        return cls(**found, seed=seed)

    def to_generation_config(self) -> dict[str, Any]:
        """Return every sampling field of ``generation_config.json``, neutral values spelled out.

        Raises
        ------
        ConfigError
            If a setting has no place in that file (logit_bias, allowed_tokens). The seed is left out: it
            belongs to a request.
        """
        for name in ("logit_bias", "allowed_tokens"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} has no place in generation_config.json; drop it there and give it per request"
                )
        written: dict[str, Any] = {"do_sample": not self.greedy}
        for name, field in FIELDS.items():
            if field.generation is None:
                continue
            value = getattr(self, name)
            if value is None or (name == "top_k" and value <= 0) or (name == "temperature" and self.greedy):
                value = field.written_neutral
            written[field.generation] = value
        return written

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> SamplingParams:
        """Build from names and values; an unknown name is an error with the nearest one."""
        for name in settings:
            if name not in FIELDS:
                raise ConfigError(
                    f"unknown sampling setting {name!r}{nearest(name, FIELDS)}; there are {', '.join(FIELDS)}"
                )
        return cls(**settings)


# Fields of transformers' GenerationConfig that change which token is drawn, and their neutral values.
_UNSERVED: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": 1.0,
    "no_repeat_ngram_size": 0,
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
    "min_new_tokens": None,
}
