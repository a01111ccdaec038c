"""How alike the attention heads of a layer are, and how widely each of them looks.

Reads the weights where the dropout wing's table says that attention is; the model is asked for its eager
attention while they are read, because a fused one never holds them. Knows no text and no plan.

Letters: B rows, H heads, T queries, S keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from twodice.dropout.places import Inventory


def similarity(weights_BHTS: torch.Tensor) -> float | None:
    """How alike the heads of one layer are: 1 less the Jensen-Shannon divergence of two, over ln 2.

    Parameters
    ----------
    weights_BHTS
        Attention weights; each query's sum to 1.

    Returns
    -------
    float or None
        In [0, 1], the mean over all pairs of heads, queries and rows: 1 where all heads attend alike, 0 where
        no two of them share a key. None with one head.

    Notes
    -----
    The distance of heads of Clark et al. 2019, "What does BERT look at?" (arXiv 1906.04341), section 6, on a
    scale from 0 to 1. It compares where heads look, not what they read there.
    """
    weights = weights_BHTS.double()
    count = weights.shape[1]
    if count < 2:
        return None
    own = _entropies(weights)
    total, pairs = 0.0, 0
    for head in range(count - 1):
        middle = (weights[:, head : head + 1] + weights[:, head + 1 :]) / 2
        apart = _entropies(middle) - (own[:, head : head + 1] + own[:, head + 1 :]) / 2
        total += float(apart.sum())
        pairs += apart.numel()
    return min(1.0, max(0.0, 1 - total / pairs / math.log(2)))


def entropy(weights_BHTS: torch.Tensor) -> float:
    """Mean entropy of a query's attention weights [nats], over heads, queries and rows.

    0 where every query looks at one key, ln S where all S keys that it sees get the same weight. How narrow
    heads are, after Voita et al. 2019, "Analyzing multi-head self-attention" (arXiv 1905.09418), who use the
    largest weight.
    """
    return float(_entropies(weights_BHTS.double()).mean())


def _entropies(weights: torch.Tensor) -> torch.Tensor:
    each: torch.Tensor = torch.special.xlogy(weights, weights)
    return -each.sum(-1)


def read_heads(
    model: nn.Module, found: Inventory, run: Callable[[], Any], queries: torch.Tensor
) -> tuple[float | None, float | None]:
    """Similarity and entropy of a model's heads, means over its layers.

    Parameters
    ----------
    model
        In eval mode.
    found
        Its sites.
    run
        Runs it once.
    queries
        Positions of the queries that are looked at.

    Returns
    -------
    similarity, entropy : float or None
        None where no layer shows its weights (or has one head only, for the similarity).
    """
    alike: list[float] = []
    wide: list[float] = []

    def look(_: nn.Module, __: Any, result: Any) -> None:
        weights = result[1] if isinstance(result, tuple) and len(result) > 1 else None
        if isinstance(weights, torch.Tensor) and weights.dim() == 4:
            seen = weights.detach()[:, :, queries]
            wide.append(entropy(seen))
            same = similarity(seen)
            if same is not None:
                alike.append(same)

    modules = [place.module for place in found.places if place.kind == "attention"]
    with ExitStack() as stack, eager(model):
        for module in modules:
            stack.callback(module.register_forward_hook(look).remove)
        run()
    return _mean(alike), _mean(wide)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Let a model of transformers use its eager attention inside, and what it used before afterwards."""
    config = getattr(model, "config", None)
    choose: Any = getattr(model, "set_attn_implementation", None)
    before = getattr(config, "_attn_implementation", None)
    if choose is None or before in (None, "eager"):
        yield
        return
    choose("eager")
    try:
        yield
    finally:
        choose(before)
