"""The rows that the kit draws from: each is built so that a known kind of defect shows within its draws.

A row is a function of its name: logits are quantiles of a normal distribution, put in an order that a keyed
bijection gives, so that neither rank nor probability can be read off the token id.

*The deep tail by many tokens.* A token of probability 1e-9 cannot be waited for, but 100,000 of them are
drawn once in 10,000 times. Noise that is too coarse to lift a token 20 nats shows there as a stratum that
never comes; the price is vocabulary times draws, about 2.5e10 logits in the default run.

Letters: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from twodice.random.keys import Key
from twodice.random.permutation import permute

Logits = npt.NDArray[np.float32]

#: (probability of one token relative to the top, number of tokens): the strata of the deepest row.
LADDER = ((1e-5, 2_000), (1e-6, 5_000), (1e-7, 8_000), (1e-8, 12_000), (1e-9, 104_071))
SEED = 20_260
"""The first seed of the kit; parts use seeds from here on."""


@dataclass(frozen=True)
class Row:
    """One row of logits under one setting.

    kind: what is judged ("body", "tail", "ties", "kept set"). share: draws, as a multiple of the draws
    asked for. strata: sets of tokens that are tested each alone, by name; without any, the least probable
    tenth is.
    """

    name: str
    kind: str
    shows: str
    make: Callable[[], Logits]
    settings: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    strata: tuple[str, ...] = ()


def shuffled(values: npt.NDArray[np.float64], name: str) -> Logits:
    """`values` in the order of a keyed bijection."""
    order = permute(Key(0).child("conformance", name), np.arange(len(values)), len(values))
    found: Logits = values[np.asarray(order)].astype(np.float32)
    return found


def normal(size: int, sigma: float, name: str) -> Logits:
    """The quantiles of a normal distribution of width `sigma`, shuffled."""
    return shuffled(sigma * ndtri((np.arange(size) + 0.5) / size), name)


def _stepped(size: int, step: float, name: str) -> Logits:
    return (np.round(normal(size, 1.5, name) / step) * step).astype(np.float32)


def _bfloat16(name: str) -> Logits:
    bits = (normal(100, 1.5, name) + np.float32(20)).view(np.uint32)
    return (bits & np.uint32(0xFFFF0000)).view(
        np.float32
    )  # cut to 8 bits: at 20, where real logits lie, steps of 1/8


def _ladder() -> Logits:
    values = np.concatenate([[0.0], *(np.full(n, math.log(q)) for q, n in LADDER)])
    return shuffled(values, "ladder")


def _hill() -> Logits:
    return shuffled(np.concatenate([normal(64, 1.0, "hill"), np.full(4032, -6.0)]), "hill order")


def _banned() -> Logits:
    x = normal(100, 1.0, "banned")
    x[np.asarray(permute(Key(0).child("conformance", "which"), np.arange(90), 100))] = -np.inf
    return x


def _equal(size: int) -> Callable[[], Logits]:
    return lambda: np.zeros(size, np.float32)


def _two_tops() -> Logits:
    x = normal(100, 1.0, "two tops")
    x[[41, 77]] = 5.0
    return x


def _two_levels() -> Logits:
    return np.array([-1, 0, -1, 0, 0, -1, 0, -1], np.float32)  # four stay; no tie at the cut


def _cut(size: int, logits: Logits) -> int:
    """The first k from `size` on that cuts through a group of equal logits."""
    falling = np.sort(logits)[::-1]
    return next(k for k in range(size, len(falling)) if falling[k - 1] == falling[k])


def _inside_ties(logits: Logits) -> float:
    """A top-p that ends in the middle of a group of equal logits."""
    falling = np.sort(logits.astype(np.float64))[::-1]
    p = np.exp(falling - falling[0])
    k = _cut(12, logits)
    return float((p[: k - 1].sum() + p[k - 1] / 2) / p.sum())


def all_rows() -> tuple[Row, ...]:
    """Every row, in the order of the report."""
    body = lambda: normal(100, 1.5, "body")  # noqa: E731
    steps = lambda: _stepped(100, 0.5, "steps")  # noqa: E731
    bf16 = lambda: _bfloat16("bf16")  # noqa: E731
    flat = lambda: normal(100, 1.0, "flat")  # noqa: E731
    million = "a token outside, once in a million"
    everything = {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.05}
    return (
        Row("plain", "body", "the softmax itself", body),
        Row("cold", "body", "temperature below 1", body, {"temperature": 0.6}),
        Row("hot", "body", "temperature above 1", body, {"temperature": 1.9}),
        Row("two", "body", "noise of the wrong shape or scale", lambda: np.array([-3.0, 0.0], np.float32)),
        Row("seven", "body", "a vocabulary that fills no vector", _equal(7)),
        Row("wide", "body", "sums in too few bits", lambda: normal(32_768, 0.5, "wide"), share=0.3),
        Row("minus-inf", "body", "nine logits in ten are -inf", _banned),
        Row("top-k", "body", "k counted one off", body, {"top_k": 10}),
        Row("top-p", "body", "the token that crosses p", body, {"top_p": 0.9}),
        Row("top-p-hot", "body", "top-p before temperature", body, {"top_p": 0.9, "temperature": 2.0}),
        Row("top-p-cold", "body", "top-p before temperature", body, {"top_p": 0.9, "temperature": 0.5}),
        Row("top-k-top-p", "body", "mass not renormalised after top-k", flat, {"top_k": 40, "top_p": 0.8}),
        Row("min-p", "body", "min-p relative to the most probable", flat, {"min_p": 0.05}),
        Row("all-stages", "body", "the order of all stages", body, everything),
        Row("hill", "tail", "a fifth of the mass on 4,032 unlikely tokens", _hill),
        Row("deep-tail", "tail", "tokens of 1e-5 down to 1e-9", _ladder, share=2.0,
            strata=tuple(f"{q:.0e}".replace("e-0", "e-") for q, _ in LADDER)),
        Row("tie-at-k", "ties", "equal logits at the cut of top-k", steps, {"top_k": _cut(12, steps())}),
        Row("equal-top-k", "ties", "all logits equal: the first k ids", _equal(16), {"top_k": 3}),
        Row("bfloat16-top-k", "ties", "the ties that bfloat16 makes", bf16, {"top_k": _cut(20, bf16())}),
        Row("equal-top-p", "ties", "the prefix reaches p exactly", _equal(8), {"top_p": 0.5}),
        Row("tie-at-p", "ties", "equal logits where top-p ends", steps, {"top_p": _inside_ties(steps())}),
        Row("greedy", "ties", "temperature 0: the first of two maxima", _two_tops, {"temperature": 0.0},
            0.02),
        Row("wide-top-p", "kept set", "sums in too few bits", lambda: normal(8_192, 0.5, "wide p"),
            {"top_p": 0.9}, 0.04),
        Row("leak-top-k", "kept set", million, _two_levels, {"top_k": 4}, 16.0),
        Row("leak-top-p", "kept set", million, _two_levels, {"top_p": 0.6}, 16.0),
        Row("leak-min-p", "kept set", million, _two_levels, {"min_p": 0.5}, 16.0),
    )  # fmt: skip


def stratum(row: Row, name: str, logits: Logits) -> npt.NDArray[np.bool_]:
    """Which tokens of `row` belong to one of its strata."""
    return np.isclose(logits, math.log(float(name)), rtol=1e-6)
