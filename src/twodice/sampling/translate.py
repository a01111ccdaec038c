"""`translate`: settings of one engine as settings of another, and what is not the same there.

The file knows the profiles and, of each engine, what its requests refuse or change. It knows no logits and
loads no torch.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twodice.errors import ConfigError, nearest
from twodice.sampling.fields import FIELDS, is_off
from twodice.sampling.params import EVERYWHERE, SamplingParams
from twodice.sampling.profiles import ORDER, PROFILES, SWITCH, Profile

OURS = "twodice"
ENGINES = (OURS, *PROFILES)
WHOLE = 2**31 - 1  # a window that no text fills, in the 32 bits that llama.cpp has for it

# The order of these two does not change what is kept: neither looks at what the other takes away. (But a
# temperature that moves does.)
_COMMUTE = {
    frozenset(pair) for pair in (("top_k", "min_p"), ("top_k", "temperature"), ("top_n_sigma", "temperature"))
}
# What the engine refuses, as the interval that it takes instead of ours.
_LIMITS = {
    "vllm": {"temperature": (0.0, 2.0), "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
             "logit_bias": (-100.0, 100.0)},
    "sglang": {"presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
               "repetition_penalty": (1e-6, 2.0)},
}  # fmt: skip
# A value that the engine refuses or takes for off, and one that keeps the same tokens there.
_INSTEAD = {
    ("vllm", "top_p", 0.0): ("refuses", "top_k", 1),
    ("sglang", "top_p", 0.0): ("refuses", "top_k", 1),
    ("hf", "top_h", 0.0): ("refuses", "top_h", 1e-9),
    ("hf", "typical_p", 0.0): ("refuses", "typical_p", 1e-9),
    ("llama.cpp", "top_n_sigma", 0.0): ("takes for off", "top_n_sigma", 1e-6),
}
_UNASKED = {
    "hf": {"top_k": "50"},
    "llama.cpp": {"temperature": "0.8", "top_k": "40", "top_p": "0.95", "min_p": "0.05"},
}
_OFF = {"temperature": "1", "top_k": "0", "top_p": "1", "min_p": "0"}


@dataclass(frozen=True, slots=True)
class Translation:
    """Settings for another engine.

    Attributes
    ----------
    params : SamplingParams
        What matches best there, under the profile of that engine.
    differences : tuple of str
        One sentence for each thing that is not the same, or that has to be said there to be the same; empty
        if nothing is.
    """

    params: SamplingParams
    differences: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([repr(self.params), *(f"- {sentence}" for sentence in self.differences)])


def translate(params: SamplingParams, *, from_: str, to: str) -> Translation:
    """Say in the words of the engine `to` what `params` mean to the engine `from_`.

    Parameters
    ----------
    params : SamplingParams
        Its own profile, if it has one, must be `from_`.
    from_, to : "twodice", "hf", "vllm", "llama.cpp" or "sglang"

    Returns
    -------
    Translation

    Raises
    ------
    ConfigError
        If an engine is unknown, or `params` has what `from_` does not have.

    Examples
    --------
    >>> found = translate(SamplingParams(min_p=0.1, temperature=2.0), from_="vllm", to="llama.cpp")
    >>> round(found.params.min_p, 6)
    0.01
    """
    for name, engine in (("from_", from_), ("to", to)):
        if engine not in ENGINES:
            raise ConfigError(
                f"{name} must be one of {', '.join(ENGINES)}; got {engine!r}{nearest(str(engine), ENGINES)}"
            )
    if not isinstance(params, SamplingParams):
        raise ConfigError(
            f"params must be SamplingParams; got {params!r}: SamplingParams.parse reads a mapping"
        )
    if params.profile not in (None, from_):
        raise ConfigError(
            f"params has profile {params.profile!r} and from_ is {from_!r}; drop one of the two"
        )
    source = dataclasses.replace(params, profile=None if from_ == OURS else from_)
    if from_ == to:
        return Translation(source, ())
    work = _Work(source, from_, to)
    work.windows()
    work.drop()
    work.limit()
    work.order()
    work.rules()
    work.unasked()
    return Translation(SamplingParams(**work.given), tuple(work.said))


class _Work:
    """The settings in the making, and what was said on the way."""

    def __init__(self, source: SamplingParams, from_: str, to: str) -> None:
        self.source, self.from_, self.to = source, from_, to
        self.a, self.b = PROFILES.get(from_), PROFILES.get(to)
        self.said: list[str] = []
        self.given: dict[str, Any] = {
            f.name: getattr(source, f.name)
            for f in dataclasses.fields(source)
            if f.name not in ("profile", "order") and not is_off(f.name, getattr(source, f.name))
        }
        for name, field in FIELDS.items():  # a part of what is off says nothing
            if field.needs and not any(self.on(other) for other in field.needs):
                self.given.pop(name, None)
        self.given["profile"] = None if to == OURS else to
        for name, off in self.a.off.items() if self.a is not None else ():
            if self.given.get(name) == off:
                del self.given[name]
                self.said.append(f"{name} of {off:g} is dropped: {from_} takes it for off.")

    def on(self, name: str) -> bool:
        """Whether a setting still acts."""
        return not is_off(name, self.given.get(name))

    def windows(self) -> None:
        """Say the windows of the penalties and of DRY, which engines set unasked."""
        for name in ("penalty_range", "dry_range"):
            if not any(self.on(other) for other in FIELDS[name].needs):
                continue
            value = self.source.value(name)
            unasked = self.b.defaults.get(name) if self.b is not None else None
            if value is None and unasked is not None:
                value = WHOLE
                self.said.append(
                    f"{name} is {WHOLE}: {self.to} looks at {unasked} tokens where nothing is said, "
                    f"{self.from_} at all of them."
                )
            if value is not None:
                self.given[name] = value

    def drop(self) -> None:
        """Leave out what the other engine does not have, or does not do beside what is set."""
        if self.b is None:
            return
        if self.given.get("xtc_by_expectation") and self.on("xtc_probability") and "xtc" in self.b.order:
            self.said.append(f"xtc_by_expectation is dropped: {self.to} throws the coin.")
        for name in [n for n in self.given if n not in self.b.served | EVERYWHERE]:
            value = self.given.pop(name)
            if name == "penalty_range":
                self.said.append(
                    f"penalty_range is dropped: {self.to} has no window, its penalties look at the whole "
                    f"sequence and not at the last {value} tokens."
                )
            elif not FIELDS[name].needs:
                self.said.append(f"{name} is dropped: {self.to} has none.")
        for name, together in self.b.alone.items():
            if self.on(name):
                for other in [n for n in self.given if n not in together | EVERYWHERE]:
                    del self.given[other]
                    if not FIELDS[other].needs:
                        self.said.append(f"{other} is dropped: {self.to} ignores it where {name} is set.")

    def limit(self) -> None:
        """Bring values into what the other engine takes."""
        for engine in (self.from_, self.to):
            t = self.given.get("temperature", 1.0)
            if engine == "vllm" and 1e-5 <= t < 0.01:
                self.given["temperature"] = 0.01
                self.said.append(f"temperature is {t:g}: vllm raises it to 0.01.")
            least = {"vllm": 1e-5, "sglang": 1e-6}.get(engine, 0.0)
            if 0 < t < least:
                self.given["temperature"] = 0.0
                self.said.append(
                    f"temperature is {t:g}: {engine} takes the most probable token below {least:g}."
                )
        for (engine, name, value), (verb, other, near) in _INSTEAD.items():
            if engine == self.to and self.given.get(name) == value:
                del self.given[name]
                self.given[other] = near
                self.said.append(f"{name} of {value:g}, which {engine} {verb}, is {other} of {near:g}.")
        for name, (low, high) in _LIMITS.get(self.to, {}).items():
            was = self.given.get(name)
            if was is None:
                continue
            if name == "logit_bias":
                within: Any = tuple((id, min(max(add, low), high)) for id, add in was)
            else:
                within = min(max(was, low), high)
            if within != was:
                self.given[name] = within
                self.said.append(
                    f"{name} is brought into [{low:g}, {high:g}], which is all that {self.to} takes."
                )

    def order(self) -> None:
        """Stages that run the other way round, where both are on and it matters."""
        warm = self.on("temperature") or self.on("dynatemp_range")
        first = [
            stage
            for stage in self.source.stages
            if (warm if stage == "temperature" else self.on(SWITCH[stage]))
        ]
        if self.b is None:
            rest = [stage for stage in ORDER if stage not in first]
            if first != [stage for stage in ORDER if stage in first]:
                self.given["order"] = (*first, *rest)
            return
        there = [stage for stage in self.b.order if stage in first]
        if self.given.get("temperature") == 0 and _greedy_at_once(first) and _greedy_at_once(there):
            return  # the most probable token is left, whatever else comes before or after
        place = {stage: i for i, stage in enumerate(self.b.order)}
        commute = {pair for pair in _COMMUTE if "temperature" not in pair or not self.on("dynatemp_range")}
        turned = [
            (x, y)
            for i, x in enumerate(first)
            for y in first[i + 1 :]
            if x in place and y in place and place[x] > place[y] and frozenset((x, y)) not in commute
        ]
        for x, y in turned:
            if {x, y} == {"temperature", "min_p"} and not self.on("dynatemp_range"):
                if self.given["temperature"] > 0:
                    self._min_p(x == "temperature")
                continue
            if (x, y) in (("typical_p", "temperature"), ("xtc", "temperature")) and self.source.greedy:
                self.said.append(
                    f"{self.from_} runs {x} before temperature=0, and it may take the most probable token "
                    f"away; {self.to} takes that token."
                )
                continue
            reason = "what the one leaves is what the other counts its mass over"
            if "temperature" in (x, y):
                other = SWITCH[y if x == "temperature" else x]
                reason = f"the {other} that would keep the same tokens is not constant"
                if other in ("top_k", "top_n_sigma"):
                    reason = "a temperature that moves counts the entropy of what is there"
            self.said.append(
                f"{self.from_} runs {x} before {y}, {self.to} after it, and both are set: {reason}."
            )

    def _min_p(self, temperature_first: bool) -> None:
        """min-p is a limit on a difference of logits, so a power of it keeps the same tokens."""
        t, m = self.given["temperature"], self.given["min_p"]
        # What underflows would be off; nothing is drawn from there.
        self.given["min_p"] = max(m**t if temperature_first else m ** (1 / t), sys.float_info.min)
        when = "after" if temperature_first else "before"
        self.said.append(
            f"min_p is {self.given['min_p']:.6g} in place of {m:g}, because {self.to} runs temperature "
            f"{when} it: the power {t if temperature_first else 1 / t:g} of it keeps the same tokens."
        )

    def rules(self) -> None:
        """Ties, crossing tokens, what is counted."""

        def differs(rule: str) -> str | None:
            a, b = _has(self.a, rule), _has(self.b, rule)
            return None if a == b else (self.from_ if a else self.to)

        def other(engine: str) -> str:
            return self.to if engine == self.from_ else self.from_

        if self.source.greedy:
            return self._counts(differs("COUNT_PROMPT"), other)
        if self.on("top_k") and (who := differs("TIES_AT_K")):
            self.said.append(
                f"{who} keeps every token that ties with the k-th, {other(who)} exactly top_k of them."
            )
        if self.on("top_p") and (who := differs("JOINT")):
            if set(self.source.stages) - {"temperature", "top_p"}:
                self.said.append(
                    f"{who} counts top_p over all tokens, {other(who)} over what its filters left: the top_p "
                    "that would keep the same tokens is not constant."
                )
            self.said.append(f"{who} keeps one token more where a mass reaches top_p exactly.")
        if self.on("top_p") and (who := differs("HIGH_ID_FIRST")):
            self.said.append(f"{who} keeps the higher ids of a tie that top_p cuts, {other(who)} the lower.")
        for name in ("epsilon_cutoff", "eta_cutoff"):
            if self.on(name) and "hf" in (self.from_, self.to):
                self.said.append(
                    f"hf keeps all ties with the most probable token where none reaches {name}, "
                    f"{other('hf')} one of them."
                )
        if self.on("top_h") and "hf" in (self.from_, self.to):
            self.said.append("top_h in hf looks at the 100 most probable tokens, elsewhere at all.")
        if self.on("typical_p") and "llama.cpp" in (self.from_, self.to):
            self.said.append("llama.cpp cuts ties in typical_p by its sort, elsewhere all of them stay.")
        return self._counts(differs("COUNT_PROMPT"), other)

    def _counts(self, who: str | None, other: Any) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if self.on(name) and who is not None:
                self.said.append(f"{name} in {who} counts the prompt too, in {other(who)} the text alone.")
        if self.on("repetition_penalty") and "sglang" in (self.from_, self.to):
            here = other("sglang")
            self.said.append(
                f"repetition_penalty in sglang looks at the text alone, in {here} at the prompt too."
            )
            if self.on("logit_bias"):
                self.said.append(
                    f"logit_bias in sglang is added behind repetition_penalty, in {here} before it."
                )

    def unasked(self) -> None:
        """What acts there where nothing is said, and the seed."""
        if self.to == "hf":
            cold = self.given.get("temperature") == 0
            why = "refuses a temperature of 0" if cold else "draws nothing where nothing is said"
            self.said.append(f"Say do_sample={not cold}: hf {why}.")
        if self.to == "llama.cpp" and self.on("dry_multiplier") and not self.on("dry_breakers"):
            self.said.append(
                "Say that there are no sequence breakers: llama.cpp has newline, colon, quotation mark and "
                "star where nothing is said."
            )
        silent = {name: value for name, value in _UNASKED.get(self.to, {}).items() if not self.on(name)}
        if silent and not self.source.greedy:
            words = ", ".join(f"{name} {_OFF[name]}" for name in silent)
            unasked = ", ".join(f"{name} {value}" for name, value in silent.items())
            self.said.append(f"Say {words}: {self.to} has {unasked} where nothing is said.")
        if self.source.seed is not None and not self.source.greedy:
            self.said.append(
                "The seed names other noise there: the distribution can be the same, the tokens are not."
            )


def _greedy_at_once(order: Sequence[str]) -> bool:
    """Whether no stage that may take the most probable token away comes before the temperature."""
    cold = order.index("temperature") if "temperature" in order else len(order)
    return not {"typical_p", "xtc"} & set(order[:cold])


def _has(profile: Profile | None, rule: str) -> bool:
    return profile is not None and rule in profile.rules
