"""Monte Carlo dropout: what a model believes under many fixed sets of masks, and how much they disagree.

The model is in eval mode (norms, its own dropout and everything else as when it is used) and the sites of the
plan drop all the same. Knows the state of an attachment, no model.

Letters: B rows, K draws, T positions, V classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from twodice.dropout.step import MONTE_CARLO
from twodice.errors import ConfigError, ContractError, ShapeError

if TYPE_CHECKING:
    from twodice.dropout.state import State


@dataclass(frozen=True, eq=False)
class MonteCarlo:
    """What K draws of masks give.

    Attributes
    ----------
    mean : float32 tensor (B, ..., V)
        The mean of the K distributions.
    entropy : float32 tensor (B, ...)
        Predictive entropy, of `mean` [nats]: all uncertainty.
    mutual_information : float32 tensor (B, ...)
        Entropy of the mean less the mean of the entropies [nats], at least 0: the part of the uncertainty on
        which the draws disagree (Houlsby et al. 2011; Gal and Ghahramani 2016).
    draws : int
        K.
    """

    mean: torch.Tensor
    entropy: torch.Tensor
    mutual_information: torch.Tensor
    draws: int


def monte_carlo(
    state: State,
    model: nn.Module,
    batch: Any,
    draws: int,
    *,
    per_pass: int = 1,
    logits: Callable[[Any], torch.Tensor] | None = None,
) -> MonteCarlo:
    """Run a model under K fixed sets of masks and sum up what it believes.

    `state` is that of the attachment; everything else stands at `Handle.monte_carlo`, which users call.
    """
    for name, number in (("draws", draws), ("per_pass", per_pass)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigError(f"{name} must be an integer of 1 or more; got {number!r}")
    if not state.attached:
        raise ContractError("Monte Carlo needs an attached model; this one was detached; call attach again")
    if state.snapshot is not None or state.saved:
        raise ContractError("Monte Carlo must not run inside a step; leave it first")
    if not any(module is state.root() for module in model.modules()):
        raise ConfigError(
            f"the model must be the one that the handle was made for, or hold it; got another "
            f"{type(model).__name__}; use the handle of its own attach"
        )
    if not state.sites:
        raise ConfigError("Monte Carlo needs a plan that drops something; its draws would all be equal")
    if per_pass > 1:
        _refuse_shared(state)
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    state.drawing = True
    try:
        return _run(state, model, batch, draws, per_pass, logits)
    finally:
        state.drawing = False
        for module in was_training:
            module.training = True


def _refuse_shared(state: State) -> None:
    for site in state.sites:
        if site.kind == "weight" or (site.kind == "layer" and site.entry.noise == "batch"):
            raise ConfigError(
                f"draws in one pass must not share what they drop; all rows share {site.name!r}; run one "
                "draw a pass (per_pass=1)"
            )


def _run(state: State, model: nn.Module, batch: Any, draws: int, per_pass: int, logits: Any) -> MonteCarlo:
    rows = _rows(batch)
    total = entropies = None
    with torch.no_grad():
        for first in range(0, draws, per_pass):
            count = min(per_pass, draws - first)
            result = _forward(state, model, batch, rows, first, count)
            found = _logits(result, logits)
            if found.shape[0] != count * rows:
                raise ShapeError(
                    f"the logits must have one row for each input ({count * rows}); got {tuple(found.shape)}"
                )
            beliefs = torch.log_softmax(found.float(), dim=-1).unflatten(0, (count, rows)).double()
            chances = beliefs.exp()
            each = -torch.where(chances > 0, chances * beliefs, 0.0).sum(-1)
            total = chances.sum(0) if total is None else total + chances.sum(0)
            entropies = each.sum(0) if entropies is None else entropies + each.sum(0)
    assert total is not None and entropies is not None
    mean = total / draws
    entropy = -torch.where(mean > 0, mean * mean.log(), 0.0).sum(-1)
    shared = (entropy - entropies / draws).clamp(min=0)
    return MonteCarlo(mean.float(), entropy.float(), shared.float(), draws)


def _forward(state: State, model: nn.Module, batch: Any, rows: int, first: int, count: int) -> Any:
    """One pass of the model, with draws first .. first + count - 1."""
    step: int | torch.Tensor = first
    if count > 1:
        step = torch.arange(first, first + count).repeat_interleave(rows)
    examples = torch.zeros(count * rows, dtype=torch.int64)
    snapshot = state.snapshot_of(step, MONTE_CARLO, lambda schedule: schedule.peak, examples, {})
    state.switch_on()
    state.snapshot = snapshot
    try:
        repeated = _repeated(batch, rows, count)
        if isinstance(repeated, Mapping):
            return model(**repeated)
        return model(repeated)
    finally:
        state.snapshot = None
        state.frame = None
        state.switch_off()


def _rows(batch: Any) -> int:
    first = (
        next((v for v in batch.values() if isinstance(v, torch.Tensor) and v.dim()), None)
        if isinstance(batch, Mapping)
        else batch
    )
    if not isinstance(first, torch.Tensor) or not first.dim():
        raise ShapeError(
            "a batch must be a tensor, or a mapping that holds one, with its rows first; got "
            f"{type(batch).__name__}"
        )
    return first.shape[0]


def _repeated(batch: Any, rows: int, count: int) -> Any:
    if isinstance(batch, Mapping):
        return {name: _repeated(value, rows, count) for name, value in batch.items()}
    if count > 1 and isinstance(batch, torch.Tensor) and batch.dim() and batch.shape[0] == rows:
        return batch.repeat(count, *(1,) * (batch.dim() - 1))
    return batch


def _logits(result: Any, logits: Any) -> torch.Tensor:
    found = result if logits is None else logits(result)
    if logits is None and not isinstance(found, torch.Tensor):
        found = getattr(result, "logits", None)
    if not isinstance(found, torch.Tensor):
        raise ShapeError(
            f"the model's result must be logits or hold them as .logits; got {type(result).__name__}; pass "
            "logits=lambda result: ..."
        )
    return found
