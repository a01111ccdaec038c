"""What each setting of the chain may be: one table, read by checks, help texts, docs and file formats.

The file knows no logits and loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from twodice.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Field:
    """What one setting may be: its kind, its interval, the value that switches it off, and its help text.

    `kind` is float, int, bool, or for what has parts ``"ids"``, ``"bias"`` or ``"names"``; then the interval
    is that of a part. `default` stands in for a value that is absent where the setting acts, `needs` names
    the settings of which one must be there for it to act at all.
    """

    name: str
    kind: type | str
    interval: str
    neutral: float | None
    help: str
    default: float | None = None
    needs: tuple[str, ...] = ()

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the interval (NaN does not)."""
        low, high, open_low, open_high = _ends(self.interval)
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        return above and below


@cache
def _ends(interval: str) -> tuple[float, float, bool, bool]:
    low, high = (_bound(text) for text in interval[1:-1].split(", "))
    return low, high, interval[0] == "(", interval[-1] == ")"


def _bound(text: str) -> float:
    if "^" in text:
        sign = -1 if text.startswith("-") else 1
        base, power = text.lstrip("-").split("^")
        return float(sign * int(base) ** int(power))
    return float(text)


_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
FIELDS: dict[str, Field] = {
    field.name: field
    for field in (
        Field("temperature", float, "[0, inf)", 1.0,
              "divides the logits; 0 takes the most probable token"),
        Field("dynatemp_range", float, "[0, inf)", 0.0,
              "the temperature moves this far to both sides with the entropy; 0 is off"),
        Field("dynatemp_exponent", float, "[0, 100]", None,
              "the power of the share of the greatest entropy by which the temperature moves", 1.0,
              ("dynatemp_range",)),
        Field("top_n_sigma", float, "[0, 1e6]", None,
              "keep logits at most n standard deviations below the greatest; None is off"),
        Field("top_k", int, "[-1, 2^53)", 0,
              "keep exactly the k most probable tokens; None, 0 and -1 are off"),
        Field("top_p", float, "[0, 1]", 1.0,
              "keep the shortest run of most probable tokens whose mass reaches p; 0 keeps one, 1 is off"),
        Field("min_p", float, "[0, 1]", 0.0,
              "keep tokens at least this many times as probable as the most probable; 0 is off"),
        Field("top_h", float, "[0, 1]", 1.0,
              "keep the most probable tokens that carry at most this share of the entropy; 1 is off"),
        Field("typical_p", float, "[0, 1]", 1.0,
              "keep the tokens nearest to the entropy whose mass reaches p; 1 is off"),
        Field("epsilon_cutoff", float, "[0, 1)", 0.0,
              "keep tokens with at least this probability; 0 is off"),
        Field("eta_cutoff", float, "[0, 1)", 0.0,
              "the same with min(eta, sqrt(eta) exp(-entropy)); 0 is off"),
        Field("xtc_probability", float, "[0, 1]", 0.0,
              "how often the most probable of the likely tokens are excluded; 0 is off"),
        Field("xtc_threshold", float, "[1e-9, 1]", None,
              "which tokens XTC calls likely; above 0.5 it never acts", 0.1, ("xtc_probability",)),
        Field("xtc_by_expectation", bool, "[0, 1]", False,
              "mix what XTC does and does not exclude instead of throwing its coin", False,
              ("xtc_probability",)),
        Field("mirostat_tau", float, "(0, 1e3]", None,
              "the surprise in bits that mirostat v2 steers to; None is off"),
        Field("mirostat_eta", float, "[0, 1e3]", None,
              "how fast mirostat steers", 0.1, ("mirostat_tau",)),
        Field("repetition_penalty", float, "[1e-6, 1e6]", 1.0,
              "tokens of the sequence, prompt too: positive logits are divided by it, others multiplied"),
        Field("presence_penalty", float, "[-1e6, 1e6]", 0.0,
              "taken from the logit of each token that the text (not the prompt) has"),
        Field("frequency_penalty", float, "[-1e6, 1e6]", 0.0,
              "taken from the logit of a token as often as the text (not the prompt) has it"),
        Field("penalty_range", int, "[1, 2^53)", None,
              "the three penalties look at so many last tokens; None looks at all", None, _PENALTIES),
        Field("no_repeat_ngram_size", int, "[0, 2^31)", 0,
              "no run of n tokens comes twice, the prompt counted; 0 is off"),
        Field("dry_multiplier", float, "[0, 1e6]", 0.0,
              "what a token pays that goes on with a repeat of the end of the sequence; 0 is off"),
        Field("dry_base", float, "[1, 1e6]", None,
              "the factor for each further token of the repeat", 1.75, ("dry_multiplier",)),
        Field("dry_allowed_length", int, "[1, 2^31)", None,
              "the shortest repeat that pays", 2, ("dry_multiplier",)),
        Field("dry_range", int, "[1, 2^53)", None,
              "DRY looks at so many last tokens; None looks at all", None, ("dry_multiplier",)),
        Field("dry_breakers", "ids", "[0, 2^32)", None,
              "token ids that end a repeat, such as those of line breaks", None, ("dry_multiplier",)),
        Field("logit_bias", "bias", "[-inf, 1e30]", None,
              "a number that is added to the logit of each token id named; -inf bans it"),
        Field("allowed_tokens", "ids", "[0, 2^32)", None,
              "the only token ids that may be drawn; None allows all"),
        Field("banned_tokens", "ids", "[0, 2^32)", None,
              "token ids that are never drawn"),
        Field("min_tokens", int, "[0, 2^32)", 0,
              "no stop token is drawn before the text has so many tokens; 0 is off"),
        Field("stop_tokens", "ids", "[0, 2^32)", None,
              "the token ids that end a text, for min_tokens", None, ("min_tokens",)),
        Field("order", "names", "", None,
              "the stages from temperature to mirostat as they are to run; None is the contract's order"),
        Field("profile", "names", "", None,
              "the engine whose order and tie rules hold: hf, vllm, llama.cpp, sglang; None is ours"),
        Field("seed", int, "[-2^63, 2^64)", None,
              "names the noise; None takes a new one from the operating system and returns it"),
    )
}  # fmt: skip
"""Every setting of `SamplingParams`, in its order."""


def plain(value: Any) -> Any:
    """A scalar of NumPy or an array without axes as Python's own number; all else as it came."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        with suppress(TypeError, ValueError, RuntimeError):  # of a tensor without values
            return value.item()
    return value


def whole(value: Any) -> int | None:
    """The integer that a value without axes is, of whatever library; None if it is none, or a truth."""
    value = plain(value)
    if isinstance(value, bool) or not hasattr(value, "__index__") or len(getattr(value, "shape", ())):
        return None
    with suppress(TypeError, ValueError, RuntimeError):  # floats of NumPy and torch have the name too
        return int(value.__index__())
    return None


def shown(value: Any) -> str:
    """What an error shows of a value: all but the digits of an integer that nobody reads."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def number(name: str, value: Any, part: str = "") -> float | int | bool:
    """Return `value` as the kind that the table asks for, or raise with field, value and interval."""
    field, given = FIELDS[name], value
    value = plain(value)
    if field.kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false; got {value!r} ({field.help})")
        return value
    is_whole = field.kind in (int, "ids")
    found: Any = whole(value) if is_whole else None
    if not is_whole and not isinstance(value, bool) and hasattr(value, "__float__"):
        with suppress(TypeError, ValueError, RuntimeError):  # an array of several numbers, or of none
            try:
                found = float(value)
            except OverflowError:  # an integer that no float holds
                found = math.inf if value > 0 else -math.inf
    if found is None:
        kind = "an integer" if is_whole else "a number"
        raise ConfigError(f"{name}{part} must be {kind}; got {shown(given)} ({field.help})")
    if not field.holds(found):
        raise ConfigError(f"{name} must be in {field.interval}; got {shown(given)}{part} ({field.help})")
    return found  # type: ignore[no-any-return]


def bias(value: Any) -> tuple[tuple[int, float], ...]:
    """A logit bias as sorted pairs; from a mapping (JSON's text names too) or pairs."""
    pairs: Iterable[Any] = value.items() if isinstance(value, Mapping) else value
    found: dict[int, float] = {}
    try:
        for token, add in pairs:
            if isinstance(token, str):  # JSON has no integer names
                text, token = token, int(token)
                if text != str(token):  # int() also reads "05", "1_0" and " 5"
                    raise ConfigError(f"a token id of logit_bias must be written as {token}; got {text!r}")
            id = whole(token)
            if id is None or not 0 <= id < 2**32:
                raise ConfigError(
                    f"a token id of logit_bias must be an integer in [0, 2^32); got {shown(token)}"
                )
            if id in found:
                raise ConfigError(f"logit_bias must name each token once; got {id} twice: drop one")
            found[id] = float(number("logit_bias", add, f" at token {id}"))
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"logit_bias must map token ids to numbers; got {value!r}") from None
    return tuple(sorted(found.items()))


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """A list of token ids, sorted, each once, and at least one."""
    try:
        found = tuple(sorted({int(number(name, token, " (each token id)")) for token in value}))
    except TypeError:
        raise ConfigError(f"{name} must be a list of token ids; got {value!r}") from None
    if not found:
        raise ConfigError(f"{name} must name at least one token; got none: None is off ({FIELDS[name].help})")
    return found


def is_off(name: str, value: Any) -> bool:
    """Whether a setting changes nothing: absent, or its neutral value."""
    if value is None:
        return True
    neutral = FIELDS[name].neutral
    return (neutral is not None and value == neutral) or (name == "top_k" and value == -1)
