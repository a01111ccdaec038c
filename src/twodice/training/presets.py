"""The models that can be named instead of a folder: config classes of transformers at three sizes of two
families.

All own dropout rates are 0, because dropout is put in from outside by the plan. Knows no data and no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A shape, and the defaults that go with its size."""

    family: str
    layers: int
    width: int
    heads: int
    key_value_heads: int
    inner: int
    context: int
    batch: int
    lr: float


# The learning rates fall with the width as in Kaplan et al. 2020 (appendix D.6) and GPT-3 (table 2.1: 6e-4
# for 125 M); batches are small because the texts are. Inner widths of llama: 8/3 of the width, rounded up to
# a multiple of 8 or 32.
PRESETS = {
    "gpt2-pico": Preset("gpt2", 2, 128, 4, 4, 512, 128, 16, 4e-3),
    "gpt2-nano": Preset("gpt2", 4, 128, 4, 4, 512, 128, 16, 2e-3),
    "gpt2-micro": Preset("gpt2", 6, 320, 5, 5, 1280, 256, 16, 1e-3),
    "gpt2-small": Preset("gpt2", 12, 768, 12, 12, 3072, 512, 16, 6e-4),
    "llama-nano": Preset("llama", 4, 128, 4, 4, 344, 128, 16, 2e-3),
    "llama-micro": Preset("llama", 6, 320, 5, 5, 864, 256, 16, 1e-3),
    "llama-small": Preset("llama", 8, 512, 8, 4, 1376, 512, 16, 8e-4),
}


def preset_config(name: str, *, vocabulary: int, context: int, end_of_text: int | None) -> Any:
    """Return the transformers config of preset `name`.

    Parameters
    ----------
    name
        A key of `PRESETS`.
    vocabulary
        Size of the vocabulary, special tokens counted.
    context
        Tokens that the model can see at once.
    end_of_text
        Id of the token that ends a document; it also begins one. None where the tokenizer has none.
    """
    from transformers import GPT2Config, LlamaConfig

    preset = PRESETS[name]
    ends: dict[str, Any] = {
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "tie_word_embeddings": True,
        "use_cache": True,
    }
    if preset.family == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary,
            n_positions=context,
            n_embd=preset.width,
            n_layer=preset.layers,
            n_head=preset.heads,
            n_inner=preset.inner,
            # The same function as GPT-2's gelu_new, but one fused operation instead of seven.
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            summary_first_dropout=0.0,
            **ends,
        )
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=preset.width,
        intermediate_size=preset.inner,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.key_value_heads,
        max_position_embeddings=context,
        attention_dropout=0.0,
        **ends,
    )
