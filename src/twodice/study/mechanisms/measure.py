"""All measures of one trained model, on a small keyed part of the held-out text.

What is looked at (windows, documents, heads, units, noise, masks) is the same for every arm and every seed,
so that what differs is the model. The cost is bounded: about as many passes over a few windows as some
twenty steps of training take.

Letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from twodice.dropout.places import Inventory
from twodice.dropout.plan import DropoutPlan
from twodice.dropout.sites import find
from twodice.errors import ConfigError
from twodice.generation.load import load
from twodice.random.keys import Key
from twodice.random.permutation import permute
from twodice.study.arms import rate_is_live
from twodice.study.mechanisms import ablation, correlation, heads, shift
from twodice.study.mechanisms.ensemble import Ensemble, compare_with_draws
from twodice.study.mechanisms.measures import DRAWS, NOISE, REFERENCE_PLAN
from twodice.training.config import read_config
from twodice.training.evaluate import IGNORED, nats, split_window
from twodice.training.run_folder import CONFIG
from twodice.training.step import choose_device

#: What is looked at, at most.
WINDOWS, QUERIES, HEADS, UNITS, CORRELATED = 8, 32, 16, 32, 128
#: Windows x T x V of the logits of one pass, at most, unless one window is more.
LOGITS = 1 << 22
#: Characters of text with noise and of another domain; a long context takes more.
CHARACTERS = 4096
_KEY = Key(0).child("mechanisms")


@dataclass(frozen=True)
class Mechanisms:
    """What was measured; each field is a `measures.MEASURES`, None where this model has no such thing."""

    head_similarity: float | None
    head_entropy: float | None
    head_removed: float | None
    head_removed_most: float | None
    unit_removed: float | None
    unit_correlation: float | None
    noise_loss: float
    noise_rise: float
    domain_loss: float
    ensemble_gain: float | None
    ensemble_distance: float | None
    own_ensemble_gain: float | None


def measure_trial(out: str | Path, store: Any) -> Mechanisms:
    """Measure the exported model, that of the best step, of a finished run, with the run's own plan."""
    out = Path(out)
    config = read_config(out / CONFIG)
    assert config.context is not None
    model = load(out).model.to(choose_device(config.device))
    plan, sources = DropoutPlan.parse(config.dropout), [str(source) for source in config.data]
    return measure(model, store, config.context, plan, sources, total_steps=config.steps)


@torch.no_grad()
def measure(
    model: nn.Module,
    store: Any,
    context: int,
    plan: DropoutPlan,
    sources: Sequence[str],
    *,
    total_steps: int | None = None,
) -> Mechanisms:
    """Take all measures of a model and leave it as it was.

    Parameters
    ----------
    model
        A causal language model, not attached.
    store
        The text; validation text B is looked at.
    context
        T, tokens of a window.
    plan
        What it was trained with.
    sources
        Names of the text that it was trained on, which another domain must not be.
    total_steps
        Length of the run, for schedules that speak of fractions of it.

    *Randomness.* All choices are made by ``Key(0).child("mechanisms")`` and its children, the masks of the
    ensemble by seed 0: the same for every model.
    """
    was_training = model.training
    model.eval()
    try:
        found = find(model)
        inputs, targets = _windows(store, context)
        device = next(model.parameters()).device
        inputs, targets = inputs.to(device), targets.to(device)
        rows = max(1, min(len(inputs), LOGITS // (context * store.vocabulary)))
        inputs, targets = inputs[:rows], targets[:rows]

        def run() -> Any:
            return model(input_ids=inputs, use_cache=False)

        def loss() -> float:
            return float(nats(run().logits.double(), targets)) / max(1, int((targets != IGNORED).sum()))

        queries = torch.linspace(1, context - 1, min(QUERIES, max(1, context - 1))).round().long()
        alike, wide = heads.read_heads(model, found, run, queries.unique().to(device))
        lone_heads, lone_units = _removed(found, loss)
        noise_loss, noise_rise, domain_loss = _shifted(model, store, context, sources, rows)
        batch = {"input_ids": inputs, "use_cache": False}
        reference = _ensemble(model, DropoutPlan.parse(REFERENCE_PLAN), batch, targets, total_steps)
        own = None
        if any(rate_is_live(str(entry.schedule)) for entry in plan.entries):
            own = _ensemble(model, plan, batch, targets, total_steps)
        return Mechanisms(
            head_similarity=alike,
            head_entropy=wide,
            head_removed=float(np.mean(lone_heads)) if lone_heads else None,
            head_removed_most=max(lone_heads) if lone_heads else None,
            unit_removed=float(np.mean(lone_units)) if lone_units else None,
            unit_correlation=correlation.read_units(found, run, CORRELATED, _KEY.child("correlated")),
            noise_loss=noise_loss,
            noise_rise=noise_rise,
            domain_loss=domain_loss,
            ensemble_gain=None if reference is None else reference.gain,
            ensemble_distance=None if reference is None else reference.distance,
            own_ensemble_gain=None if own is None else own.gain,
        )
    finally:
        model.train(was_training)


def _windows(store: Any, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a few windows of validation text B."""
    split = store.splits["validation_b"]
    there = split.num_windows(context)
    places = permute(_KEY.child("windows"), np.arange(min(WINDOWS, there)), there)
    tokens = torch.from_numpy(np.ascontiguousarray(split.windows(places, context)))
    return split_window(tokens, split.loss_mask(places, context))


def _removed(found: Inventory, loss: Callable[[], float]) -> tuple[list[float], list[float]]:
    heads_there, units_there = ablation.heads_of(found), ablation.units_of(found)
    lone_heads = ablation.rises(ablation.chosen(heads_there, HEADS, _KEY.child("heads")), loss)
    lone_units = ablation.rises(ablation.chosen(units_there, UNITS, _KEY.child("units")), loss)
    return lone_heads, lone_units


def _shifted(
    model: nn.Module, store: Any, context: int, sources: Sequence[str], rows: int
) -> tuple[float, float, float]:
    """Loss on noisy text, what the noise adds, loss on another domain [bits per byte]."""
    characters = max(CHARACTERS, 4 * context)
    texts = shift.sample_text(store.texts("validation_b"), characters, _KEY.child("text"))
    alphabet = "".join(texts)
    noise = _KEY.child("noise")
    spoilt = [shift.noisy(text, NOISE, alphabet, noise.child(i)) for i, text in enumerate(texts)]
    other = shift.domain_text(sources, characters)
    plain, noisy, domain = (
        shift.bits_per_byte(model, store.tokenizer, some, context, rows) for some in (texts, spoilt, [other])
    )
    return noisy, noisy - plain, domain


def _ensemble(
    model: nn.Module, plan: DropoutPlan, batch: Any, targets: torch.Tensor, total_steps: int | None
) -> Ensemble | None:
    """None where the model has no such sites."""
    try:
        return compare_with_draws(model, plan, batch, targets, DRAWS, total_steps=total_steps)
    except ConfigError:
        return None
