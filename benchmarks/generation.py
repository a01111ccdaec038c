"""Generation with GPT-2's shape (124 M parameters, random weights, float32): ours and `transformers.generate`.

128 tokens of prompt and 64 new ones, top-k 50, at batch 1 and 16; both sides in one process, in turns, with their own
key/value caches. Random weights cost what trained ones do. The end-of-text token is switched off on both sides.
"""

from __future__ import annotations

import argparse
import statistics
import time
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


def _sides(model: Any, rows: int) -> tuple[Callable[[], None], Callable[[], None]]:
    import torch

    from twodice.generation.engine import Engine
    from twodice.generation.requests import Request
    from twodice.sampling.params import SamplingParams

    prompts = torch.randint(0, 50257, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))
    engine = Engine(model, _tokenizer())
    requests = [
        Request(prompts[row].tolist(), SamplingParams(top_k=TOP_K, seed=row), max_tokens=NEW, ignore_end=True)
        for row in range(rows)
    ]
    mask = torch.ones_like(prompts)

    def ours() -> None:
        made = engine.generate(requests)
        assert all(len(one.tokens) == NEW for one in made)

    def theirs() -> None:
        made = model.generate(
            prompts, attention_mask=mask, do_sample=True, top_k=TOP_K, max_new_tokens=NEW, pad_token_id=0
        )
        assert made.shape == (rows, PROMPT + NEW)

    return ours, theirs


def measure(rows: int, rounds: int, model: Any | None = None) -> dict[str, float]:
    """Seconds of `rounds` turns each at `rows` rows: medians, and the ratio theirs / ours."""
    ours, theirs = _sides(_model() if model is None else model, rows)
    ours(), theirs()
    seconds: dict[Callable[[], None], list[float]] = {ours: [], theirs: []}
    for turn in range(rounds):
        for side in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
            began = time.perf_counter()
            side()
            seconds[side].append(time.perf_counter() - began)
    mine, peer = statistics.median(seconds[ours]), statistics.median(seconds[theirs])
    best = min(seconds[theirs]) / min(seconds[ours])
    return {"ours_s": mine, "transformers_s": peer, "ratio": peer / mine, "ratio_of_minima": best}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    options, _ = parser.parse_known_args([] if arguments is None else arguments)
    import torch
    import transformers

    print(f"threads {torch.get_num_threads()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{PROMPT} + {NEW} tokens, top-k {TOP_K}, float32; tokens/s are new tokens of all rows, medians")
    model = _model()
    for rows in options.rows:
        found = measure(rows, options.rounds, model)
        made = rows * NEW
        print(
            f"batch {rows:>2}: ours {made / found['ours_s']:7.1f} tokens/s, transformers.generate "
            f"{made / found['transformers_s']:7.1f} tokens/s, {found['ratio']:.2f} x faster "
            f"(ratio of minima {found['ratio_of_minima']:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
