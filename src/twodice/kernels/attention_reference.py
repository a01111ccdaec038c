"""The readable twin of attention with keyed dropout, in torch operations, on any device.

With scores ``s = scale q k'``, capped to ``c tanh(s / c)`` where there is a softcap (Gemma 2), a bias added,
and what is not seen (causal, window, boolean bias, DropKey) at minus infinity: the weights are the softmax of
the row, the sink of the head (gpt-oss) being one more logit that takes mass and has no value; dropout
multiplies them by 0 or 65536 / (65536 - t); the result is their product with the values. A row that sees no
key gives zero. The whole (B, H, T, S) is made: this file is for reading, for checking, and for where no
kernel is.

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


@dataclass(frozen=True, slots=True)
class Parts:
    """What stands between scores and result, in float32 or float64; heads of keys and values repeated."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    capped: torch.Tensor  # scores after scale and cap
    weights: torch.Tensor  # the softmax
    share: torch.Tensor | None  # of the mass that each sink takes, (B, H, T)
    lse: torch.Tensor
    stays: torch.Tensor | None  # where a weight is not dropped
    keep_scale: torch.Tensor


def parts_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    step: torch.Tensor,
    where: Coordinates,
    rule: Rule,
) -> Parts:
    """Return the weights and what they are made of; the arguments are those of `attention_reference`."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    B, H, T, _ = query.shape
    S = key.shape[2]
    steps = step.reshape(-1, 1, 1, 1)
    # Head h of the queries reads key head h // (H / N).
    query, key, value = (x.to(wide).repeat_interleave(H // x.shape[1], dim=1) for x in (query, key, value))
    capped = torch.matmul(query, key.transpose(-1, -2)) * rule.scale
    if rule.softcap:
        capped = rule.softcap * torch.tanh(capped / rule.softcap)
    scores, hidden = capped, float("-inf")
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
    shares = torch.softmax(logits, dim=-1).masked_fill(nothing, 0.0)
    lse = torch.logsumexp(logits.detach(), dim=-1).masked_fill(nothing[..., 0], float("inf"))
    stays = None
    if not isinstance(rule.threshold, int) or rule.threshold > 0:
        stays = kept(rule.threshold, rule.key, steps, where)
    t = torch.as_tensor(rule.threshold, dtype=torch.float64, device=query.device)
    keep_scale = (ONE / (ONE - t).clamp(min=1)).to(wide)  # p = 1 keeps nothing that could be scaled
    share = None if sinks is None else shares[..., S]
    return Parts(query, key, value, capped, shares[..., :S], share, lse, stays, keep_scale)


def _dropped(x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """`x` by the mask of dropout: of the weights, and of their gradient."""
    if parts.stays is None:
        return x
    return torch.where(parts.stays, x * parts.keep_scale, torch.zeros((), dtype=x.dtype, device=x.device))


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
    parts = parts_of(query, key, value, bias, sinks, step, where, rule)
    return torch.matmul(_dropped(parts.weights, parts), parts.value).to(query.dtype), parts.lse


def gradients_reference(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    step: torch.Tensor,
    where: Coordinates,
    rule: Rule,
    of_bias: bool,
    of_sinks: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of query, key, value, bias and sinks, given that of the result.

    With P the softmax, M the mask of dropout with its scale and Y = (P M) V the result: the gradient of the
    weights is ``G = M (dY V')``, that of the logits ``P (G - delta)`` with ``delta = sum over keys of P G``,
    and a sink, whose weight meets no value, gets minus its share of delta.
    """
    parts = parts_of(query, key, value, bias, sinks, step, where, rule)
    up, weights = grad.to(parts.weights.dtype), parts.weights
    of_weights = _dropped(torch.matmul(up, parts.value.transpose(-1, -2)), parts)
    delta = (weights * of_weights).sum(dim=-1)
    of_logits = weights * (of_weights - delta[..., None])
    of_scores = of_logits * rule.scale
    if rule.softcap:
        of_scores = of_scores * (1.0 - (parts.capped / rule.softcap) ** 2)
    of_key = torch.matmul(of_scores.transpose(-1, -2), parts.query)
    of_value = torch.matmul(_dropped(weights, parts).transpose(-1, -2), up)
    for_bias = for_sinks = None
    if of_bias and bias is not None:
        for_bias = of_logits.sum_to_size((1,) * (4 - bias.dim()) + tuple(bias.shape)).reshape(bias.shape)
        for_bias = for_bias.to(bias.dtype)
    if of_sinks and sinks is not None and parts.share is not None:
        for_sinks = -(parts.share * delta).sum(dim=(0, 2)).to(sinks.dtype)
    # Each key head gets the sum over the query heads that read it.
    heads = key.shape[1]
    return (
        torch.matmul(of_scores, parts.key).to(query.dtype),
        of_key.unflatten(1, (heads, -1)).sum(dim=2).to(key.dtype),
        of_value.unflatten(1, (heads, -1)).sum(dim=2).to(value.dtype),
        for_bias,
        for_sinks,
    )
