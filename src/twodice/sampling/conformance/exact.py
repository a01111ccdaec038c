"""Exact tests of counts, Holm's correction over all of them, and the smallest defect that a test would
catch.

No p-value here rests on an approximation: every one is a binomial tail, and what combines them is Fisher's
method or Bonferroni's bound. So the false-alarm probability that is stated holds at 1e-6 and beyond, where
the chi-square approximation of a table of counts is wrong by orders of magnitude.

*A table of counts is a tree of binomials*: given the count of a node, the count of its left half is
binomial, whatever happened above. Each p-value is therefore uniform given all above it, and their
logarithms add up to a chi-square variable exactly. The ties of a discrete variable are broken by a keyed
uniform, or Fisher's method would lose power.

The file knows counts and probabilities; it knows no logits and no sampler.

References
----------
Fisher 1925 (combination); Holm 1979; Clopper and Pearson 1934.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import beta, binom, chi2

from twodice.random.keys import Key
from twodice.random.philox import philox4x32

POWER = 0.99
"""Probability with which a defect of the size that is reported would have been found."""
LEAST_EXPECTED = 25.0
"""Tokens are pooled, by falling probability, into leaves that expect at least this many draws."""
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def two_sided(count: int, n: int, q: float) -> float:
    """Exact two-sided p-value of `count` hits in `n` draws of probability `q`: twice the smaller tail."""
    return float(min(1.0, 2 * min(binom.cdf(count, n, q), binom.sf(count - 1, n, q))))


def ratio_interval(count: int, n: int, q: float, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval for the rate, as a multiple of `q`."""
    rest = (1 - level) / 2
    low = 0.0 if count == 0 else float(beta.ppf(rest, count, n - count + 1))
    high = 1.0 if count == n else float(beta.ppf(1 - rest, count + 1, n - count))
    return low / q, high / q


def _randomised(count: Integers, n: Integers, q: Floats) -> Floats:
    """Two-sided p-values that are uniform under the hypothesis: the mass at `count` is cut at a keyed
    uniform.
    """
    words = philox4x32(torch.arange(len(count)), 0, 0, 0, Key(0).child("conformance", "cut").value)
    cut = (words[0].numpy() + 0.5) / 2**32
    here = binom.pmf(count, n, q)
    below = binom.cdf(count - 1, n, q) + cut * here
    above = binom.sf(count, n, q) + (1 - cut) * here
    p: Floats = np.clip(2 * np.minimum(below, above), 1e-300, 1.0)
    return p


class Node(NamedTuple):
    """One binomial of the tree: leaves [low, middle) against [middle, high)."""

    low: int
    middle: int
    high: int


def leaves(expected: Floats) -> Integers:
    """Borders of the leaves over tokens in falling order of probability: (leaves + 1,)."""
    borders = [0]
    total = np.concatenate([[0.0], expected.cumsum()])
    while borders[-1] < len(expected):
        held = total[borders[-1]] + LEAST_EXPECTED
        borders.append(max(borders[-1] + 1, min(len(expected), int(np.searchsorted(total, held)))))
    if len(borders) > 2 and total[-1] - total[borders[-2]] < LEAST_EXPECTED:
        del borders[-2]  # what is left over joins the leaf before it
    return np.array(borders, np.int64)


def tree(mass: Floats) -> list[Node]:
    """The binary tree over leaves of `mass`, each node split where its halves weigh most nearly the same."""
    total = np.concatenate([[0.0], mass.cumsum()])
    nodes, open_ = [], [(0, len(mass))]
    while open_:
        low, high = open_.pop()
        if high - low < 2:
            continue
        middle = int(np.searchsorted(total, (total[low] + total[high]) / 2))
        if middle - 1 > low and total[low] + total[high] - total[middle - 1] - total[middle] < 0:
            middle -= 1
        middle = min(max(middle, low + 1), high - 1)
        nodes.append(Node(low, middle, high))
        open_ += [(middle, high), (low, middle)]
    return nodes


class Fit(NamedTuple):
    """How well counts fit: the p-value, the number of binomials in it, and the share of the first split."""

    p: float
    binomials: int
    half: float


def fit(counts: Integers, probabilities: Floats) -> Fit | None:
    """Test that `counts`, in falling order of `probabilities`, are independent draws; None with one leaf
    only.

    Two statistics: the smallest p-value times their number, for a defect at one place, and Fisher's sum,
    for one that is everywhere; the p-value is twice the smaller.
    """
    n = int(counts.sum())
    borders = leaves(probabilities * n)
    if len(borders) < 3:
        return None
    mass = np.add.reduceat(probabilities, borders[:-1])
    seen = np.concatenate([[0], np.add.reduceat(counts, borders[:-1]).cumsum()])
    total = np.concatenate([[0.0], mass.cumsum()])
    nodes = np.array(tree(mass))
    low, middle, high = nodes.T
    share = (total[middle] - total[low]) / (total[high] - total[low])
    p = _randomised(seen[middle] - seen[low], seen[high] - seen[low], share)
    fisher = float(chi2.sf(-2 * np.log(p).sum(), 2 * len(p)))
    return Fit(min(1.0, 2 * min(fisher, len(p) * float(p.min()))), len(p), float(share[0]))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: rejecting where one is at most alpha has a family-wise error of at most alpha."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = largest
    return adjusted


def factors_caught(n: int, q: float, level: float) -> tuple[float | None, float | None]:
    """The factors on `q`, one below and one above 1, from which a test at `level` rejects with probability
    `POWER`.

    None where no such factor exists: too few draws to miss a stratum that never comes.
    """
    low = int(binom.ppf(level / 2, n, q))
    while low >= 0 and 2 * binom.cdf(low, n, q) > level:
        low -= 1
    high = int(binom.isf(level / 2, n, q))
    while 2 * binom.sf(high - 1, n, q) > level:
        high += 1
    below = None
    if low >= 0:
        below = _last_where(lambda x: binom.cdf(low, n, x) >= POWER, 0.0, q) / q
    above = None
    if high <= n:
        above = _last_where(lambda x: binom.sf(high - 1, n, x) < POWER, q, 1.0) / q
    return below, above


def _last_where(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The largest x in [low, high] for which `holds`, a property of all smaller x, is true."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def shift_caught(n: int, half: float, level: float) -> float | None:
    """Total variation between the halves of the first split that a test at `level` finds with probability
    `POWER`.
    """
    below, above = factors_caught(n, half, level)
    if below is None or above is None:
        return None
    return max(1 - below, above - 1) * half


def rate_caught(n: int) -> float:
    """Rate of an event that must never happen, from which `n` draws show it with probability `POWER`."""
    return float(1 - (1 - POWER) ** (1 / n))
