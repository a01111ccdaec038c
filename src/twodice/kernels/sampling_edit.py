"""Stages 1 to 3 of the chain in plain torch: rows that cannot be served, and the edits of single logits.

The readable twin of ``native/sampling_edit.hpp``. An edit touches a few ids of a row, so rows are edited one
after the other here; arithmetic is that of the logits' type (float32, or float64), one rounding a step.

Letters: R rows, V vocabulary, T tokens of a row's history.

References
----------
Repetition: Keskar et al. 2019 (CTRL). Presence and frequency: the OpenAI API. No-repeat n-gram: Paulus et al.
2017. DRY: the sampler of text-generation-webui (p-e-w 2024).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from twodice.kernels.sampling_settings import Past, Rule, Settings, Status

DRY_MOST = 1e30
"""A DRY penalty grows with the length of the repeat up to this, and no further."""


def bad_rows(x: Tensor) -> Tensor:
    """`Status` of each row as (R,) int64: NAN, INFINITE or OK."""
    status = torch.full((x.shape[0],), int(Status.OK), dtype=torch.int64, device=x.device)
    status[(x == torch.inf).any(1)] = int(Status.INFINITE)
    status[x.isnan().any(1)] = int(Status.NAN)
    return status


def edit(x: Tensor, settings: Settings, past: Past | None, mask: Tensor | None) -> Tensor:
    """Stages 2 and 3 on a copy of (R, V) float32 or float64 logits.

    Parameters
    ----------
    mask : (R, ceil(V / 32)) int32 tensor, or None
        Bit ``id % 32`` of word ``id // 32`` is 1 where the id is allowed.
    """
    x = x.clone()
    for i in range(x.shape[0]):
        row = settings.row(i)
        _restrict(x[i], row, settings, None if mask is None else mask[i], _generated(past, i))
        if past is not None:
            seen = past.ids[int(past.offsets[i]) : int(past.offsets[i + 1])].tolist()
            prompt = 0 if past.prompts is None else int(past.prompts[i])
            _penalise(x[i], row, seen, prompt)
            _ban_ngrams(x[i], int(row["ngram"]), seen)
            _dry(x[i], row, set(settings.list_of(row, "breaker").tolist()), seen)
    return x


def _generated(past: Past | None, i: int) -> int:
    if past is None or past.prompts is None:
        return 0
    return int(past.offsets[i + 1]) - int(past.offsets[i]) - int(past.prompts[i])


def _restrict(x: Tensor, row: Any, settings: Settings, mask: Tensor | None, generated: int) -> None:
    """Stage 2 on one row: bias, the packed mask, allowed ids, banned ids, and stop ids while it is short."""
    at = slice(int(row["bias_begin"]), int(row["bias_end"]))
    ids = torch.from_numpy(settings.ids[at]).to(x.device)
    x[ids] += torch.from_numpy(settings.values[at]).to(x.device, x.dtype)
    if mask is not None:
        place = torch.arange(x.numel(), device=x.device)
        x[(mask[place >> 5].to(torch.int64) >> (place & 31)) & 1 == 0] = -torch.inf
    if row["allowed_begin"] < row["allowed_end"]:
        ids = torch.from_numpy(settings.list_of(row, "allowed")).to(x.device)
        only = torch.full_like(x, -torch.inf)
        only[ids] = x[ids]
        x.copy_(only)
    x[torch.from_numpy(settings.list_of(row, "banned")).to(x.device)] = -torch.inf
    if generated < row["min_tokens"]:
        x[torch.from_numpy(settings.list_of(row, "stop")).to(x.device)] = -torch.inf


def _number(value: float, like: Tensor) -> Tensor:
    # A tensor and not a number: by a number CUDA multiplies with the reciprocal, which rounds twice.
    return torch.tensor(float(value), dtype=like.dtype, device=like.device)


def _penalise(x: Tensor, row: Any, seen: list[int], prompt: int) -> None:
    """Repetition, then frequency, then presence, over the last `penalty_range` tokens."""
    begin = max(0, len(seen) - int(row["penalty_range"])) if row["penalty_range"] > 0 else 0
    if row["penalty"] != 1:
        first = max(begin, prompt) if row["rules"] & Rule.REPEAT_TEXT else begin
        ids = torch.tensor(sorted(set(seen[first:])), dtype=torch.int64, device=x.device)
        factor = _number(row["penalty"], x)
        x[ids] = torch.where(x[ids] > 0, x[ids] / factor, x[ids] * factor)
    if row["frequency"] != 0 or row["presence"] != 0:
        counted = seen[begin if row["rules"] & Rule.COUNT_PROMPT else max(begin, prompt) :]
        count = Counter(counted)
        ids = torch.tensor(list(count), dtype=torch.int64, device=x.device)
        often = torch.tensor(list(count.values()), dtype=x.dtype, device=x.device)
        x[ids] = (x[ids] - often * _number(row["frequency"], x)) - _number(row["presence"], x)


def _ban_ngrams(x: Tensor, n: int, seen: list[int]) -> None:
    """Ban each token that would make an n-gram that the history holds already."""
    if n <= 0 or len(seen) < n:
        return
    start = seen[len(seen) - n + 1 :]
    banned = {seen[j + n - 1] for j in range(len(seen) - n + 1) if seen[j : j + n - 1] == start}
    x[torch.tensor(sorted(banned), dtype=torch.int64, device=x.device)] = -torch.inf


def _dry(x: Tensor, row: Any, breakers: set[int], seen: list[int]) -> None:
    """Don't repeat yourself: a token that would go on with a repeat of the end of the text pays for it.

    ``penalty(t) = multiplier * base^(L - allowed)``, L the longest run that ends the history and has stood
    before t, and L >= allowed. A run holds no breaker; a breaker is not penalised.
    """
    if not row["dry_multiplier"] > 0:
        return
    if row["dry_range"] > 0:
        seen = seen[-int(row["dry_range"]) :]
    room = 0  # tokens after the last breaker: no run is longer
    while room < len(seen) and seen[-1 - room] not in breakers:
        room += 1
    longest: dict[int, int] = {}
    for j in range(len(seen) - 1):  # a run that ends at j, before the token seen[j + 1]
        length = 0
        while length < min(room, j + 1) and seen[j - length] == seen[-1 - length]:
            length += 1
        following = seen[j + 1]
        if length >= max(int(row["dry_allowed"]), 1) and following not in breakers:
            longest[following] = max(longest.get(following, 0), length)
    for token, length in longest.items():
        x[token] -= _number(_dry_penalty(row, length), x)


def _dry_penalty(row: Any, length: int) -> float:
    penalty = float(row["dry_multiplier"])
    for _ in range(length - int(row["dry_allowed"])):
        penalty *= float(row["dry_base"])
        if penalty >= DRY_MOST:
            return DRY_MOST
    return penalty
