"""The settings of the chain: one frozen object, checked at birth against the table of ``fields``.

The file knows what settings may be and which contradict each other; it knows no logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from operator import attrgetter
from typing import Any

from twodice.errors import ConfigError, nearest
from twodice.sampling.fields import FIELDS, bias, is_off, number, token_ids
from twodice.sampling.profiles import ORDER, SWITCH, check_order, profile

_values = attrgetter(*FIELDS)  # every setting; a request makes one of these objects, so it counts


@dataclass(frozen=True, eq=True, kw_only=True, repr=False)
class SamplingParams:
    """How a token is drawn from logits. ``SamplingParams()`` draws from the model's own distribution.

    Each stage sees the distribution that the stages before it left; ``docs/contracts/sampling.md`` defines
    them one by one, in the order in which they run.

    Parameters
    ----------
    temperature : float
        In [0, inf); 1 is neutral, 0 is the first argmax and uses no draw.
    dynatemp_range, dynatemp_exponent : float or None
        In [0, inf) and [0, 100], default 1: the temperature lies in temperature +- range, the higher the
        nearer the entropy is to the greatest possible. 0 is off. llama.cpp's dynamic temperature (2024).
    top_n_sigma : float or None
        In [0, 1e6]; logits at least ``max - n sigma``. None is off. Tang et al. 2024, "Top-n-sigma".
    top_k : int or None
        In [-1, 2^53); exactly k tokens stay, among equal logits the lower ids. None, 0 and -1 are off; more
        than the vocabulary is off. Fan, Lewis and Dauphin 2018.
    top_p : float or None
        In [0, 1]; the shortest non-empty run in order of rank whose mass reaches p, the token that crosses
        included. None and 1 are off. Holtzman et al. 2020, "The curious case of neural text degeneration".
    min_p : float or None
        In [0, 1]; tokens with at least min_p times the probability of the first. None and 0 are off. Nguyen
        et al. 2024.
    top_h : float or None
        In [0, 1]; the longest run in order of rank whose part of the entropy is at most top_h of it. None
        and 1 are off. Baghaei Potraghloo et al. 2025, "Top-H"; the entropy is that of what the stage is
        given, not renormalised at each token.
    typical_p : float or None
        In [0, 1]; by nearness of -log p to the entropy until the mass is reached, ties included. None and 1
        are off. Meister et al. 2023, "Locally typical sampling".
    epsilon_cutoff, eta_cutoff : float or None
        In [0, 1); a least probability, fixed or ``min(eta, sqrt(eta) exp(-entropy))``. None and 0 are off.
        Hewitt, Manning and Liang 2022, "Truncation sampling as language model desmoothing".
    xtc_probability, xtc_threshold, xtc_by_expectation : float, float, bool or None
        In [0, 1] and [1e-9, 1], default 0.1: with this probability all tokens of at least the threshold but
        the least probable of them go. By expectation no coin is thrown: both outcomes are mixed. None and 0
        are off. p-e-w 2024, "Exclude top choices".
    mirostat_tau, mirostat_eta : float or None
        In (0, 1e3] bits and [0, 1e3], default 0.1: a limit on the surprise, steered from token to token so
        that the surprise drawn is tau. It has a state: see `sample`. None is off. Basu et al. 2021, version
        2 as llama.cpp has it.
    repetition_penalty : float or None
        In [1e-6, 1e6]; tokens of the history (prompt and text alike): positive logits divided, others
        multiplied. None and 1 are off. Keskar et al. 2019 (CTRL); for negative logits as transformers does,
        not as the paper does.
    presence_penalty, frequency_penalty : float or None
        In [-1e6, 1e6]; taken from the logit of each token of the text (the prompt does not count), once and
        as often as it is there. None and 0 are off. As in the OpenAI API.
    penalty_range : int or None
        In [1, 2^53); the three penalties look at so many last tokens only.
    no_repeat_ngram_size : int or None
        In [0, 2^31); no run of n tokens comes twice. None and 0 are off. Paulus et al. 2017.
    dry_multiplier, dry_base, dry_allowed_length, dry_range, dry_breakers : numbers, token ids, or None
        ``multiplier * base^(L - allowed)`` is taken from a token that goes on with a repeat of L tokens;
        defaults 1.75 and 2, the whole history, no breakers. None and 0 are off. p-e-w 2024, "DRY".
    logit_bias : mapping of int to float, or None
        Added to the logits before everything else, in [-inf, 1e30]. Kept as sorted pairs.
    allowed_tokens, banned_tokens : iterable of int, or None
        The only ids that may be drawn; ids that never are. At least one each. Kept sorted, each once.
    min_tokens, stop_tokens : int, iterable of int, or None
        No stop token is drawn before the text (without the prompt) has `min_tokens` tokens. None and 0 are
        off.
    order : sequence of str, or None
        Names of `ORDER`, each stage that is on among them; None is that order.
    profile : {"hf", "vllm", "llama.cpp", "sglang"} or None
        The engine whose order, tie and crossing rules hold; its defaults are not taken over, except for what
        acts unasked (``PROFILES``).
    seed : int or None
        In [-2^63, 2^64). None takes a fresh seed for each call and row and returns it.

    Raises
    ------
    ConfigError
        Naming the field, the value and the interval; for settings that contradict each other, saying which
        one to drop.

    Notes
    -----
    *Randomness*: the noise is a function of (seed, position, completion, token id) alone. Two rows of one
    call with the same seed, position and completion have the same noise: give n continuations of one prompt
    the completions 0 to n - 1.
    """

    temperature: float = 1.0
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    top_n_sigma: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    xtc_by_expectation: bool | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    penalty_range: int | None = None
    no_repeat_ngram_size: int | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_range: int | None = None
    dry_breakers: Iterable[int] | None = None
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = None
    allowed_tokens: Iterable[int] | None = None
    banned_tokens: Iterable[int] | None = None
    min_tokens: int | None = None
    stop_tokens: Iterable[int] | None = None
    order: Sequence[str] | None = None
    profile: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.temperature is None:
            raise ConfigError(
                f"temperature must be in {FIELDS['temperature'].interval}; got None: 1 is neutral"
            )
        for (name, field), value in zip(FIELDS.items(), _values(self), strict=True):
            if value is None:
                continue
            if field.kind == "ids":
                put(self, name, token_ids(name, value))
            elif field.kind == "bias":
                put(self, name, bias(value) or None)
            elif field.kind != "names":
                put(self, name, number(name, value))
        if self.order is not None:
            put(self, "order", check_order(self.order, self._on))
        _refuse_contradictions(self)
        put(self, "_hash", self._hash_of())

    def __repr__(self) -> str:
        # What is set, of three dozen fields; it reads back as the same settings.
        told = [f"{f.name}={v!r}" for f in fields(self) if (v := getattr(self, f.name)) != f.default]
        return f"SamplingParams({', '.join(told)})"

    def _hash_of(self) -> int:
        return hash(_values(self))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        # Without the hash: that of None differs between processes before Python 3.12.
        return dict(zip(FIELDS, _values(self), strict=True))

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_hash", self._hash_of())

    @property
    def greedy(self) -> bool:
        """Whether no draw is used: temperature 0."""
        return self.temperature == 0

    @property
    def _on(self) -> tuple[str, ...]:
        """The stages that are on, in the order of `ORDER`."""
        off = {} if self.profile is None else profile(self.profile).off

        def acts(switch: str) -> bool:
            value = getattr(self, switch)
            return not is_off(switch, value) and value != off.get(switch)

        return tuple(
            name for name in ORDER if acts(SWITCH[name]) or (name == "temperature" and acts("dynatemp_range"))
        )

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of `ORDER` that are on, in the order in which they run."""
        order = self.order if self.order is not None else ORDER
        if self.profile is not None:
            order = profile(self.profile).order
        on = self._on
        return tuple(name for name in order if name in on) + tuple(sorted(set(on) - set(order)))

    @property
    def needs_history(self) -> bool:
        """Whether `sample` must be given the history of the rows."""
        names = ("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size",
                 "dry_multiplier", "min_tokens")  # fmt: skip
        return any(not is_off(name, getattr(self, name)) for name in names)

    def value(self, name: str) -> Any:
        """A setting with its default in the place of None, the profile's own default first."""
        given = getattr(self, name)
        if given is None and self.profile is not None:
            given = profile(self.profile).defaults.get(name)
        return FIELDS[name].default if given is None else given

    @classmethod
    def from_generation_config(
        cls, config: Mapping[str, Any] | Any, *, seed: int | None = None
    ) -> SamplingParams:
        """Read the sampling fields of a ``generation_config.json``; see `formats.from_generation_config`."""
        from twodice.sampling.formats import from_generation_config

        return from_generation_config(config, seed=seed)

    def to_generation_config(self) -> dict[str, Any]:
        """Return every sampling field of ``generation_config.json``; see `formats.to_generation_config`."""
        from twodice.sampling.formats import to_generation_config

        return to_generation_config(self)

    @classmethod
    def from_openai(cls, request: Mapping[str, Any]) -> SamplingParams:
        """Read the sampling fields of an OpenAI-style request; see `formats.from_openai`."""
        from twodice.sampling.formats import from_openai

        return from_openai(request)

    def to_openai(self) -> dict[str, Any]:
        """Return the settings as fields of an OpenAI-style request; see `formats.to_openai`."""
        from twodice.sampling.formats import to_openai

        return to_openai(self)

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> SamplingParams:
        """Build from names and values; an unknown name is an error with the nearest one."""
        if not isinstance(settings, Mapping):
            raise ConfigError(f"settings must map names to values; got {settings!r}")
        _refuse_unknown(settings)
        return cls(**settings)


def _refuse_unknown(names: Iterable[Any]) -> None:
    for name in names:
        if name not in FIELDS:
            raise ConfigError(
                f"unknown sampling setting {name!r}{nearest(str(name), FIELDS)}; there are "
                f"{', '.join(FIELDS)}"
            )


def _naming(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor, with the nearest name where a keyword is unknown: Python's own error has none."""

    @wraps(init)
    def __init__(self: SamplingParams, /, *args: Any, **settings: Any) -> None:
        try:
            init(self, *args, **settings)
        except TypeError:
            _refuse_unknown(settings)
            raise

    return __init__


SamplingParams.__init__ = _naming(SamplingParams.__init__)  # type: ignore[method-assign]


def _refuse_contradictions(params: SamplingParams) -> None:
    """Settings that cannot all be meant: each error says which one to drop."""
    for name, field in FIELDS.items():
        if field.needs and getattr(params, name) is not None:
            if all(getattr(params, other) is None for other in field.needs):
                wanted = " or ".join(field.needs)
                raise ConfigError(f"{name} acts only with {wanted}; give it, or drop {name}")
    if params.greedy and not is_off("dynatemp_range", params.dynatemp_range):
        raise ConfigError("temperature=0 takes the first argmax; drop dynatemp_range, or give a temperature")
    if not is_off("min_tokens", params.min_tokens) and params.stop_tokens is None:
        raise ConfigError(
            "min_tokens holds stop_tokens back, and there are none; give them, or drop min_tokens"
        )
    if params.allowed_tokens is not None and params.banned_tokens is not None:
        if set(params.allowed_tokens) <= set(params.banned_tokens):
            raise ConfigError("banned_tokens bans every one of allowed_tokens; drop one of the two")
    if params.xtc_by_expectation and not is_off("xtc_probability", params.xtc_probability):
        behind = params.stages[params.stages.index("xtc") + 1 :]
        if behind:
            raise ConfigError(
                "xtc_by_expectation mixes two distributions, which no later stage can filter as one; "
                f"drop it, or drop {SWITCH[behind[0]]}"
            )
    if params.profile is None:
        return
    engine = profile(params.profile)
    if params.order is not None:
        raise ConfigError(f"profile {params.profile!r} has an order of its own; drop order, or drop profile")
    for name in FIELDS:
        if name in engine.served or name in EVERYWHERE or is_off(name, getattr(params, name)):
            continue
        raise ConfigError(f"{params.profile} has no {name}; drop it, or drop profile={params.profile!r}")
    for name, together in engine.alone.items():
        extra = [n for n in FIELDS if n not in together | EVERYWHERE and not is_off(n, getattr(params, n))]
        if not is_off(name, getattr(params, name)) and extra:
            raise ConfigError(f"{params.profile} ignores {extra[0]} where {name} is set; drop one of the two")


EVERYWHERE = {"logit_bias", "allowed_tokens", "banned_tokens", "min_tokens", "stop_tokens", "order",
               "profile", "seed"}  # fmt: skip
