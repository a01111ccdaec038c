"""Tiny real models of two families, with random weights, and a tokenizer of bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

END = "<|endoftext|>"


def byte_tokenizer(merges: tuple[tuple[str, str], ...] = ()) -> Any:
    """A byte-level tokenizer of transformers: 256 bytes, the merges given, an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from twodice.generation.text import byte_alphabet

    alphabet = sorted(byte_alphabet(), key=byte_alphabet().__getitem__)
    words = [*alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def tiny_gpt2(context: int = 64, vocabulary: int = 257) -> Any:
    """Two layers of GPT-2 with weights large enough that its choices vary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=vocabulary, n_positions=context, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
            eos_token_id=256, bos_token_id=256,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()


def tiny_llama(context: int = 64, vocabulary: int = 257, **options: Any) -> Any:
    """Two layers of Llama with grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=vocabulary, max_position_embeddings=context, hidden_size=32, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
            eos_token_id=256, bos_token_id=256, **options,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def engine(request: pytest.FixtureRequest) -> Any:
    from twodice.generation.engine import Engine

    return Engine({"gpt2": tiny_gpt2, "llama": tiny_llama}[request.param](), byte_tokenizer())
