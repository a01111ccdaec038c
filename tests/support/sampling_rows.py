"""Adversarial logits and settings: ties, extremes, gaps, bad rows; all a function of a number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from twodice.errors import ConfigError
from twodice.sampling.fields import FIELDS
from twodice.sampling.params import SamplingParams
from twodice.sampling.profiles import ORDER, PROFILES

KINDS = (
    "normal", "flat", "peaked", "ties", "all equal", "one finite", "all -inf", "nan", "+inf", "gaps",
    "subnormal", "mostly -inf", "huge", "signed zeros",
)  # fmt: skip
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def row(generator: np.random.Generator, kind: str, vocabulary: int) -> np.ndarray:
    """One row of logits, (vocabulary,) float64."""
    x = generator.normal(size=vocabulary)
    at = generator.integers(vocabulary)
    match kind:
        case "flat":
            x *= 1e-3
        case "peaked":
            x = x * 2 - 30
            x[at] = 0
        case "ties":
            x = np.round(x * 2) / 2
        case "all equal":
            x[:] = generator.choice([0.0, -7.5, 3.25])
        case "one finite":
            x[:] = -np.inf
            x[at] = generator.normal()
        case "all -inf":
            x[:] = -np.inf
        case "nan":
            x[at] = np.nan
        case "+inf":
            x[at] = np.inf
        case "gaps":
            x = generator.choice([0.0, -20.0, -30.0, -80.0], size=vocabulary) + generator.choice(
                [0.0, 1e-4], size=vocabulary
            )
        case "subnormal":
            x *= 1e-40
        case "mostly -inf":
            x[generator.random(vocabulary) < 0.9] = -np.inf
            x[at] = 0
        case "huge":
            x *= 3e4
        case "signed zeros":
            x = generator.choice([0.0, -0.0, -1.0], size=vocabulary)
    return x


def batch(number: int, rows: int, vocabulary: int) -> Tensor:
    """(rows, vocabulary) logits of one type, sometimes a strided view of a larger tensor."""
    generator = np.random.default_rng((number, vocabulary))
    kinds = generator.choice(KINDS, size=rows)
    x = np.stack([row(generator, kind, vocabulary) for kind in kinds]) if rows else np.zeros((0, vocabulary))
    dtype = TYPES[number % len(TYPES)]
    with np.errstate(over="ignore"):
        logits = torch.from_numpy(x).to(dtype)
    match number % 3:
        case 1:  # rows lie apart
            wide = torch.zeros(rows, vocabulary + 5, dtype=dtype)
            wide[:, 3 : 3 + vocabulary] = logits
            logits = wide[:, 3 : 3 + vocabulary]
        case 2:  # columns lie apart
            logits = logits.t().contiguous().t()
    return logits


def many(number: int, rows: int, vocabulary: int) -> Tensor:
    """(rows, vocabulary) logits of every kind, made for all rows at once."""
    generator = np.random.default_rng((number, vocabulary, 5))
    x = generator.normal(size=(rows, vocabulary)).astype(np.float32)
    place = np.arange(vocabulary)
    at = generator.integers(vocabulary, size=(rows, 1))
    here = place == at
    kind = generator.integers(len(KINDS), size=(rows, 1))
    steps = generator.choice(np.float32([0.0, -20.0, -30.0, -80.0]), size=x.shape)
    sign = generator.choice(np.float32([0.0, -0.0, -1.0]), size=x.shape)
    made = {
        "flat": x * np.float32(1e-3), "peaked": np.where(here, 0, x * 2 - 30), "ties": np.round(x * 2) / 2,
        "all equal": np.full_like(x, 3.25), "one finite": np.where(here, x, -np.inf),
        "all -inf": np.full_like(x, -np.inf), "nan": np.where(here, np.nan, x),
        "+inf": np.where(here, np.inf, x),
        "gaps": steps, "subnormal": x * np.float32(1e-40),
        "mostly -inf": np.where((x < 1.3) & ~here, -np.inf, x), "huge": x * np.float32(3e4),
        "signed zeros": sign,
    }  # fmt: skip
    for name, values in made.items():
        x = np.where(kind == KINDS.index(name), values.astype(np.float32), x)
    return torch.from_numpy(x).to(TYPES[number % len(TYPES)])


FILTERS: dict[str, list[object]] = {
    "top_n_sigma": [0.0, 0.5, 1.0, 3.0, 1e6],
    "top_k": [0, -1, 1, 2, 5, 50],
    "top_p": [0.0, 0.1, 0.5, 0.95, 0.999999, 1.0],
    "min_p": [0.0, 1e-9, 0.05, 0.5, 1.0],
    "top_h": [0.0, 0.1, 0.5, 0.9, 1.0],
    "typical_p": [0.0, 0.2, 0.6, 0.95, 1.0],
    "epsilon_cutoff": [0.0, 1e-12, 3e-4, 0.1, 0.9],
    "eta_cutoff": [0.0, 1e-12, 3e-4, 0.1, 0.9],
    "xtc_probability": [0.0, 0.3, 0.7, 1.0],
    "mirostat_tau": [0.5, 3.0, 8.0],
}
EDITS: dict[str, list[object]] = {
    "repetition_penalty": [1.0, 1.3, 0.5, 1e6],
    "presence_penalty": [0.0, 0.7, -2.0, 1e6],
    "frequency_penalty": [0.0, 0.3, -1.5],
    "no_repeat_ngram_size": [0, 1, 2, 3, 7],
    "dry_multiplier": [0.0, 0.8, 1e6],
}


def settings(number: int, rows: int, vocabulary: int) -> list[SamplingParams]:
    """One SamplingParams a row, many at the edges of their intervals; `history` and `state` go with them."""
    generator = np.random.default_rng((number, vocabulary, 1))
    return [_setting(generator, vocabulary) for _ in range(rows)]


def _some(generator: np.random.Generator, vocabulary: int, most: int) -> list[int]:
    return [int(i) for i in generator.integers(vocabulary, size=generator.integers(1, most + 1))]


def _setting(generator: np.random.Generator, vocabulary: int) -> SamplingParams:
    def chance(p: float) -> bool:
        return bool(generator.random() < p)

    def pick(values: list[object]) -> object:
        return values[generator.integers(len(values))]

    found: dict[str, object] = {"seed": int(generator.integers(2**62))}
    found["temperature"] = pick([0.0, 1e-6, 0.7, 1.0, 1.0, 1.0, 1.3, 1e6, 1e-300])
    share = pick([0.15, 0.15, 0.4])  # of the filters that are on
    for name, values in FILTERS.items():
        if chance(share):  # type: ignore[arg-type]
            found[name] = pick(values)
    if chance(0.1):
        found["top_k"] = pick([vocabulary - 1, vocabulary, vocabulary + 1])
    if chance(0.15) and found["temperature"] != 0:
        found |= {
            "dynatemp_range": pick([0.0, 0.3, 0.7, 5.0]),
            "dynatemp_exponent": pick([None, 0.0, 0.5, 3.0]),
        }
    if "xtc_probability" in found:
        found["xtc_threshold"] = pick([None, 1e-9, 0.01, 0.3])
    if "mirostat_tau" in found:
        found["mirostat_eta"] = pick([None, 0.0, 1.0])
    for name, values in EDITS.items():
        if chance(0.15):
            found[name] = pick(values)
    if any(name.endswith("_penalty") for name in found) and chance(0.5):
        found["penalty_range"] = pick([1, 3, 64])
    if "dry_multiplier" in found:
        found |= {"dry_base": pick([None, 1.0, 3.0]), "dry_allowed_length": pick([None, 1, 3]),
                  "dry_range": pick([None, 2, 9])}  # fmt: skip
        if chance(0.5):
            found["dry_breakers"] = _some(generator, vocabulary, 3)
    if chance(0.2):
        found["logit_bias"] = {
            i: float(generator.choice([-np.inf, 5.0, -2.5, 0.1, 1e30]))
            for i in _some(generator, vocabulary, 5)
        }
    if chance(0.2):
        found["allowed_tokens"] = _some(generator, vocabulary, vocabulary)
    if chance(0.2):
        banned = set(_some(generator, vocabulary, 5)) - set(found.get("allowed_tokens", ())[:1])  # type: ignore[index]
        if banned:
            found["banned_tokens"] = banned
    if chance(0.2):
        found |= {"min_tokens": pick([0, 1, 8, 30]), "stop_tokens": _some(generator, vocabulary, 3)}
    if chance(0.2):
        found["order"] = tuple(ORDER[i] for i in generator.permutation(len(ORDER)))
    elif chance(0.25):
        found["profile"] = pick(list(PROFILES))
        engine = PROFILES[found["profile"]]  # type: ignore[index]
        for name in list(found):
            known = name in engine.served
            if not known and (
                name in FILTERS or name in EDITS or FIELDS[name].needs or name == "dynatemp_range"
            ):
                if name != "stop_tokens":
                    del found[name]
        if "mirostat_tau" in found and found["profile"] == "llama.cpp":
            keeps = {"seed", "profile", "temperature", "mirostat_tau", "mirostat_eta", "logit_bias"}
            keeps |= {"allowed_tokens", "banned_tokens", "min_tokens", "stop_tokens"}
            found = {name: value for name, value in found.items() if name in keeps}
        if not any(name.endswith("_penalty") for name in found):
            found.pop("penalty_range", None)
    if found.get("xtc_probability"):
        try:
            return SamplingParams(**found, xtc_by_expectation=chance(0.5))  # type: ignore[arg-type]
        except ConfigError:  # something comes behind it
            pass
    return SamplingParams(**found)  # type: ignore[arg-type]


def history(number: int, rows: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, offsets, prompt_lengths) of rows with 0 to 40 tokens, many of them repeats."""
    generator = np.random.default_rng((number, vocabulary, 2))
    lengths = generator.integers(0, 41, size=rows)
    few = min(vocabulary, int(generator.choice([2, 5, vocabulary])))
    ids = torch.from_numpy(generator.integers(few, size=int(lengths.sum())))
    offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int64))
    return ids, offsets, torch.from_numpy(generator.integers(0, lengths + 1))


def mask(number: int, rows: int, vocabulary: int) -> Tensor | None:
    """A packed mask for every fourth number, with words of all ones and all zeros among its own."""
    if number % 4:
        return None
    generator = np.random.default_rng((number, vocabulary, 3))
    words = generator.integers(-(2**31), 2**31, size=(rows, (vocabulary + 31) // 32))
    words[generator.random(words.shape) < 0.4] = -1
    words[generator.random(words.shape) < 0.3] = 0
    return torch.from_numpy(words.astype(np.int32))


def state(number: int, params: Sequence[SamplingParams], vocabulary: int) -> Tensor | None:
    """Mirostat's mu for some numbers, a new start in some rows and in those that have none; None where no row
    has it."""
    if number % 3 == 0 or all(one.mirostat_tau is None for one in params):
        return None
    generator = np.random.default_rng((number, vocabulary, 4))
    mu = generator.choice([np.nan, -1.0, 0.5, 4.0, 30.0], size=len(params))
    mu[[one.mirostat_tau is None for one in params]] = np.nan
    return torch.from_numpy(mu)
