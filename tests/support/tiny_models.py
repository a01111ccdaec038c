"""Language models of a few thousand weights, the same every time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

ROWS, LENGTH, VOCABULARY = 8, 12, 61
FAMILIES = ("gpt2", "llama")
ALL_KINDS = "embedding=0.1, attention=0.1, residual=0.1, activation=0.1, output=0.1"


def tiny_model(family: str = "gpt2", layers: int = 2, **settings: Any) -> nn.Module:
    """Return a GPT-2 (own rates 0 unless given), Llama, Mistral or Qwen2 in train mode."""
    import transformers

    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": None, "vocab_size": VOCABULARY}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "gpt2":
            off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
            shape = {"n_positions": 32, "n_embd": 24, "n_layer": layers, "n_head": 4}
            model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(**{**ends, **off, **shape, **settings})
            )
        else:
            name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[family]
            shape = {
                "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": layers,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
            }  # fmt: skip
            config = getattr(transformers, f"{name}Config")(**{**ends, **shape, **settings})
            model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.loss_type = "ForCausalLM"
    return model.train()


def tokens(rows: int = ROWS, length: int = LENGTH) -> torch.Tensor:
    """Return (rows, length) token ids, the same every time; row i does not depend on `rows`."""
    grid = torch.arange(rows)[:, None] * 7 + torch.arange(length)[None] * 11
    return grid * grid % VOCABULARY


def loss_of(model: nn.Module, ids: torch.Tensor, **rest: Any) -> torch.Tensor:
    """Return the mean loss of a model on `ids`."""
    return model(input_ids=ids, labels=ids, use_cache=False, **rest).loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of every gradient by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
