"""A whole training step (forward, backward, AdamW) with dropout everywhere, against the same step without.

What bounds it: the step at p = 0 is products of matrices, 6 operations for each parameter and token. Dropout
adds no product; at its best it adds to each site one pass over a tensor that the step touches several times
anyway, forward and backward, and nothing to what is kept. The limit is 1.03 times the step at p = 0. The
vocabulary is small (1,024), which is the hard case: a large one adds to both sides work that drops nothing.

Contenders start from the same weights and take turns. Shares are medians over the rounds of the ratio within
a round, so that other work on the machine falls on both; with one thread it is the time that the process
itself works, with more that of the clock on the wall. Kinds of dropout at 0.1: ours at embedding,
attention, residual and activation; that of transformers where it has them (GPT-2: embedding, attention and
residual, but no activation; Llama: attention alone).

Run: python -m benchmarks.training [threads]
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from torch import nn

import twodice
from benchmarks.sidebyside import Row, table, turns

LIMIT = 1.03
SEEDS = itertools.count(1)
VOCABULARY = 1024
PLAN = "embedding=0.1, attention=0.1, residual=0.1, activation=0.1"
PARTS = ("embedding=0.1", "attention=0.1", "residual=0.1", "activation=0.1")
# Layers, width, heads, T, rows.
SIZES = ((6, 384, 6, 512, 2), (12, 768, 12, 256, 2))


def model(family: str, size: tuple[int, ...], p: float = 0.0, road: str = "sdpa") -> nn.Module:
    """A GPT-2 or Llama of that size with random weights, always the same, and dropout of its own."""
    layers, width, heads, T, _ = size
    torch.manual_seed(0)
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            n_layer=layers, n_embd=width, n_head=heads, n_positions=T, vocab_size=VOCABULARY,
            bos_token_id=1, eos_token_id=1, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p,
            attn_implementation=road,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).train()
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, vocab_size=VOCABULARY,
        intermediate_size=width * 8 // 3, max_position_embeddings=T, attention_dropout=p,
        attn_implementation=road,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


class Training:
    """One contender: a model, its optimizer, and our dropout where a plan is given."""

    def __init__(
        self, family: str, size: tuple[int, ...], plan: str = "", p: float = 0.0, road: str = "sdpa"
    ) -> None:
        self.model = model(family, size, p, road)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.handle = twodice.attach(self.model, plan, seed=next(SEEDS)) if plan else None
        self.number = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of the next step."""
        step = self.handle.step(self.number) if self.handle else nullcontext()
        self.number += 1
        with step:
            loss: torch.Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def __call__(self, ids: torch.Tensor) -> None:
        """One whole step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.forward(ids).backward()
        self.optimizer.step()

    def kept(self, ids: torch.Tensor) -> int:
        """Bytes that a forward keeps for its backward pass, the parameters apart."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        found: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = self.forward(ids)
        del loss
        return sum(size for place, size in found.items() if place not in own)


def contenders(family: str, size: tuple[int, ...]) -> dict[str, Training]:
    """Ours first; every other takes its turn beside it."""
    return {
        "twodice": Training(family, size, PLAN),
        "p=0": Training(family, size),
        "own, sdpa": Training(family, size, p=0.1),
        "own, eager": Training(family, size, p=0.1, road="eager"),
    }


def batches(size: tuple[int, ...]) -> list[torch.Tensor]:
    """Four batches of random tokens."""
    *_, T, rows = size
    return [torch.randint(VOCABULARY, (rows, T)) for _ in range(4)]


def clock(threads: int) -> Callable[[], float]:
    """What counts: several threads may wait for each other, which only the wall shows."""
    return time.process_time if threads == 1 else time.perf_counter


def share(times: dict[str, list[float]], of: str, to: str = "p=0") -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))


def title(family: str, size: tuple[int, ...]) -> str:
    """What one case is called."""
    layers, width, _, T, rows = size
    return f"{family} {layers} x {width}, {rows} x {T}"


def whole_steps(threads: int, rounds: int = 11) -> None:
    """Print the time of a step of each, its share of the step at p = 0, and what it keeps."""
    rows, lines = [], []
    for size in SIZES:
        for family in ("gpt2", "llama"):
            each, inputs = contenders(family, size), batches(size)
            times = turns(
                each,
                inputs,
                rounds=rounds if size == SIZES[0] else rounds // 2,
                seconds=0,
                clock=clock(threads),
            )
            median = {name: statistics.median(values) for name, values in times.items()}
            rows.append(Row(title(family, size), median, threads))
            for name, one in each.items():
                lines.append(
                    f"{title(family, size):<28}{name:<14}{share(times, name):>8.3f}"
                    f"{one.kept(inputs[0]) / 2**20:>14.1f}"
                )
    table("a training step", rows, "twodice", ["p=0", "own, sdpa", "own, eager"])
    print(f"\n{'case':<28}{'contender':<14}{'x p = 0':>8}{'MiB kept':>14}; the limit of ours is {LIMIT}")
    print("\n".join(lines))


def by_kind(threads: int, rounds: int = 11) -> None:
    """Print what each kind alone costs."""
    size = SIZES[0]
    for family in ("gpt2", "llama"):
        each: dict[str, Callable[[torch.Tensor], None]] = {"p=0": Training(family, size)}
        each |= {plan: Training(family, size, plan) for plan in (*PARTS, PLAN)}
        times = turns(each, batches(size), rounds=rounds, seconds=0, clock=clock(threads))
        print(f"\n{title(family, size)}, {threads} threads, x p = 0")
        for name in each:
            print(f"{name:<70}{share(times, name):>8.3f}")


class Depth:
    """A contender whose layers are left out, and how many ran in each step."""

    def __init__(self, family: str, size: tuple[int, ...]) -> None:
        self.training = Training(family, size, "layer:batch=0.5")
        self.ran: list[int] = []
        for module in self.training.model.modules():
            if type(module).__name__ in ("GPT2MLP", "LlamaMLP"):
                module.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        """One layer ran."""
        self.ran[-1] += 1

    def __call__(self, ids: torch.Tensor) -> None:
        """One whole step."""
        self.ran.append(0)
        self.training(ids)


def stochastic_depth(threads: int, rounds: int = 16) -> None:
    """Print the time of a step by how many of its layers a decision for the whole batch left out."""
    for family in ("gpt2", "llama"):
        size = SIZES[0]
        ours, plain = Depth(family, size), Training(family, size)
        times = turns(
            {"layer": ours, "p=0": plain}, batches(size), rounds=rounds, seconds=0, clock=clock(threads)
        )
        depth, whole, ran = size[0], statistics.median(times["p=0"]), ours.ran[-rounds:]
        print(
            f"\n{title(family, size)}, {threads} threads, layer:batch=0.5: a step takes "
            f"{sum(times['layer']) / sum(times['p=0']):.3f} of that at p = 0; "
            f"{sum(ran) / rounds / depth:.3f} of the layers ran"
        )
        for count in sorted(set(ran)):
            some = [t for t, n in zip(times["layer"], ran, strict=True) if n == count]
            part = statistics.median(some) / whole
            print(f"{count} of {depth} layers ran{len(some):>4} steps{part:>8.3f} of p = 0")


def main() -> None:
    """Print the tables for the threads given on the command line, or as many as there are cores, up to 2."""
    before = torch.get_num_threads()
    given = [int(word) for word in sys.argv[1:] if word.isdigit()] or [min(2, os.cpu_count() or 1)]
    try:
        for threads in given:
            torch.set_num_threads(threads)
            print(f"load {os.getloadavg()[0]:.1f}")
            whole_steps(threads)
            by_kind(threads)
            stochastic_depth(threads)
            print(f"load {os.getloadavg()[0]:.1f}")
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
