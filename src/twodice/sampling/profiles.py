"""The order of the stages, and what other engines do differently: their orders, tie and crossing rules.

The file knows names and rules and loads no torch; programs for the kernels are made in
``twodice.sampling.chain``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from twodice.errors import ConfigError, nearest
from twodice.sampling.fields import FIELDS

ORDER = (
    "temperature",
    "top_n_sigma",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "xtc",
    "mirostat",
)
"""Stages 4 to 10 of the contract. Each name stands for its settings: xtc for xtc_probability, and so on."""

SWITCH = {name: name for name in ORDER} | {"xtc": "xtc_probability", "mirostat": "mirostat_tau"}
"""The setting that switches each stage on."""


@dataclass(frozen=True, slots=True)
class Profile:
    """How one engine runs the chain.

    Attributes
    ----------
    order
        Its stages; what is not among them it does not have.
    settings
        What it has beside the settings that switch these stages on.
    rules
        Names of ``twodice.kernels.sampling_settings.Rule``.
    defaults
        Its own values of settings that act where they are absent.
    off
        Values that switch a setting off there and not here.
    alone
        Settings that make it ignore all others but those in the set behind them, and what every engine has
        (bias, lists of ids).
    source
        What this was read from or tested against.
    """

    order: tuple[str, ...]
    settings: frozenset[str]
    rules: tuple[str, ...] = ()
    defaults: Mapping[str, int] = field(default_factory=dict)
    off: Mapping[str, float] = field(default_factory=dict)
    alone: Mapping[str, frozenset[str]] = field(default_factory=dict)
    source: str = ""

    @property
    def served(self) -> frozenset[str]:
        """Every setting that it has; what belongs to one setting alone comes with that."""
        found = {SWITCH[name] for name in self.order} | self.settings
        parts = {name for name, one in FIELDS.items() if len(one.needs) == 1 and one.needs[0] in found}
        return frozenset(found | parts - {"xtc_by_expectation"})  # every engine throws the coin


PROFILES: dict[str, Profile] = {
    "hf": Profile(
        ("temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        frozenset({"repetition_penalty", "no_repeat_ngram_size"}),
        ("TIES_AT_K", "HIGH_ID_FIRST", "TOP_H_OF_100"),
        source="transformers 5, run side by side in the tests; torch's sort taken as stable",
    ),
    "vllm": Profile(
        ("temperature", "min_p", "top_k", "top_p"),
        frozenset({"repetition_penalty", "presence_penalty", "frequency_penalty"}),
        ("TIES_AT_K", "HIGH_ID_FIRST"),
        source="vLLM V1's torch path, read from its documentation and source; not run",
    ),
    "llama.cpp": Profile(
        ("top_n_sigma", "top_k", "typical_p", "top_p", "min_p", "xtc", "temperature", "mirostat"),
        frozenset({"dynatemp_range", "repetition_penalty", "presence_penalty", "frequency_penalty",
                   "penalty_range", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_range",
                   "dry_breakers"}),
        ("COUNT_PROMPT",),
        {"penalty_range": 64, "dry_range": 64},
        {"top_n_sigma": 0.0},
        {"mirostat_tau": frozenset({"temperature", "mirostat_tau", "mirostat_eta"})},
        source="llama.cpp's common sampler; run side by side where its Python bindings are installed",
    ),
    "sglang": Profile(
        ("temperature", "top_k", "top_p", "min_p"),
        frozenset({"repetition_penalty", "presence_penalty", "frequency_penalty"}),
        ("JOINT", "REPEAT_TEXT"),
        source="SGLang's torch path, read from its source; not run",
    ),
}  # fmt: skip


def profile(name: str) -> Profile:
    """The profile of this name, or an error with the nearest."""
    if not isinstance(name, str) or name not in PROFILES:
        raise ConfigError(
            f"profile must be one of {', '.join(PROFILES)}; got {name!r}{nearest(str(name), PROFILES)}"
        )
    return PROFILES[name]


def check_order(order: Iterable[str], active: Iterable[str]) -> tuple[str, ...]:
    """Return `order` as a tuple; each name known, none twice, none missing that is active."""
    if isinstance(order, str) or not isinstance(order, Iterable):
        raise ConfigError(f"order must be a list of stages, of {', '.join(ORDER)}; got {order!r}")
    found = tuple(order)
    for name in found:
        if name not in ORDER:
            raise ConfigError(
                f"order names stages, {', '.join(ORDER)}; got {name!r}{nearest(str(name), ORDER)}"
            )
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise ConfigError(f"order must name each stage once; got {', '.join(twice)} twice: drop one")
    missing = [name for name in active if name not in found]
    if missing:
        raise ConfigError(
            f"order must name every stage that is on; {', '.join(missing)} is missing: add it, or drop it"
        )
    return found
