"""Generation with GPT-2's shape (124 M parameters, random weights, float32): ours and
`transformers.generate`.

128 tokens of prompt and 64 new ones, top-k 50, at batch 1 and 16; both sides in one process, in turns, with
their own key/value caches. Random weights cost what trained ones do. The end-of-text token is switched off on
both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PROMPT, NEW, TOP_K = 128, 64, 50


def _model() -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(eos_token_id=None, bos_token_id=None)).eval()


def _tokenizer() -> Any:
    """A tokenizer with one word; prompts and answers are token ids here."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _sides(model: Any, rows: int) -> tuple[dict[str, Callable[[Any], Any]], list[Any]]:
    """Both sides as functions of a batch of prompts, and the batches."""
    import torch

    from twodice.generation.engine import Engine
    from twodice.generation.requests import Request
    from twodice.sampling.params import SamplingParams

    engine = Engine(model, _tokenizer())
    generator = torch.Generator().manual_seed(rows)
    batches = [torch.randint(0, 50257, (rows, PROMPT), generator=generator) for _ in range(4)]
    mask = torch.ones_like(batches[0])

    def ours(prompts: Any) -> None:
        requests = [
            Request(prompt, SamplingParams(top_k=TOP_K, seed=row), max_tokens=NEW, ignore_end=True)
            for row, prompt in enumerate(prompts.tolist())
        ]
        made = engine.generate(requests)
        assert all(len(one.tokens) == NEW for one in made)

    def theirs(prompts: Any) -> None:
        made = model.generate(
            prompts, attention_mask=mask, do_sample=True, top_k=TOP_K, max_new_tokens=NEW, pad_token_id=0
        )
        assert made.shape == (rows, PROMPT + NEW)

    return {"twodice": ours, "transformers": theirs}, batches


def main(rows: tuple[int, ...] = (1, 16), rounds: int = 5) -> None:
    import torch

    from benchmarks.sidebyside import Row, alternate, table

    model = _model()
    threads = torch.get_num_threads()
    found = []
    for count in rows:
        contenders, batches = _sides(model, count)
        seconds = alternate(contenders, batches, rounds=rounds, seconds=0.0)
        found.append(Row(f"batch {count}, {PROMPT} + {NEW} tokens, top-k {TOP_K}", seconds, threads))
    table("generate, GPT-2 124 M shape, float32", found, "twodice", ["transformers"])


if __name__ == "__main__":
    import sys

    main(tuple(int(word) for word in sys.argv[1:]) or (1, 16))
