"""From settings to programs: what the kernels run for each row, packed once and cached.

The file knows the names of settings and the codes of stages; it knows no logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import is_
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twodice.errors import ConfigError, ShapeError
from twodice.kernels import dispatch
from twodice.kernels.sampling_settings import Rule, Settings, Stage
from twodice.random import noise
from twodice.random.keys import Key, spelled
from twodice.sampling.fields import is_off
from twodice.sampling.params import SamplingParams
from twodice.sampling.profiles import profile

_CODES = {
    "top_n_sigma": Stage.TOP_N_SIGMA,
    "top_k": Stage.TOP_K,
    "top_p": Stage.TOP_P,
    "min_p": Stage.MIN_P,
    "top_h": Stage.TOP_H,
    "typical_p": Stage.TYPICAL,
    "epsilon_cutoff": Stage.EPSILON,
    "eta_cutoff": Stage.ETA,
    "xtc": Stage.XTC,
    "mirostat": Stage.MIROSTAT,
}
# Setting and the name of its place in a row, where these are one number.
_NUMBERS = {name: name for name in ("dynatemp_range", "dynatemp_exponent", "top_n_sigma", "top_k", "top_p",
            "top_h", "typical_p", "xtc_probability", "mirostat_tau", "mirostat_eta", "dry_multiplier",
            "dry_base", "dry_range", "penalty_range", "min_tokens")} | {
    "repetition_penalty": "penalty",
    "presence_penalty": "presence",
    "frequency_penalty": "frequency",
    "no_repeat_ngram_size": "ngram",
    "dry_allowed_length": "dry_allowed",
}  # fmt: skip
_LOGARITHMS = {
    "min_p": "log_min_p",
    "epsilon_cutoff": "log_epsilon",
    "eta_cutoff": "log_eta",
    "xtc_threshold": "log_xtc_threshold",
}
_LISTS = {
    "logit_bias": "bias",
    "allowed_tokens": "allowed",
    "banned_tokens": "banned",
    "stop_tokens": "stop",
    "dry_breakers": "breaker",
}


key_of = Key.children("sampling")
"""The Philox key of a seed in [0, 2^64): the child ``sampling`` of ``Key(seed)``."""
_NAME = spelled("sampling")


def keys_of(seeds: Iterable[int]) -> Tensor:
    """The same of R seeds in [-2^63, 2^64): (R,) int64 of the keys' bits."""
    parents = tuple(seeds)
    if dispatch.native is None:
        return torch.from_numpy(
            np.array([key_of(seed % 2**64) for seed in parents], np.uint64).view(np.int64)
        )
    keys = torch.empty(len(parents), dtype=torch.int64)
    dispatch.native.child_keys(parents, _NAME, keys.data_ptr())
    return keys


@lru_cache(maxsize=1024)
def _log(value: float) -> float:
    # A subnormal is taken as the smallest normal number: log is defined on these.
    return float(noise.log(torch.tensor([max(value, 2.0**-1022)], dtype=torch.float64)))


def program(params: SamplingParams) -> tuple[tuple[Stage, ...], Rule]:
    """The codes of the stages that are on, in the order in which they run, and the rules in force."""
    codes = []
    for name in params.stages:
        if name != "temperature":
            codes.append(_CODES[name])
        elif params.greedy:
            codes.append(Stage.GREEDY)
        else:
            codes.append(
                Stage.TEMPERATURE if is_off("dynatemp_range", params.dynatemp_range) else Stage.DYNATEMP
            )
    rules = Rule(0)
    if params.profile is not None:
        for rule in profile(params.profile).rules:
            rules |= Rule[rule]
    if params.xtc_by_expectation:
        rules |= Rule.XTC_EXPECTED
    return tuple(codes), rules


@lru_cache(maxsize=4096)
def _row(params: SamplingParams) -> dict[str, Any]:
    """The places of a row that differ from 0; not to be written to."""
    codes, rules = program(params)
    row: dict[str, Any] = {"stages": codes, "rules": int(rules), "temperature": params.temperature}
    for name, place in _NUMBERS.items():
        value = params.value(name)
        if value is not None:
            row[place] = value
    for name, place in _LOGARITHMS.items():
        value = params.value(name)
        if value is not None:
            row[place] = _log(value)
    for name, place in _LISTS.items():
        value = getattr(params, name)
        if value is not None:
            row[place] = value
    return row


@dataclass(frozen=True, slots=True)
class Packed:
    """Settings packed once for R rows (or one for all), with the seeds that were given."""

    settings: Settings
    seeds: tuple[int | None, ...]
    all_seeded: bool
    keys: Tensor

    @property
    def size(self) -> int:
        """Bytes of its arrays, and some for the objects around them."""
        table = self.settings
        return 1024 + sum(a.nbytes for a in (table.rows, table.ids, table.values, self.keys))


def _made(params: SamplingParams | tuple[SamplingParams, ...]) -> Packed:
    every = (params,) if isinstance(params, SamplingParams) else params
    settings = Settings.pack([_row(p) for p in every])
    seeds = tuple(p.seed for p in every)
    keys = keys_of(0 if s is None else s for s in seeds)
    return Packed(settings, seeds, None not in seeds, keys)


class Packs:
    """The settings that were packed last, up to so many bytes of tables.

    Bytes and not entries: a batch of many rows, or with long lists of ids, is megabytes, and the batch of an
    engine changes with every request that comes or goes.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self._kept: dict[Any, Packed] = {}  # the one used longest ago stands first
        self._last: tuple[Any, Packed | None] = (None, None)  # what came last, and its settings
        self._lock = Lock()

    def __call__(self, params: SamplingParams | tuple[SamplingParams, ...]) -> Packed:
        """Pack settings for the kernels; kept, because a text is many calls with the same settings."""
        known, found = self._last
        if found is not None and _same(known, params):  # no hash, which takes as long as a small row
            return found
        found = self._find(params)
        if found.size <= self.most:
            self._last = params, found
        return found

    def _find(self, params: SamplingParams | tuple[SamplingParams, ...]) -> Packed:
        with self._lock:
            # Put back under what came: the next call of a text brings the same objects, which need no
            # comparison, while equal settings that are other objects are compared field by field.
            found = self._kept.pop(params, None)
            if found is not None:
                self._kept[params] = found
                return found
        made = _made(params)
        with self._lock:
            if params not in self._kept and made.size <= self.most:
                self._kept[params] = made
                self.held += made.size
                while self.held > self.most:
                    self.held -= self._kept.pop(next(iter(self._kept))).size
        return made


def _same(a: Any, b: Any) -> bool:
    """Whether two settings, or two tuples of them, are the same objects."""
    if a is b:
        return True
    return type(a) is tuple and type(b) is tuple and len(a) == len(b) and all(map(is_, a, b))


pack = Packs(1 << 26)


def settings_of(params: Any, each: str = "row") -> tuple[SamplingParams, ...]:
    """The settings, one or several, of what is given; what is something else is named."""
    alone = isinstance(params, SamplingParams | Mapping | str) or not isinstance(params, Iterable)
    given = (params,) if alone else tuple(params)
    for found in given:
        if not isinstance(found, SamplingParams):
            raise ConfigError(
                f"params must be one SamplingParams or one a {each}; got {found!r}: "
                "SamplingParams.parse reads a mapping"
            )
    return given


def each_row(params: Any, rows: int) -> tuple[SamplingParams, ...]:
    """The settings of each row, from those of all or one a row; what is something else is named."""
    if isinstance(params, SamplingParams):
        return (params,) * rows
    given = settings_of(params)
    if len(given) != rows:
        raise ShapeError(f"params must be one SamplingParams or one a row, {rows}; got {len(given)}")
    return given
