"""Samplers with one defect each, for the conformance kit to reject; and one that is right and is not ours.

Each is a function of (logits, rows) as the kit calls it. Most take the right sampler and break one thing, so
that all else about them is right and only the check that is meant can find them.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

import twodice
from twodice import SamplingParams
from twodice.random import noise
from twodice.random.keys import Key
from twodice.sampling.conformance import adapters
from twodice.sampling.conformance.claims import claimed
from twodice.sampling.conformance.sampler import Function, Rows

ours = adapters.twodice


def coupled(function: Function) -> Function:
    """Mark a sampler as claiming all that ours claims."""
    function.offers = ("seeds", "coupled")  # type: ignore[attr-defined]
    return function


def with_kinds(rows: Rows, change: Callable[[dict], dict]) -> Rows:
    return Rows([change(dict(kind)) for kind in rows.kinds], rows.positions, rows.seeds, rows.which)


def restricted(logits: Tensor, rows: Rows, keep: Callable[[np.ndarray, dict], Iterable[int]]) -> Tensor:
    """Draw at each row's temperature among the tokens that `keep` names; rows of one setting share logits."""
    masked = torch.full_like(logits, -torch.inf)
    for kind, at in rows.groups():
        ids = torch.as_tensor(list(keep(logits[at[0]].numpy(), dict(kind))))
        numbers = torch.from_numpy(at)[:, None]
        masked[numbers, ids] = logits[numbers, ids]
    plain = with_kinds(rows, lambda kind: {"temperature": kind["temperature"]})
    return ours(masked, plain)


def uniform(rows: Rows, purpose: int, bound: int) -> np.ndarray:
    """(R,) integers in [0, bound), a function of seed, position and purpose (splitmix64's mixer)."""
    x = (rows.positions + (rows.seeds << 24) + (purpose << 54)).astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(bound)).astype(np.int64)


@coupled
def tail_missing(logits: Tensor, rows: Rows) -> Tensor:
    """One token in ten of those beyond rank 43 is replaced by the most probable one."""
    tokens = ours(logits, rows)
    ranks = logits[0].argsort(descending=True).argsort()
    lost = (ranks[tokens] >= 43) & torch.from_numpy(uniform(rows, 1, 10) == 0)
    return torch.where(lost, logits[0].argmax(), tokens)


class Noise24:
    """Gumbel noise from uniforms m / 2^24, what float32 generators give: 16.6 nats is the most.

    All rows of a call are alike, and n tokens of equal logits have the largest of n such uniforms, which is
    drawn at once: exactly the same distribution at a thousandth of the cost.
    """

    def __init__(self, bits: int = 24) -> None:
        self.bits, self.generator, self.groups = bits, np.random.default_rng(1), {}
        self.__name__ = f"noise_{bits}"
        self.offers = ()

    def __call__(self, logits: Tensor, rows: Rows) -> np.ndarray:
        size = logits.shape[1]
        if size not in self.groups:
            values, inverse, counts = np.unique(logits[0].numpy(), return_inverse=True, return_counts=True)
            order = np.argsort(inverse, kind="stable")
            self.groups[size] = values.astype(float), counts, order, np.concatenate([[0], counts.cumsum()])
        values, counts, order, starts = self.groups[size]
        fine = self.generator.random((len(rows), len(values)))
        largest = np.floor(2.0**self.bits * fine ** (1 / counts)) / 2.0**self.bits
        with np.errstate(divide="ignore"):
            winner = (values - np.log(-np.log(largest))).argmax(1)
        place = (self.generator.random(len(rows)) * counts[winner]).astype(int)
        return order[starts[winner] + place]


@coupled
def equal_noise(logits: Tensor, rows: Rows) -> Tensor:
    """All rows of a call have the noise of its first."""
    first = np.zeros(len(rows), np.int64)
    return ours(logits, Rows(rows.kinds, rows.positions[first], rows.seeds[first], rows.which))


@coupled
def first_seed_for_all(logits: Tensor, rows: Rows) -> Tensor:
    """The seeds are a tensor, of which element 0 is read."""
    return ours(logits, Rows(rows.kinds, rows.positions, np.full_like(rows.seeds, rows.seeds[0]), rows.which))


@coupled
def settings_of_first(logits: Tensor, rows: Rows) -> Tensor:
    """All rows of a call have the settings of its first."""
    return ours(logits, Rows([rows.kinds[rows.which[0]]], rows.positions, rows.seeds))


@coupled
def noise_by_width(logits: Tensor, rows: Rows) -> Tensor:
    """The noise depends on the width of the row, as that of a flat index does."""
    return ours(logits, Rows(rows.kinds, rows.positions, rows.seeds + logits.shape[1], rows.which))


class NeverTheSame:
    """A generator that goes on: it takes seeds and no call gives what the last one gave."""

    __name__ = "never_the_same"
    offers = ("seeds",)

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logits: Tensor, rows: Rows) -> Tensor:
        self.calls += 1
        return ours(logits, Rows(rows.kinds, rows.positions, rows.seeds + self.calls, rows.which))


@coupled
def seed_plus_position(logits: Tensor, rows: Rows) -> Tensor:
    """The key is seed + position, so that neighbouring seeds are shifted copies."""
    fixed = np.full_like(rows.seeds, 5)
    return ours(logits, Rows(rows.kinds, rows.seeds + rows.positions, fixed, rows.which))


def starts_anew(logits: Tensor, rows: Rows) -> Tensor:
    """A generator that is seeded with the same number at each call; it offers no seeds."""
    count = len(rows)
    return ours(logits, Rows(rows.kinds, np.arange(count), np.full(count, 3), rows.which))


starts_anew.offers = ()  # type: ignore[attr-defined]


def _k_moved(by: int) -> Function:
    @coupled
    def moved(logits: Tensor, rows: Rows) -> Tensor:
        return ours(
            logits, with_kinds(rows, lambda kind: {**kind, "top_k": kind["top_k"] and kind["top_k"] + by})
        )

    moved.__name__ = f"k{by:+}"
    return moved


k_one_more, k_one_less = _k_moved(1), _k_moved(-1)


@coupled
def crossing_dropped(logits: Tensor, rows: Rows) -> Tensor:
    """Of the kept tokens the last, which crosses p, is dropped."""
    return restricted(
        logits, rows, lambda x, kind: claimed(x, kind).ids[:-1] if kind["top_p"] else range(len(x))
    )


@coupled
def ties_kept(logits: Tensor, rows: Rows) -> Tensor:
    """Everything that equals the k-th logit stays."""
    return restricted(
        logits, rows, lambda x, kind: np.flatnonzero(x >= np.sort(x)[-(kind["top_k"] or len(x))])
    )


@coupled
def temperature_after_top_p(logits: Tensor, rows: Rows) -> Tensor:
    """The filters see the distribution at temperature 1."""
    return restricted(logits, rows, lambda x, kind: claimed(x, {**kind, "temperature": 1.0}).ids)


@coupled
def top_p_of_all(logits: Tensor, rows: Rows) -> Tensor:
    """After top-k the mass is not renormalised: top-p is held against the whole distribution."""
    return restricted(logits, rows, lambda x, kind: claimed(x, {**kind, "top_k": None}).ids[: kind["top_k"]])


@coupled
def last_argmax(logits: Tensor, rows: Rows) -> Tensor:
    """Greedy choice takes the last of equal maxima."""
    if rows.kinds[0]["temperature"] == 0:
        return logits.shape[1] - 1 - logits.flip(1).argmax(1)
    return ours(logits, rows)


@coupled
def leaks_once_in_a_million(logits: Tensor, rows: Rows) -> Tensor:
    """One draw in 2^20, by a keyed coin, is the least probable token, kept or not."""
    tokens = ours(logits, rows)
    coin = uniform(rows, 2 + len(str(rows.kinds)), 2**20) == 0
    return torch.where(torch.from_numpy(coin), logits.shape[1] - 1, tokens)


@coupled
def biased_gumbel(logits: Tensor, rows: Rows) -> Tensor:
    """The noise is scaled by 0.95."""
    ids = torch.arange(logits.shape[1])[None]
    key = Key(int(rows.seeds[0])).child("sampling").value
    g = noise.gumbel(ids, torch.from_numpy(rows.positions)[:, None], 0, 0, key)
    return (logits.double() + 0.95 * g).argmax(1)


@coupled
def float16_sums(logits: Tensor, rows: Rows) -> np.ndarray:
    """Inverse transform on a float16 running sum, which stops to grow; all rows of a call are alike."""
    p = logits[0].softmax(0).half().numpy()
    sums = np.cumsum(p, dtype=np.float16).astype(float)
    return np.searchsorted(sums, uniform(rows, 9, 2**30) / 2**30 * sums[-1], side="right").clip(
        max=len(p) - 1
    )


@coupled
def noise_by_rank(logits: Tensor, rows: Rows) -> Tensor:
    """The noise belongs to a token's place in the sorted row, not to its id."""
    falling, order = logits.sort(dim=1, descending=True, stable=True)
    return order.gather(1, ours(falling, rows)[:, None])[:, 0]


@coupled
def writes_into_logits(logits: Tensor, rows: Rows) -> Tensor:
    """Right, but it leaves its temperature in the tensor that it was given, as engines do that own theirs."""
    tokens = ours(logits, rows)
    logits.div_(2)
    return tokens


class InverseTransform:
    """A right sampler that shares nothing with ours but the claim: one float64 uniform a row."""

    offers = ()

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def __call__(self, logits: Tensor, rows: Rows) -> np.ndarray:
        tokens = np.empty(len(rows), np.int64)
        for kind, at in rows.groups():
            claim = claimed(logits[at[0]].numpy(), kind)
            u = self.generator.random(len(at))
            found = np.searchsorted(claim.probabilities.cumsum(), u, side="right")
            tokens[at] = claim.ids[found.clip(max=len(claim.ids) - 1)]
        return tokens


def sample_one(logits: Tensor, rows: Rows) -> Tensor:
    """The interface as a person writes it: row by row, from the mapping of each."""
    made = []
    for one, row in zip(logits, rows, strict=True):
        position = row["position"]
        settings = {name: row[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
        made.append(int(twodice.sample(one, SamplingParams(**settings), position).tokens))
    return torch.tensor(made)
