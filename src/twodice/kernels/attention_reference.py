"""The readable twin of attention with keyed dropout, in torch operations, on any device.

With scores ``s = scale q k'``, capped to ``c tanh(s / c)`` where there is a softcap (Gemma 2), a bias added,
and what is not seen (causal, window, boolean bias, DropKey) at minus infinity: the weights are the softmax of
the row, the sink of the head (gpt-oss) being one more logit that takes mass and has no value; dropout
multiplies them by 0 or 65536 / (65536 - t); the result is their product with the values. A row that sees no
key gives zero. The whole (B, H, T, S) is made: this file is for reading, for checking, and for where no
kernel is. Knows no gradient of its own.

Letters: B rows, H query heads, N key heads, T queries, S keys, K key width, W value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twodice.kernels.dropout_layout import Coordinates
from twodice.kernels.dropout_reference import kept
from twodice.random.draws import ONE


@dataclass(frozen=True, slots=True)
class Rule:
    """What makes weights of scores, besides tensors: who sees whom, the scale and cap, and what is dropped.

    ``window`` and ``softcap`` of 0 are none. ``drop_keys`` is the threshold of DropKey under the key
    ``keys_key``.
    """

    scale: float
    causal: bool
    window: int
    softcap: float
    threshold: int | torch.Tensor
    key: int
    drop_keys: int | torch.Tensor
    keys_key: int


def seen(T: int, S: int, rule: Rule, device: torch.device) -> torch.Tensor:
    """Return (T, S): True where the query may see the key by its place. Query t stands beside key t."""
    query, key = torch.arange(T, device=device)[:, None], torch.arange(S, device=device)[None]
    allowed = torch.ones(T, S, dtype=torch.bool, device=device)
    if rule.causal:
        allowed &= key <= query
    if rule.window:
        allowed &= (query - key).abs() < rule.window
    return allowed


def _dropped(
    weights: torch.Tensor, threshold: int | torch.Tensor, key: int, step: torch.Tensor, where: Coordinates
) -> torch.Tensor:
    t = torch.as_tensor(threshold, dtype=torch.float64, device=weights.device)
    scale = (ONE / (ONE - t).clamp(min=1)).to(weights.dtype)  # p = 1 keeps nothing that could be scaled
    return torch.where(kept(threshold, key, step, where), weights * scale, torch.zeros_like(weights[:1]))


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    step: torch.Tensor,
    where: Coordinates,
    rule: Rule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result (B, H, T, W) and the log of the sum of exponentials of each row, (B, H, T).

    Parameters
    ----------
    query, key, value : tensor (B, H, T, K), (B, N, S, K), (B, N, S, W)
        N divides H; float64 stays float64, all else is computed in float32.
    bias : tensor broadcastable to (B, H, T, S), optional
        Added to the scores, or, boolean, True where the key is seen.
    sinks : tensor (H,), optional
        One more logit for each head.
    step : int64 tensor (1,) or (B,)
    where : Coordinates
        Of a tensor (B, H, T, S) with layout ``bhts``.
    rule : Rule
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    B, H, T, _ = query.shape
    S = key.shape[2]
    steps = step.reshape(-1, 1, 1, 1)
    # Head h of the queries reads key head h // (H / N).
    key, value = (x.to(wide).repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
    scores = torch.matmul(query.to(wide), key.transpose(-1, -2)) * rule.scale
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    hidden = float("-inf")
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, hidden)
    elif bias is not None:
        scores = scores + bias.to(wide)
    scores = scores.masked_fill(~seen(T, S, rule, scores.device), hidden)
    if not isinstance(rule.drop_keys, int) or rule.drop_keys > 0:
        fewer = scores.masked_fill(~kept(rule.drop_keys, rule.keys_key, steps, where), hidden)
        # A row of which every key would be dropped keeps all.
        scores = torch.where((fewer > hidden).any(dim=-1, keepdim=True), fewer, scores)
    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks.to(wide)[None, :, None, None].expand(B, H, T, 1)], dim=-1)
    nothing = (logits == hidden).all(dim=-1, keepdim=True)
    logits = logits.masked_fill(nothing, 0.0)
    weights = torch.softmax(logits, dim=-1).masked_fill(nothing, 0.0)[..., :S]
    lse = torch.logsumexp(logits.detach(), dim=-1).masked_fill(nothing[..., 0], float("inf"))
    if not isinstance(rule.threshold, int) or rule.threshold > 0:
        weights = _dropped(weights, rule.threshold, rule.key, steps, where)
    return torch.matmul(weights, value).to(query.dtype), lse
