"""Sampling against one vectorised max over the logits, torch.topk + multinomial, and transformers.

Logits rotate over 64 distinct rows. Shapes: normal with sigma 2 (flat, hard), and peaked like real text
(a few tokens hold nearly all mass). The ratio to the max is the price beyond reading the row once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from benchmarks.sidebyside import Row, alternate, table
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample

ROWS = 64
PEERS = ["max", "topk+multinomial", "transformers"]


def logits_of(vocabulary: int, kind: str) -> torch.Tensor:
    """(64, vocabulary) distinct rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, vocabulary, generator=generator) * 2
    if kind == "peaked":  # a handful of tokens well above the rest
        for row in x:
            at = torch.randint(0, vocabulary, (20,), generator=generator)
            row[at] += torch.linspace(18, 4, 20)
    return x


def ours(params: Any, rows: int) -> Callable[[Any], Any]:
    """Our call on one batch; the position moves on as in a text."""
    counter = iter(range(2**31))
    return lambda x: sample(x, params, next(counter))


def transformers_way(k: int | None, p: float | None) -> Callable[[Any], Any]:
    """What ``generate(do_sample=True)`` does to a batch of logits."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(0.8)])
    if k is not None:
        chain.append(TopKLogitsWarper(k))
    if p is not None:
        chain.append(TopPLogitsWarper(p))
    return lambda x: torch.multinomial(chain(None, x.float()).softmax(-1), 1)


def topk_way(x: torch.Tensor) -> torch.Tensor:
    """The fastest short way in torch for top-k alone."""
    values, ids = x.topk(50)
    return ids.gather(1, torch.multinomial((values.float() / 0.8).softmax(-1), 1))


def largest(x: torch.Tensor) -> Any:
    """One vectorised max over each row: NumPy's for float32, the faster one, torch's for bfloat16."""
    return x.numpy().max(axis=1) if x.dtype == torch.float32 else x.amax(1)


def main() -> None:
    """Print the table."""
    threads = torch.get_num_threads()
    found = []
    for vocabulary in (50_257, 151_936):
        for rows in (1, 32):
            for kind, dtype in (
                ("normal", torch.float32),
                ("peaked", torch.float32),
                ("normal", torch.bfloat16),
            ):
                if rows > 1 and (kind, dtype) != ("normal", torch.float32):
                    continue  # transformers takes most of a second a call there
                full = logits_of(vocabulary, kind).to(dtype)
                batches = [full[i : i + rows] for i in range(0, ROWS, rows)]
                mixed = [
                    SamplingParams(0.8, (50, 20, None, None)[i % 4], (None, 0.9, 0.95, None)[i % 4], seed=i)
                    for i in range(rows)
                ]  # fmt: skip
                cases: list[tuple[str, Any, int | None, float | None]] = [
                    ("top-k 50 seeded", SamplingParams(0.8, top_k=50, seed=1), 50, None),
                    ("top-k 50 unseeded", SamplingParams(0.8, top_k=50), 50, None),
                    ("top-p 0.95", SamplingParams(0.8, top_p=0.95, seed=1), None, 0.95),
                    ("no filter", SamplingParams(0.8, seed=1), None, None),
                ]
                if rows > 1:
                    cases.append(("mixed by row", mixed, 50, 0.95))
                for name, params, k, p in cases:
                    contenders = {
                        "ours": ours(params, rows),
                        "max": largest,
                        "transformers": transformers_way(k, p),
                    }
                    if k is not None and p is None:
                        contenders["topk+multinomial"] = topk_way
                    short = str(dtype).removeprefix("torch.")
                    seconds = alternate(contenders, batches, rounds=5)
                    found.append(Row(f"{name}, {kind} {short}, {rows} x {vocabulary}", seconds, threads))
    tiny = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1))
    seconds = alternate(
        {"ours": ours(SamplingParams(0.8, top_k=5, seed=1), 1)}, [tiny[i : i + 1] for i in range(ROWS)]
    )
    found.append(Row("the call alone: 1 x 8", seconds, threads))
    table(
        "sampling: our time, and how many times faster we are (max: below 1, its inverse is our price)",
        found,
        "ours",
        PEERS,
    )


if __name__ == "__main__":
    main()
