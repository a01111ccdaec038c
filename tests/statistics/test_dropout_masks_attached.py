"""The masks that a model gets by `attach`, and those of `twodice.dropout` and `twodice.attention`, are as
frequent and as independent as they claim.

Every test takes masks from a function, so that a saboteur can stand in for it and must be rejected. Seeds are
fixed, so a test that passes once passes always; the false-alarm probability is that of the choice of seeds. A
normal deviate beyond 6 has probability 2e-9; the tests here take about 250 of them: below 1e-6 in all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from scipy.stats import chi2, norm
from torch import nn

import twodice

LIMIT = 6.0
SITES, B, T, C = 4, 16, 32, 512  # 2^20 decisions a forward, 2^18 a site
Draw = Callable[[float, int, range], torch.Tensor]  # (rate, step, examples) -> (SITES, B, T, C) multipliers
ONES = torch.ones(B, T, C)


class Layers(nn.Module):
    """Dropout modules side by side: what each does to ones."""

    def __init__(self, sites: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Dropout(0.5) for _ in range(sites))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([module(x) for module in self.each])


def attached(p: float, step: int, examples: Iterable[int], seed: int = 3, draw: int = 0) -> torch.Tensor:
    model = Layers(SITES).train()
    handle = twodice.attach(model, {"dropout": p}, seed=seed)
    with handle.step(step, examples=[*examples], draw=draw):
        found = model(ONES)
    handle.detach()
    return found


def functional(p: float, step: int, examples: Iterable[int]) -> torch.Tensor:
    slots = torch.tensor([*examples])
    keys = [twodice.Key(4).child("layer", layer) for layer in range(SITES)]
    return torch.stack([twodice.dropout(ONES, p, key=key, step=step, examples=slots) for key in keys])


def weights(p: float, step: int, examples: Iterable[int]) -> torch.Tensor:
    """Attention's weights, the heads as sites: all scores are equal and value s is the s-th unit vector, so
    column s of the result is weight s, times the number of keys.
    """
    heads, queries, keys = SITES, T, C
    nothing = torch.zeros(B, heads, queries, 4), torch.zeros(B, heads, keys, 4)
    value = torch.eye(keys).expand(B, heads, keys, keys)
    found = twodice.attention(
        *nothing, value, p, key=twodice.Key(5), step=step, examples=torch.tensor([*examples]), causal=False
    )
    return found.transpose(0, 1) * keys


def rank(number: int) -> range:
    """The examples of a rank's only micro-batch."""
    return range(number * B, (number + 1) * B)


OURS = [attached, functional, weights]


# Saboteurs.


def same_on_all_ranks(p: float, step: int, examples: range) -> torch.Tensor:
    """Each rank counts its rows from 0."""
    return attached(p, step, range(B))


def same_at_every_step(p: float, step: int, examples: range) -> torch.Tensor:
    return attached(p, 0, examples)


def same_in_all_layers(p: float, step: int, examples: range) -> torch.Tensor:
    return attached(p, step, examples)[:1].expand(SITES, B, T, C)


def step_and_example_in_one_number(p: float, step: int, examples: range) -> torch.Tensor:
    """Example e of step s is example e - 1 of step s + 1."""
    return attached(p, 0, [step + example for example in examples])


def layers_shifted(p: float, step: int, examples: range) -> torch.Tensor:
    """Layer l has the masks of layer 0, l columns on: one stream that is read from an offset."""
    first = attached(p, step, examples)[0]
    return torch.stack([first.roll(layer, -1) for layer in range(SITES)])


def same_for_neighbours(p: float, step: int, examples: range) -> torch.Tensor:
    return attached(p, step, examples)[:, :, ::2].repeat_interleave(2, dim=2)


def same_for_pairs_of_examples(p: float, step: int, examples: range) -> torch.Tensor:
    return attached(p, step, [example // 2 for example in examples])


def lanes_reused(p: float, step: int, examples: range) -> torch.Tensor:
    return attached(p, step, examples)[..., ::8].repeat_interleave(8, dim=-1)


def rate_of_one_layer_is_off(p: float, step: int, examples: range) -> torch.Tensor:
    found = attached(p, step, examples).clone()
    found[2] = attached(p * 1.02, step, examples)[2]
    return found


def eight_bits(p: float, step: int, examples: range) -> torch.Tensor:
    return attached(round(p * 256) / 256, step, examples)


def not_scaled(p: float, step: int, examples: range) -> torch.Tensor:
    return attached(p, step, examples) * (1 - p)


def scaled_too_much(p: float, step: int, examples: range) -> torch.Tensor:
    """The scale of a rate that is one hundredth higher: by 1.1e-3 at p = 0.1."""
    found = attached(p, step, examples)
    return torch.where(found > 0, 1 / (1 - 1.01 * p), 0.0)


# What is asked.


def threshold(p: float) -> float:
    """The rate in force."""
    return round(p * 65536) / 65536


def rate_deviates(draw: Draw) -> list[float]:
    """Is the share of what is dropped t / 65536, in all and at each site? 8 steps: 2^23 decisions.

    Smallest defects caught at 6 standard errors: 6.3e-4 at p = 0.1 in all, 1.3e-3 at one site.
    """
    found = []
    for p in (0.1, 0.5):
        rate = threshold(p)
        dropped = sum((draw(p, step, rank(0)) == 0).sum((1, 2, 3)).double() for step in range(8))
        assert isinstance(dropped, torch.Tensor)
        each = 8 * B * T * C
        for count, draws in ((dropped.sum(), SITES * each), *((d, each) for d in dropped)):
            found.append(float(count - draws * rate) / math.sqrt(draws * rate * (1 - rate)))
    return found


def mean_deviates(draw: Draw) -> list[float]:
    """Is the mean of what becomes of ones 1? Caught at p = 0.1: a scale wrong by 7e-4."""
    found = []
    for p in (0.1, 1 / 3, 0.9):
        rate = threshold(p)
        total = sum(float(draw(p, step, rank(0)).sum(dtype=torch.float64)) for step in range(8))
        draws = 8 * SITES * B * T * C
        found.append((total / draws - 1) / math.sqrt(rate / (1 - rate) / draws))
    return found


def independence_deviates(draw: Draw) -> list[float]:
    """Are neighbours along every coordinate uncorrelated? A correlation of 0.012 (2^18 pairs) is caught."""
    found = []
    for p in (0.1, 0.5):
        rate = threshold(p)

        def mask(step: int, number: int = 0, p: float = p) -> torch.Tensor:
            return (draw(p, step, rank(number)) == 0).float() - threshold(p)

        def add(a: torch.Tensor, b: torch.Tensor, rate: float = rate) -> None:
            product = (a * b).sum(dtype=torch.float64)
            found.append(float(product) / (rate * (1 - rate) * math.sqrt(a.numel())))

        m, later, other = mask(5), mask(6), mask(5, 1)
        for lag in (1, 2, 4, 8, 64):
            add(m[..., lag:], m[..., :-lag])  # columns
        for lag in (1, 2, 8):
            add(m[:, :, lag:], m[:, :, :-lag])  # positions
            add(m[:, lag:], m[:, :-lag])  # examples
        for a, b in itertools.combinations(range(SITES), 2):
            add(m[a], m[b])  # sites and layers, at equal coordinates
            add(m[a][..., : -(b - a)], m[b][..., b - a :])  # and as far apart as their numbers
        add(m, later)  # steps
        add(m[:, 1:], later[:, :-1])
        add(m, mask(5 + 2**16))
        add(m, other)  # ranks
        add(later[:, :-1], other[:, 1:])
    return found


@pytest.mark.parametrize("draw", OURS)
@pytest.mark.parametrize("deviates", [rate_deviates, mean_deviates, independence_deviates])
def test_ours_is_not_rejected(draw: Draw, deviates: Callable[[Draw], list[float]]) -> None:
    found = deviates(draw)
    assert len(found) < 80 and max(map(abs, found)) < LIMIT


@pytest.mark.parametrize("saboteur", [rate_of_one_layer_is_off, eight_bits])
def test_a_wrong_rate_is_rejected(saboteur: Draw) -> None:
    assert max(map(abs, rate_deviates(saboteur))) > LIMIT


@pytest.mark.parametrize("saboteur", [not_scaled, scaled_too_much])
def test_a_wrong_mean_is_rejected(saboteur: Draw) -> None:
    assert max(map(abs, mean_deviates(saboteur))) > LIMIT


@pytest.mark.parametrize(
    "saboteur",
    [
        same_on_all_ranks,
        same_at_every_step,
        same_in_all_layers,
        step_and_example_in_one_number,
        layers_shifted,
        same_for_neighbours,
        same_for_pairs_of_examples,
        lanes_reused,
    ],
)
def test_masks_that_depend_on_each_other_are_rejected(saboteur: Draw) -> None:
    assert max(map(abs, independence_deviates(saboteur))) > LIMIT


def test_seeds_and_draws_give_masks_of_their_own() -> None:
    """Pairs of seeds that are neighbours, and of draws; the saboteur ignores the draw."""
    masks = [(attached(0.5, 5, rank(0), *which) == 0).float() - 0.5 for which in ((3, 0), (4, 0), (3, 1))]
    pairs = [*itertools.combinations(masks, 2), (masks[0], masks[0])]
    found = [float((a * b).sum(dtype=torch.float64)) * 4 / math.sqrt(a.numel()) for a, b in pairs]
    assert max(map(abs, found[:3])) < LIMIT < found[3]


# 10^8 draws.


def large_deviates(draw: Draw, p: float = 0.1, steps: int = 96) -> dict[str, float]:
    """96 forwards of 2^20: rate, counts along each coordinate, and neighbours.

    Smallest defects caught at 6 standard errors: a rate off by 1.8e-4, a correlation of neighbours of 6e-4.
    Counts along a coordinate are summed up by chi-square, which is told as the normal deviate of equal
    probability.
    """
    rate = threshold(p)
    variance = rate * (1 - rate)
    counts = {"site": 0.0, "example": 0.0, "position": 0.0, "column": 0.0}
    pairs: dict[str, tuple[float, int]] = {}
    before = None
    for step in range(steps):
        m = (draw(p, step, rank(step % 3)) == 0).float() - rate
        for axis, name in enumerate(counts):
            over = [other for other in range(4) if other != axis]
            counts[name] = counts[name] + m.sum(over, dtype=torch.float64)
        both = {name: (m.narrow(axis, 1, m.shape[axis] - 1), m.narrow(axis, 0, m.shape[axis] - 1))
                for axis, name in enumerate(counts)}  # fmt: skip
        if before is not None:
            both["step"] = m, before
        for name, (a, b) in both.items():
            total, number = pairs.get(name, (0.0, 0))
            pairs[name] = total + float((a * b).sum(dtype=torch.float64)), number + a.numel()
        before = m
    draws = steps * SITES * B * T * C
    found = {"rate": float(counts["site"].sum()) / math.sqrt(draws * variance)}  # type: ignore[attr-defined]
    for name, count in counts.items():
        assert isinstance(count, torch.Tensor)
        cells = len(count)
        chi = float((count**2).sum()) / (draws / cells * variance)
        found[f"counts by {name}"] = float(norm.isf(chi2.sf(chi, cells)))
    for name, (total, number) in pairs.items():
        found[f"neighbours by {name}"] = total / (variance * math.sqrt(number))
    return found


def slightly_too_often(p: float, step: int, examples: range) -> torch.Tensor:
    """A threshold too high by 16 of 65,536."""
    return attached(p + 2**-12, step, examples)


def one_column_in_512(p: float, step: int, examples: range) -> torch.Tensor:
    """One column of 512 at p = 0.11."""
    found = attached(p, step, examples)
    found[..., 100] = attached(0.11, step, examples)[..., 100]
    return found


def one_pair_in_a_thousand(p: float, step: int, examples: range) -> torch.Tensor:
    """One column repeats the one before it."""
    found = attached(p, step, examples)
    found[..., 301] = found[..., 300]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("draw", [attached, functional])
def test_a_hundred_million_draws_are_not_rejected(draw: Draw) -> None:
    found = large_deviates(draw)
    assert all(abs(deviate) < LIMIT for deviate in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saboteur", "by"),
    [
        (slightly_too_often, "rate"),
        (one_column_in_512, "counts by column"),
        (one_pair_in_a_thousand, "neighbours by column"),
    ],
)
def test_small_defects_are_rejected_by_a_hundred_million_draws(saboteur: Draw, by: str) -> None:
    assert abs(large_deviates(saboteur)[by]) > LIMIT
