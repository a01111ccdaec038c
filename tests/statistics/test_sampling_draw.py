"""The tokens drawn follow the distribution that is claimed; broken samplers are rejected by the same test.

The test: fixed seeds, N draws per setting at positions 0 .. N-1. Hypothesis: the tokens are independent draws
from the softmax over the kept set, computed here in float64 from the definitions alone. Cells: each kept
token with an expected count of at least 25 is a cell; the rest, by falling probability, are pooled into
strata of at least 25, so the tail has cells of its own; a token outside the kept set rejects at once.
Pearson's chi-square at level 5e-8. Beside it, the pooled tail (the least probable tokens with together at
most 10 % of the mass) is tested alone by a two-sided exact binomial at 5e-8. With 7 settings and 3 tests of
independence the false alarm of the whole file is below 1e-6 .

Smallest defects that are caught (power above 0.999 at N = 60,000): a tail of 10 % mass that is 10 % too light
is a shift of 600 in 6,000, 8 standard errors. Each is shown by a saboteur below.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chi2

from twodice.random import noise
from twodice.sampling.chain import key_of
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample

N = 60_000
LEVEL = 5e-8
V = 200
Sampler = Callable[[torch.Tensor, SamplingParams, torch.Tensor], torch.Tensor]

GENERATOR = np.random.default_rng(2026)
NORMAL = np.sort(GENERATOR.normal(size=V) * 1.5)
TIED = np.round(NORMAL * 2) / 2
# The first cut from 8 on that goes through a group of equals.
TIE = next(k for k in range(8, V) if np.sort(TIED)[-k] == np.sort(TIED)[-k - 1])
SETTINGS = {
    "plain": (NORMAL, SamplingParams(seed=11)),
    "temperature": (NORMAL, SamplingParams(temperature=1.7, seed=12)),
    "top-k at a tie": (TIED, SamplingParams(top_k=TIE, seed=13)),
    "top-p": (NORMAL, SamplingParams(top_p=0.9, seed=14)),
    "all": (NORMAL, SamplingParams(temperature=2.0, top_k=60, top_p=0.9, min_p=0.05, seed=15)),
    "short": (GENERATOR.normal(size=24) * 1.5, SamplingParams(seed=17)),
    "two": (np.array([0.0, -3.0]), SamplingParams(seed=16)),
}


def claimed(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution of the contract, from its words, in float64."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    z = (logits - logits.max()) / params.temperature
    p = np.exp(z) / np.exp(z).sum()
    kept = np.ones(len(logits), bool)
    if params.top_k:
        kept[order[params.top_k :]] = False
    if params.top_p is not None:
        q = np.where(kept, p, 0) / p[kept].sum()
        before = np.concatenate([[0], q[order].cumsum()[:-1]])
        kept[order[before >= params.top_p]] = False
    if params.min_p is not None:
        kept &= p >= params.min_p * p.max()
    p = np.where(kept, p, 0)
    return p / p.sum()


def p_value(tokens: np.ndarray, p: np.ndarray) -> float:
    """The smaller p-value of chi-square and binomial of the tail; 0 where a forbidden token came."""
    counts = np.bincount(tokens, minlength=len(p))
    if counts[p == 0].any():
        return 0.0
    order = np.argsort(-p[p > 0], kind="stable")
    expected, seen = p[p > 0][order] * len(tokens), counts[p > 0][order]
    cells: list[list[float]] = []
    for e, s in zip(expected, seen, strict=True):
        if cells and cells[-1][0] < 25:
            cells[-1][0] += e
            cells[-1][1] += s
        else:
            cells.append([e, float(s)])
    if len(cells) > 1 and cells[-1][0] < 25:
        e, s = cells.pop()
        cells[-1][0] += e
        cells[-1][1] += s
    table = np.array(cells)
    first = 1.0
    if len(table) > 1:
        first = float(chi2.sf(((table[:, 1] - table[:, 0]) ** 2 / table[:, 0]).sum(), len(table) - 1))
    share = expected[::-1].cumsum() / len(tokens)
    tail = int((share <= 0.1).sum())
    if tail == 0:
        return first
    mass, hits = float(share[tail - 1]), int(seen[::-1][:tail].sum())
    return min(first, float(binomtest(hits, len(tokens), mass).pvalue))


def ours(logits: torch.Tensor, params: SamplingParams, position: torch.Tensor) -> torch.Tensor:
    return sample(logits, params, position).tokens


def draw(sampler: Sampler, logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    x = torch.from_numpy(logits).to(torch.float32).expand(N, len(logits))
    return sampler(x, params, torch.arange(N)).numpy()


def verdict(sampler: Sampler, name: str) -> float:
    logits, params = SETTINGS[name]
    return p_value(draw(sampler, logits, params), claimed(logits.astype(np.float32).astype(float), params))


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_follow_the_distribution_that_is_claimed(name: str) -> None:
    assert verdict(ours, name) > LEVEL


def scores(
    logits: torch.Tensor, params: SamplingParams, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """z and Gumbel noise of a sampler without filters, as the saboteurs take it."""
    assert params.seed is not None
    ids = torch.arange(logits.shape[1])[None]
    g = noise.gumbel(ids, position[:, None], 0, 0, key_of(params.seed))
    return logits.double() / params.temperature, g


def tail_missing(logits: torch.Tensor, params: SamplingParams, position: torch.Tensor) -> torch.Tensor:
    """One tail token in ten is replaced by the most probable one."""
    tokens = ours(logits, params, position)
    ranks = logits[0].argsort(descending=True).argsort()
    lost = (ranks[tokens] > 45) & (position % 10 == 0)
    return torch.where(lost, logits[0].argmax(), tokens)


def k_off_by_one(logits: torch.Tensor, params: SamplingParams, position: torch.Tensor) -> torch.Tensor:
    return ours(logits, SamplingParams(top_k=(params.top_k or 0) + 1, seed=params.seed), position)


def ties_kept(logits: torch.Tensor, params: SamplingParams, position: torch.Tensor) -> torch.Tensor:
    assert params.top_k
    least = logits[0].topk(params.top_k).values[-1]
    return ours(torch.where(logits >= least, logits, -torch.inf), SamplingParams(seed=params.seed), position)


def temperature_late(logits: torch.Tensor, params: SamplingParams, position: torch.Tensor) -> torch.Tensor:
    plain = SamplingParams(top_k=params.top_k, top_p=params.top_p, seed=0)
    kept = sample(logits[:1], plain, 0, need=("kept",)).kept
    assert kept is not None
    ids = kept[1].tolist()
    late = SamplingParams(temperature=params.temperature, allowed_tokens=ids, min_p=params.min_p, seed=1)
    return ours(logits, late, position)


def noise_by_rank(logits: torch.Tensor, params: SamplingParams, position: torch.Tensor) -> torch.Tensor:
    """Noise indexed by the place in the sorted row, cut to 16 places as a fused kernel's table would be."""
    z, g = scores(logits, params, position)
    order = z[0].argsort(descending=True)
    return order[(z[:, order] + g[:, torch.arange(z.shape[1]) % 16]).argmax(1)]


def equal_noise(logits: torch.Tensor, params: SamplingParams, position: torch.Tensor) -> torch.Tensor:
    return ours(logits[:1], params, torch.zeros(1, dtype=torch.int64)).expand(len(position))


def biased_gumbel(logits: torch.Tensor, params: SamplingParams, position: torch.Tensor) -> torch.Tensor:
    z, g = scores(logits, params, position)
    return (z + 0.95 * g).argmax(1)


def crossing_dropped(logits: torch.Tensor, params: SamplingParams, position: torch.Tensor) -> torch.Tensor:
    kept = sample(logits[:1], params, 0, need=("kept",)).kept
    assert kept is not None
    return ours(logits, SamplingParams(allowed_tokens=kept[1].tolist()[:-1], seed=1), position)


@pytest.mark.parametrize(
    ("saboteur", "name"),
    [
        (tail_missing, "plain"),
        (k_off_by_one, "top-k at a tie"),
        (ties_kept, "top-k at a tie"),
        (temperature_late, "all"),
        (noise_by_rank, "short"),
        (equal_noise, "plain"),
        (biased_gumbel, "short"),
        (crossing_dropped, "top-p"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_broken_sampler_is_rejected(saboteur: Sampler, name: str) -> None:
    assert verdict(saboteur, name) < LEVEL


def dependence(tokens: np.ndarray, other: np.ndarray, cells: int) -> float:
    """p-value of a chi-square test that two columns of tokens are independent."""
    table = np.zeros((cells, cells))
    np.add.at(table, (tokens, other), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    return float(chi2.sf(((table - expected) ** 2 / expected).sum(), (cells - 1) ** 2))


def test_draws_at_neighbouring_positions_seeds_and_completions_are_independent() -> None:
    """H0: independence, 4 x 4 tables of 60,000 pairs, level 5e-8 each; catches a correlation of 0.03."""
    x = torch.zeros(N, 4)
    at = torch.arange(N)
    base = sample(x, SamplingParams(seed=21), at).tokens.numpy()
    shifted = sample(x, SamplingParams(seed=21), at + 1).tokens.numpy()
    seeded = sample(x, SamplingParams(seed=22), at).tokens.numpy()
    completed = sample(x, SamplingParams(seed=21), at, completion=1).tokens.numpy()
    for other in (shifted, seeded, completed):
        assert dependence(base, other, 4) > LEVEL
    mixed = np.where(at.numpy() % 20 == 0, base, seeded)
    assert dependence(base, mixed, 4) < LEVEL, "one pair in twenty that is equal is caught"


@pytest.mark.parametrize("gap", [20.0, 30.0, 40.0])
@pytest.mark.parametrize("floor_bits", [64, 24])
def test_a_token_far_below_the_top_is_drawn_at_its_rate(gap: float, floor_bits: int) -> None:
    """By importance, not by waiting, and noise of 24 bits, the usual float32 uniform, is caught.

    A token `gap` nats below one other wins iff the other's exponential exceeds e^gap times its E, which has
    probability exp(-E e^gap). The mean of that over U, taken octave by octave with 4,000 draws each, must be
    1 / (1 + e^gap); its standard error is below 0.3 %, the tolerance 3 % (10 standard errors, below 1e-20).
    """
    generator = np.random.default_rng(1)
    mean = 0.0
    for octave in range(63):  # U in [2^(62 - octave), 2^(63 - octave)); the upper half of U adds nothing
        low = 2 ** (62 - octave)
        u = torch.from_numpy(generator.integers(low, 2 * low, 4000))
        if floor_bits < 64:
            u = (u >> (64 - floor_bits)) << (64 - floor_bits)
            u += 1 << (63 - floor_bits)
        e = torch.exp(-noise.gumbel_from_bits(u))
        mean += float(torch.exp(-e * np.exp(gap)).mean()) * 2.0 ** -(octave + 2)
    right = abs(mean * (1 + np.exp(gap)) - 1) < 0.03
    assert right == (floor_bits == 64)
