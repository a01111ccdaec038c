"""A Llama written out by hand, each kind of dropout with it, against the same model attached.

This is the readable reference of the kinds: where each acts, by which key, and what one decision counts for,
in plain torch and calls of `twodice.dropout`.

Letters: B rows, T positions, C width, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.tiny_models import gradients, tiny_model, tokens
from torch import nn
from torch.nn import functional

import twodice

STEP, SEED, SLOTS = 3, 5, [7, 1, 4]
KINDS = (
    "embedding", "token", "word", "attention", "key", "head", "residual", "activation", "output", "layer",
    "skip", "weight",
)  # fmt: skip


class Readable:
    """The forward of a Llama in which what a plan says is dropped, in the order of the forward."""

    def __init__(self, model: Any, rates: dict[str, float]) -> None:
        self.model = model
        self.rates = rates

    def drop(self, x: torch.Tensor, kind: str, path: str, **rest: Any) -> torch.Tensor:
        """Formula of every kind: x * (lane >= t) * 65536 / (65536 - t), t = round(65536 p)."""
        key = twodice.Key(SEED).child("dropout", f"{path}#{kind}", 0, 0)
        slots = None if rest.get("layout") == "bc" else SLOTS
        return twodice.dropout(x, self.rates.get(kind, 0.0), key=key, step=STEP, examples=slots, **rest)

    def linear(self, x: torch.Tensor, path: str) -> torch.Tensor:
        """DropConnect: example := output unit, column := input unit; one mask for the batch."""
        weight = self.model.get_submodule(path).weight
        return functional.linear(x, self.drop(weight, "weight", path, layout="bc"))

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, T) to logits (B, T, V)."""
        base, (B, T) = self.model.model, ids.shape
        table = self.drop(base.embed_tokens.weight, "weight", "model.embed_tokens", layout="bc")
        x = functional.embedding(ids, table)
        x = x * self.drop(torch.ones(B, T, 1), "word", "model.embed_tokens", positions=ids)
        x = self.drop(x, "embedding", "model")
        x = x * self.drop(torch.ones(B, T, 1), "token", "model")
        angles = base.rotary_emb(x, torch.arange(T)[None])
        for i in range(len(base.layers)):
            x = self.block(x, f"model.layers.{i}", angles)
        x = self.drop(base.norm(x), "output", "model.norm")
        return self.linear(x, "lm_head")

    def block(self, x: torch.Tensor, path: str, angles: Any) -> torch.Tensor:
        """One layer: stochastic depth drops all that it adds for an example."""
        block = self.model.get_submodule(path)
        start = x
        for name, sublayer, norm in (
            ("self_attn", self.attend, block.input_layernorm),
            ("mlp", self.feed_forward, block.post_attention_layernorm),
        ):
            at = f"{path}.{name}"
            branch = self.drop(sublayer(norm(x), at, angles), "residual", at)
            x = self.drop(x, "skip", at) + branch
        return start + (x - start) * self.drop(torch.ones(len(x), 1, 1), "layer", path)

    def attend(self, x: torch.Tensor, path: str, angles: Any) -> torch.Tensor:
        """Attention with weights, keys and heads dropped."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        H, (B, T, _) = 4, x.shape
        q, k, v = (
            self.linear(x, f"{path}.{name}_proj").unflatten(-1, (-1, 8)).transpose(1, 2) for name in "qkv"
        )
        q, k = apply_rotary_pos_emb(q, k, *angles)
        k, v = (y.repeat_interleave(H // y.shape[1], dim=1) for y in (k, v))
        seen = torch.ones(T, T, dtype=torch.bool).tril()
        shown = seen & (self.drop(torch.ones(B, H, T, T), "key", path, layout="bhts") > 0)
        seen = torch.where(shown.any(-1, keepdim=True), shown, seen)  # who would lose all keys keeps all
        scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~seen, float("-inf"))
        weights = self.drop(scores.softmax(-1), "attention", path, layout="bhts")
        joined = (weights @ v).transpose(1, 2)
        joined = joined * self.drop(torch.ones(B, 1, H), "head", path)[..., None]
        return self.linear(joined.flatten(2), f"{path}.o_proj")

    def feed_forward(self, x: torch.Tensor, path: str, _: Any) -> torch.Tensor:
        """The feed-forward with the input of its last linear dropped."""
        gate, up = (self.linear(x, f"{path}.{name}_proj") for name in ("gate", "up"))
        return self.linear(self.drop(functional.silu(gate) * up, "activation", path), f"{path}.down_proj")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    made = tiny_model("llama")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in made.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS], ids="+".join)
def test_an_attached_model_is_the_one_written_out(model: nn.Module, kinds: tuple[str, ...]) -> None:
    rates = {kind: 0.3 for kind in kinds}
    ids, found = tokens(3), []
    for attached in (False, True):
        model.zero_grad()
        if attached:
            handle = twodice.attach(model, rates, seed=SEED)
            with handle.step(STEP, examples=SLOTS):
                logits = model(input_ids=ids, use_cache=False).logits
                logits.square().mean().backward()
            handle.detach()
        else:
            logits = Readable(model, rates)(ids)
            logits.square().mean().backward()
        found.append((logits.detach(), gradients(model)))
    plain = model(input_ids=ids, use_cache=False).logits
    assert not torch.allclose(found[0][0], plain, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_the_one_written_out_without_dropout_is_the_plain_model(model: nn.Module) -> None:
    ids = tokens(3)
    plain = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(Readable(model, {})(ids), plain, rtol=1e-5, atol=1e-5)
