"""vLLM's persistent batch and its V1 sampler, as far as a logits processor sees them.

Written anew from vLLM's design document of logits processors (rules of add, remove and move; condensing; the
order removed, added, moved) and from what its sampler does behind them; vLLM is not installed where these
tests run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import numpy as np
import torch
from torch import Tensor


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass
class VllmParams:
    """The fields of vLLM's SamplingParams that matter here."""

    extra_args: dict[str, Any] | None = None
    seed: int | None = None
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0


@dataclass
class VllmRequest:
    params: VllmParams
    prompt: list[int]
    length: int
    output: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: Sequence[int]
    added: Sequence[tuple[int, VllmParams, list[int] | None, list[int]]]
    moved: Sequence[tuple[int, int, MoveDirectionality]]


def run(
    processor: Any,
    requests: list[VllmRequest],
    logits_of: Callable[[VllmRequest], Tensor],
    capacity: int,
    seed: int,
    look: Callable[[VllmRequest, Tensor, Tensor], None] = lambda request, before, after: None,
) -> None:
    """Serve all requests in one persistent batch: requests come late, rows are swapped at random, and in some
    steps a row's token is thrown away (a prompt that is not read to its end)."""
    chance = np.random.default_rng(seed)
    torch_chance = torch.Generator().manual_seed(seed)
    waiting, batch = list(requests), []
    while waiting or batch:
        update, batch = _refresh(chance, waiting, batch, capacity)
        processor.update_state(update)
        if not batch:
            continue
        logits = torch.stack([logits_of(request) for request in batch])
        before = logits.clone()
        logits = processor.apply(logits)
        for i, request in enumerate(batch):
            look(request, before[i], logits[i])
            token = _vllm_sampler(logits[i], request, torch_chance)
            if chance.random() > 0.15:
                request.output.append(token)


def _refresh(
    chance: np.random.Generator, waiting: list[VllmRequest], batch: list[VllmRequest], capacity: int
) -> tuple[BatchUpdate | None, list[VllmRequest]]:
    slots: list[VllmRequest | None] = [r if len(r.output) < r.length else None for r in batch]
    free = [i for i, request in enumerate(slots) if request is None]
    arriving = min(len(waiting), int(chance.integers(0, 3)), capacity - (len(slots) - len(free)))
    if not any(slots) and waiting and arriving == 0:
        arriving = 1
    added, removed, moved = [], [], []
    for _ in range(arriving):
        request = waiting.pop(0)
        index = free.pop(0) if free else len(slots)
        if index == len(slots):
            slots.append(None)
        slots[index] = request
        added.append((index, request.params, request.prompt, request.output))
    removed = list(free)
    for index in free:  # condense
        last = max((i for i, request in enumerate(slots) if request is not None), default=-1)
        if last > index:
            slots[index], slots[last] = slots[last], None
            moved.append((last, index, MoveDirectionality.UNIDIRECTIONAL))
    now = [request for request in slots if request is not None]
    if len(now) > 1 and chance.random() < 0.5:  # an attention backend wants another order
        a, b = (int(i) for i in chance.choice(len(now), 2, replace=False))
        now[a], now[b] = now[b], now[a]
        moved.append((a, b, MoveDirectionality.SWAP))
    changed = added or removed or moved
    return (BatchUpdate(len(now), removed, added, moved) if changed else None), now


def _vllm_sampler(x: Tensor, request: VllmRequest, chance: torch.Generator) -> int:
    """Penalties, greedy or temperature, min-p, top-k, top-p, the draw: what follows custom processors."""
    p, x = request.params, x.clone()
    seen = torch.zeros(len(x), dtype=torch.bool)
    seen[request.prompt + request.output] = True
    x = torch.where(seen, torch.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty), x)
    said = torch.zeros(len(x), dtype=torch.bool)
    said[request.output] = True
    x = torch.where(said, x - p.presence_penalty, x)
    if p.temperature < 1e-5:
        return int(x.argmax())
    x = x / max(p.temperature, 0.01)
    mass = x.softmax(0)
    x[mass < p.min_p * mass.max()] = -torch.inf
    ascending, ids = x.sort()
    if p.top_k > 0:
        ascending[ascending < ascending[-p.top_k]] = -torch.inf
    cut = ascending.softmax(0).cumsum(0) <= 1 - p.top_p
    cut[-1] = False
    ascending[cut] = -torch.inf
    x = torch.empty_like(x).scatter_(0, ids, ascending)
    return int(torch.multinomial(x.softmax(0), 1, generator=chance))
