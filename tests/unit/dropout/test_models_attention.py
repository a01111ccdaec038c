"""Attention with dropout in every model that asks its config's attention function: what comes out is the
model's own eager attention with the weights dropped that `twodice.dropout` drops in layout ``bhts``.

Soft-capping, sinks, additive biases (T5), sliding windows, grouped queries, values narrower than keys
(DeepSeek), cross-attention and padding are all in there, on both roads that a model has.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.model_zoo import ZOO, Batch, gpt_oss
from torch import nn
from torch.nn import functional

import twodice
from twodice.dropout.sites import find

MODELS: dict[str, Any] = {**ZOO, "GPT-OSS": gpt_oss}
ASKING = [
    name for name in MODELS if not name.startswith(("nn.", "conv", "MLP", "BLOOM", "Falcon"))
]  # the others call no attention function; test_models_sites has their weights
RATE, STEP, SLOTS = 0.3, 5, [4, 2, 9]


def padded(batch: Batch) -> Batch:
    """The batch with keys that nobody may see: at the end of one row, at the start of another."""
    ids = batch.get("input_ids")
    if ids is None:
        return batch
    mask = torch.ones_like(ids)
    mask[0, -2:], mask[1, :3] = 0, 0
    labels = batch["labels"]
    if labels.shape == ids.shape:
        # What a query that sees no key gives is nobody's business: eager attention spreads it over all.
        labels = labels.masked_fill(mask == 0, -100)
        labels[1, 3] = -100
    return {**batch, "attention_mask": mask, "labels": labels}


def readable(name: str, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss and gradients of the eager model whose `functional.dropout` is thrown by the keys of the sites."""
    model, _ = MODELS[name](attn_implementation="eager")
    attending: list[str] = []
    for place in find(model).places:
        if place.kind == "attention":
            place.module.register_forward_pre_hook(lambda m, args, n=place.name: attending.append(n))
            place.module.register_forward_hook(lambda m, args, out: attending.clear())
    visits: dict[str, int] = {}

    def thrown(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not attending or x.dim() != 4:
            return x
        visit = visits.get(attending[-1], 0)
        visits[attending[-1]] = visit + 1
        key = twodice.Key(3).child("dropout", attending[-1], 0, visit)
        return twodice.dropout(x, RATE, key=key, step=STEP, layout="bhts", examples=SLOTS)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "dropout", thrown)
        loss = model(**batch)["loss"]
        loss.backward()
    return loss, gradients(model), sum(visits.values())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ASKING)
def test_attention_is_the_models_own_with_the_mask_of_the_function(name: str) -> None:
    batch = padded(MODELS[name]()[1])
    loss, grads, called = readable(name, batch)
    assert called >= 2
    roads = 0
    for road in ("eager", "sdpa"):
        try:
            model, _ = MODELS[name](attn_implementation=road)
        except ValueError as error:
            assert "does not support an attention implementation" in str(error)
            continue
        roads += 1
        handle = twodice.attach(model, f"attention={RATE}", seed=3)
        with handle.step(STEP, examples=SLOTS):
            found = model(**batch)["loss"]
            found.backward()
        handle.detach()
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
        for parameter, grad in gradients(model).items():
            # The gradient of a key's bias is nothing but rounding; so are few entries of the others.
            largest = grads[parameter].abs().max().item()
            torch.testing.assert_close(grad, grads[parameter], rtol=1e-4, atol=1e-4 * largest + 1e-6)
    assert roads
