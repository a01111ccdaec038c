"""One tiny model of each architecture that is served, in train mode, with a batch that runs a forward with
labels.

Each entry makes a new model with the same weights every time; own rates are 0 unless settings say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

VOCABULARY, ROWS, LENGTH, SOURCE = 43, 3, 7, 9
Batch = dict[str, torch.Tensor]
_ENDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
_LLAMA = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
_BERT = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 20, "decoder_ffn_dim": 24, "dropout": 0.0,
    "decoder_start_token_id": 1, "max_position_embeddings": 32,
}  # fmt: skip


def tokens(rows: int = ROWS, length: int = LENGTH, start: int = 0) -> torch.Tensor:
    """Return (rows, length) token ids above the special ones; row i does not depend on `rows`."""
    grid = torch.arange(rows)[:, None] * 7 + torch.arange(length)[None] * 11 + start
    return 2 + grid * grid % (VOCABULARY - 2)


def _numbers(*shape: int) -> torch.Tensor:
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float32)
    return torch.sin(count * 1.7).reshape(shape)


def _language(rows: int = ROWS) -> Batch:
    ids = tokens(rows)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def _masked(rows: int = ROWS) -> Batch:
    return {"input_ids": tokens(rows), "labels": tokens(rows, start=3)}


def _pairs(rows: int = ROWS) -> Batch:
    return {"input_ids": tokens(rows, SOURCE, 5), "labels": tokens(rows), "use_cache": False}


def _made(name: str, config: str, shape: dict[str, Any]) -> nn.Module:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(getattr(transformers, config)(**shape))
        for parameter in model.parameters():
            # The usual scale (0.02) would leave tiny models almost linear, and a site without effect.
            if parameter.dim() > 1 and parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    model.loss_type = getattr(model, "loss_type", None) or "ForCausalLM"
    return model.train()


class Plain(nn.Module):
    """A model of torch's own parts, with a loss, so that it is called as the others are."""

    def __init__(self, inside: nn.Module, head: nn.Module, words: int | None = None) -> None:
        super().__init__()
        self.words = None if words is None else nn.Embedding(words, 16)
        self.inside = inside
        self.head = head

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, **rest: Any) -> dict[str, torch.Tensor]:
        """Return the loss and the logits."""
        x = inputs if self.words is None else self.words(inputs)
        if rest:
            x = self.inside(x, self.words(rest["target"]))
        else:
            x = self.inside(x)
        x = x[0] if isinstance(x, tuple) else x
        logits = self.head(x)
        return {"loss": functional.cross_entropy(logits.flatten(0, -2), labels.flatten()), "logits": logits}


class Attending(nn.Module):
    """Self-attention by an nn.MultiheadAttention, and nothing else."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 4, dropout=dropout, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x with what was attended to."""
        return x + self.attend(x, x, x, need_weights=False)[0]


def _plain(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().train()


def _words(rows: int = ROWS) -> Batch:
    return {"inputs": tokens(rows), "labels": tokens(rows, start=3)}


def _head(width: int = 16) -> nn.Module:
    return nn.Linear(width, VOCABULARY)


def _causal(name: str, **shape: Any) -> Callable[..., tuple[nn.Module, Batch]]:
    def make(rows: int = ROWS, **settings: Any) -> tuple[nn.Module, Batch]:
        return _made(f"{name}ForCausalLM", f"{name}Config", {**_ENDS, **shape, **settings}), _language(rows)

    return make


def _bert_like(name: str, **shape: Any) -> Callable[..., tuple[nn.Module, Batch]]:
    def make(rows: int = ROWS, **settings: Any) -> tuple[nn.Module, Batch]:
        return _made(f"{name}ForMaskedLM", f"{name}Config", {**_ENDS, **shape, **settings}), _masked(rows)

    return make


def gpt2(rows: int = ROWS, **settings: Any) -> tuple[nn.Module, Batch]:
    """GPT-2."""
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
    shape = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
    return _made("GPT2LMHeadModel", "GPT2Config", {**_ENDS, **off, **shape, **settings}), _language(rows)


def gemma3(rows: int = ROWS, **settings: Any) -> tuple[nn.Module, Batch]:
    """Gemma 3, text."""
    shape = {**_ENDS, **_LLAMA, "head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 4, **settings}
    return _made("Gemma3ForCausalLM", "Gemma3TextConfig", shape), _language(rows)


def gpt_oss(rows: int = ROWS, **settings: Any) -> tuple[nn.Module, Batch]:
    """GPT-OSS: sinks and a sliding window in its attention."""
    shape = {
        **_ENDS, **_LLAMA, "head_dim": 8, "sliding_window": 4, "num_local_experts": 4,
        "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    return _made("GptOssForCausalLM", "GptOssConfig", {**shape, **settings}), _language(rows)


def t5(rows: int = ROWS, **settings: Any) -> tuple[nn.Module, Batch]:
    """T5."""
    shape = {
        "d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
        "dropout_rate": 0.0, "decoder_start_token_id": 0, "vocab_size": VOCABULARY, "eos_token_id": 1,
    }  # fmt: skip
    return _made("T5ForConditionalGeneration", "T5Config", {**shape, **settings}), _pairs(rows)


def bart(rows: int = ROWS, **settings: Any) -> tuple[nn.Module, Batch]:
    """BART."""
    shape = {**_ENDS, **_SEQ2SEQ, "forced_eos_token_id": None, **settings}
    return _made("BartForConditionalGeneration", "BartConfig", shape), _pairs(rows)


def marian(rows: int = ROWS, **settings: Any) -> tuple[nn.Module, Batch]:
    """Marian."""
    shape = {**_ENDS, **_SEQ2SEQ, "forced_eos_token_id": None, **settings}
    return _made("MarianMTModel", "MarianConfig", shape), _pairs(rows)


def whisper(rows: int = ROWS, **settings: Any) -> tuple[nn.Module, Batch]:
    """Whisper."""
    shape = {
        **_ENDS, **_SEQ2SEQ, "num_mel_bins": 6, "max_source_positions": SOURCE, "max_target_positions": 32,
        "suppress_tokens": None, "begin_suppress_tokens": None,
    }  # fmt: skip
    del shape["max_position_embeddings"]
    model = _made("WhisperForConditionalGeneration", "WhisperConfig", {**shape, **settings})
    return model, {
        "input_features": _numbers(rows, 6, 2 * SOURCE),
        "labels": tokens(rows),
        "use_cache": False,
    }


def vit(rows: int = ROWS, **settings: Any) -> tuple[nn.Module, Batch]:
    """ViT for image classification."""
    shape = {
        **_BERT, "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 5, **settings,
    }  # fmt: skip
    del shape["max_position_embeddings"]
    model = _made("ViTForImageClassification", "ViTConfig", shape)
    return model, {"pixel_values": _numbers(rows, 1, 8, 8), "labels": torch.arange(rows) % 5}


def transformer_encoder(rows: int = ROWS, **settings: Any) -> tuple[nn.Module, Batch]:
    """nn.TransformerEncoder."""
    layer = {"dropout": 0.0, "batch_first": True, **settings}

    def make() -> nn.Module:
        block = nn.TransformerEncoderLayer(16, 4, 20, **layer)
        return Plain(nn.TransformerEncoder(block, 2, enable_nested_tensor=False), _head(), VOCABULARY)

    return _plain(make), _words(rows)


def transformer(rows: int = ROWS, **settings: Any) -> tuple[nn.Module, Batch]:
    """nn.Transformer, encoder and decoder, norm before."""
    shape = {"dropout": 0.0, "batch_first": True, "norm_first": True, **settings}

    def make() -> nn.Module:
        return Plain(nn.Transformer(16, 4, 2, 1, 20, **shape), _head(), VOCABULARY)

    model = _plain(make)
    return model, {"inputs": tokens(rows, SOURCE, 5), "target": tokens(rows), "labels": tokens(rows, start=3)}


def multihead_attention(rows: int = ROWS, dropout: float = 0.0) -> tuple[nn.Module, Batch]:
    """nn.MultiheadAttention alone."""
    return _plain(lambda: Plain(Attending(dropout), _head(), VOCABULARY)), _words(rows)


def lstm(rows: int = ROWS, dropout: float = 0.0) -> tuple[nn.Module, Batch]:
    """A language model of two layers of nn.LSTM."""
    return (
        _plain(
            lambda: Plain(
                nn.LSTM(16, 16, num_layers=2, batch_first=True, dropout=dropout), _head(), VOCABULARY
            )
        ),
        _words(rows),
    )


def gru(rows: int = ROWS, dropout: float = 0.0) -> tuple[nn.Module, Batch]:
    """A language model of one layer of nn.GRU and an nn.Dropout after it."""

    def make() -> nn.Module:
        return Plain(
            nn.GRU(16, 16, batch_first=True), nn.Sequential(nn.Dropout(dropout), _head()), VOCABULARY
        )

    return _plain(make), _words(rows)


def convolutional(rows: int = ROWS, dropout: float = 0.0) -> tuple[nn.Module, Batch]:
    """A convolutional net with dropout of units, of channels, and of features."""

    def make() -> nn.Module:
        layers = [
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(4, 8, 3), nn.ReLU(),
            nn.Dropout2d(dropout), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Dropout(dropout),
        ]  # fmt: skip
        return Plain(nn.Sequential(*layers), nn.Linear(16, 5))

    return _plain(make), {"inputs": _numbers(rows, 1, 8, 8), "labels": torch.arange(rows) % 5}


def mlp(rows: int = ROWS, dropout: float = 0.0) -> tuple[nn.Module, Batch]:
    """A net of linear layers."""

    def make() -> nn.Module:
        layers = [
            nn.Linear(8, 16),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(16, 16),
            nn.ReLU(),
            nn.Dropout(dropout),
        ]
        return Plain(nn.Sequential(*layers), nn.Linear(16, 5))

    return _plain(make), {"inputs": _numbers(rows, 8), "labels": torch.arange(rows) % 5}


_GEMMA2 = {**_LLAMA, "head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 4}
_DEEPSEEK = {
    **_LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 12, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "qk_nope_head_dim": 4,
}  # fmt: skip
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_DISTILBERT = {
    "dim": 16, "hidden_dim": 20, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32, "dropout": 0.0,
    "attention_dropout": 0.0,
}  # fmt: skip
_MODERNBERT = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "cls_token_id": 1, "sep_token_id": 1, "local_attention": 4,
}  # fmt: skip

#: Name -> a function that makes (model in train mode, batch). Settings go to the config (own rates, say).
ZOO: dict[str, Callable[..., tuple[nn.Module, Batch]]] = {
    "GPT-2": gpt2,
    "GPT-NeoX": _causal("GPTNeoX", **_NEOX),
    "OPT": _causal(
        "OPT", hidden_size=16, ffn_dim=20, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16,
        max_position_embeddings=32, dropout=0.0,
    ),
    "BLOOM": _causal("Bloom", hidden_size=16, n_layer=2, n_head=4),
    "Falcon": _causal(
        "Falcon", hidden_size=16, num_hidden_layers=2, num_attention_heads=4, alibi=True, parallel_attn=False,
        attn_implementation="eager",
    ),
    "Falcon, parallel": _causal(
        "Falcon", hidden_size=16, num_hidden_layers=2, num_attention_heads=4, alibi=False, parallel_attn=True
    ),
    "Llama": _causal("Llama", **_LLAMA),
    "Mistral": _causal("Mistral", **_LLAMA, sliding_window=4),
    "Mixtral": _causal("Mixtral", **_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "Qwen2": _causal("Qwen2", **_LLAMA),
    "Qwen3": _causal("Qwen3", **_LLAMA, head_dim=8),
    "Gemma 2": _causal("Gemma2", **_GEMMA2),
    "Gemma 3": gemma3,
    "Phi-3": _causal("Phi3", **_LLAMA),
    "OLMo 2": _causal("Olmo2", **_LLAMA),
    "DeepSeek-V3": _causal("DeepseekV3", **_DEEPSEEK),
    "Granite": _causal("Granite", **_LLAMA, residual_multiplier=0.5),
    "BERT": _bert_like("Bert", **_BERT),
    "RoBERTa": _bert_like("Roberta", **_BERT),
    "DistilBERT": _bert_like("DistilBert", **_DISTILBERT),
    "ELECTRA": _bert_like("Electra", **_BERT, embedding_size=8, summary_last_dropout=0.0),
    "ModernBERT": _bert_like("ModernBert", **_MODERNBERT),
    "ALBERT": _bert_like("Albert", **_BERT, embedding_size=8, classifier_dropout_prob=0.0),
    "T5": t5,
    "BART": bart,
    "Marian": marian,
    "Whisper": whisper,
    "ViT": vit,
    "nn.Transformer": transformer,
    "nn.TransformerEncoder": transformer_encoder,
    "nn.MultiheadAttention": multihead_attention,
    "nn.LSTM": lstm,
    "nn.GRU": gru,
    "convolutional net": convolutional,
    "MLP": mlp,
}  # fmt: skip
