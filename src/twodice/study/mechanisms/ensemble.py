"""The implicit ensemble: the model with its weights scaled against the mean of many thinned ones.

In eval mode a model stands for all networks that dropout could have made of it. Here K of these are drawn and
averaged, in two ways. Knows no text.

Letters: B rows, T positions, V classes, K draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from twodice.dropout.attach import attach
from twodice.dropout.plan import DropoutPlan
from twodice.training.evaluate import IGNORED


@dataclass(frozen=True)
class Ensemble:
    """Weight scaling against K draws of masks.

    Attributes
    ----------
    gain : float
        Loss of the mean of the K distributions less that of weight scaling [nats per target]; below 0 the
        average is better than the one pass.
    distance : float
        Kullback-Leibler divergence of weight scaling from the normalised geometric mean of the K
        distributions [nats per target], at least 0. It is 0 (but for K) where weight scaling is exact, as in
        a model that is linear behind its dropout.
    """

    gain: float
    distance: float


def compare_with_draws(
    model: nn.Module,
    plan: DropoutPlan | str,
    batch: Any,
    targets_BT: torch.Tensor,
    draws: int,
    *,
    seed: int = 0,
    total_steps: int | None = None,
) -> Ensemble:
    """Hold a model's one pass against the mean of `draws` passes under the masks of a plan.

    Parameters
    ----------
    model
        Not attached; it is left as it was.
    plan
        What is dropped; the rates are the highest of its schedules.
    batch
        The model's inputs, as `Handle.monte_carlo` takes them.
    targets_BT
        Classes; those that are `IGNORED` do not count.
    draws
        K.
    seed, total_steps
        As `attach` takes them.

    Notes
    -----
    Srivastava et al. 2014 (JMLR 15), section 7.5, hold weight scaling against the arithmetic mean of draws;
    Baldi and Sadowski 2013 and Warde-Farley et al. 2014 (arXiv 1312.6197) against the geometric one, which it
    equals where logits are linear in what is dropped.

    *Randomness.* That of `Handle.monte_carlo` with `seed`: the masks are the same for every model with the
    same sites.
    """
    was_training = model.training
    model.eval()
    geometric: list[torch.Tensor] = []

    def keep(result: Any) -> torch.Tensor:
        logits = _logits(result)
        logs = torch.log_softmax(logits.float(), dim=-1)
        if geometric:
            geometric[0] += logs
        else:
            geometric.append(logs)
        return logits

    try:
        with torch.no_grad():
            result = model(**batch) if isinstance(batch, dict) else model(batch)
            scaled = torch.log_softmax(_logits(result).float(), dim=-1)
            handle = attach(model, plan, seed, total_steps=total_steps)
            try:
                mean = handle.monte_carlo(model, batch, draws, logits=keep).mean
            finally:
                handle.detach()
    finally:
        model.train(was_training)
    middle = torch.log_softmax(geometric[0] / draws, dim=-1)
    counts = targets_BT != IGNORED
    chosen = targets_BT.clamp(min=0)[..., None]
    of_mean = mean.clamp(min=torch.finfo(mean.dtype).tiny).log().gather(-1, chosen)[..., 0]
    of_one = scaled.gather(-1, chosen)[..., 0]
    apart = (middle.exp() * (middle - scaled)).sum(-1)
    return Ensemble(
        gain=float((of_one - of_mean)[counts].double().mean()),
        distance=max(0.0, float(apart[counts].double().mean())),
    )


def _logits(result: Any) -> torch.Tensor:
    found: torch.Tensor = result if isinstance(result, torch.Tensor) else result.logits
    return found
