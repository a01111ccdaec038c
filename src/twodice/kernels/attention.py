"""Attention with keyed dropout: forward, gradient, and the operation that ``torch.compile`` sees.

For the backward pass the result and one number a row are kept, no (T, S) tensor: the weights, with the mask,
are computed again from the scores and the key. Eager calls go straight to the passes, compiled code goes
through ``torch.ops.twodice.attention``. This module knows no rate (only thresholds), no plan and no model.

Letters: B rows, H query heads, N key heads, G = H / N, T queries, S keys, K key width, W value width.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from twodice.errors import ConfigError, ShapeError
from twodice.kernels.attention_operation import through_operation
from twodice.kernels.attention_passes import backward, coordinates_of, forward
from twodice.kernels.attention_reference import Rule
from twodice.kernels.dropout_layout import Coordinates
from twodice.random.draws import ONE, check_bound, check_bounds
from twodice.random.keys import Key, key_bits

__all__ = ["attention"]

_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    threshold: int | torch.Tensor,
    site_key: Key | int | torch.Tensor,
    step: int | torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    examples: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    drop_keys: int | torch.Tensor = 0,
    keys_key: Key | int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Return attention of `query` to `key` and `value`, with weights dropped.

    Parameters
    ----------
    query, key, value : tensor (B, H, T, K), (B, N, S, K), (B, N, S, W)
        Of one dtype and device; under autocast they are cast first, as for ``scaled_dot_product_attention``.
        N divides H: head h of the queries reads key head ``h // (H / N)``.
    threshold : int or 0-dim int64 tensor
        In [0, 65536]: 65536 times the rate of dropping a weight.
    site_key : Key, int or 0-dim int64 tensor
        A tensor in compiled code, so that another draw of masks never recompiles.
    step : int, or int64 tensor, 0-dim or (B,)
        In [0, 2^32); one for all rows, or one a row.
    bias : tensor broadcastable to (B, H, T, S), optional
        Added to the scores after the cap, or, boolean, True where the key is seen. A row that sees no key
        gives zero.
    causal : bool
        Whether query t sees the keys s <= t only.
    window : int, optional
        Whether query t sees only keys with ``|t - s| < window``; at least 1.
    softcap : float, optional
        Scores become ``softcap * tanh(scores / softcap)``; positive.
    sinks : tensor (H,), optional
        One more logit for each head, which takes mass and has no value.
    scale : float, optional
        What products of queries and keys are multiplied by; default ``1 / sqrt(K)``.
    examples, positions, key_positions : int64 tensor, optional
        As in `kernels.dropout.dropout` with layout ``bhts``.
    drop_keys : int or 0-dim int64 tensor
        The threshold of DropKey: a key is hidden from a query, with no scale; a row that would lose all its
        keys keeps all.
    keys_key : Key, int or 0-dim int64 tensor, optional
        The key of DropKey; needed where `drop_keys` is not 0.

    Returns
    -------
    tensor (B, H, T, W)
        Of the dtype of `query`; its memory is that of (B, T, H, W) where the queries' is.

    Raises
    ------
    ShapeError
        If shapes, dtypes or devices do not fit.
    ConfigError
        If a number is outside its range.

    Notes
    -----
    *Randomness.* Masks are those of `kernels.dropout.dropout` on the weights: a pure function of (key, step,
    example, query's position, query head, key's position).
    """
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave queries and keys in float32 beside values in bfloat16.
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x if x.dtype == torch.float64 else x.to(low) for x in (query, key, value))
    _check(query, key, value, bias, sinks, window, softcap)
    if keys_key is None and not (isinstance(drop_keys, int) and drop_keys == 0):
        raise ConfigError("drop_keys needs a key of its own: give keys_key")
    compiling = torch.compiler.is_compiling()
    if query.is_cpu and not compiling:
        threshold, drop_keys = int(threshold), int(drop_keys)
        for t in (threshold, drop_keys):
            if not 0 <= t <= ONE:
                raise ConfigError(f"a threshold must be in [0, {ONE}]; got {t}")
    if isinstance(step, torch.Tensor):
        steps = step.to(query.device, torch.int64).reshape(-1)
    else:
        check_bound("step", step)
        steps = torch.full((1,), step, dtype=torch.int64, device=query.device)
    if steps.shape[0] not in (1, query.shape[0]):
        raise ShapeError(f"step must be one number or one a row (B = {query.shape[0]}); got {steps.shape[0]}")
    rule = Rule(
        1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        bool(causal),
        0 if window is None else int(window),
        0.0 if softcap is None else float(softcap),
        threshold,
        _bits(site_key),
        drop_keys,
        0 if keys_key is None else _bits(keys_key),
    )
    if compiling:
        return through_operation(
            query, key, value, bias, sinks, steps, examples, positions, key_positions, rule
        )
    where = coordinates_of(query, key.shape[2], examples, positions, key_positions)
    if query.is_cpu:
        check_bounds("step", steps)
    needs = any(x is not None and x.requires_grad for x in (query, key, value, bias, sinks))
    if torch.is_grad_enabled() and needs:
        return _Attention.apply(  # type: ignore[no-any-return]
            query, key, value, bias, sinks, steps, where.example, where.position, where.column, rule
        )
    return forward(query, key, value, bias, sinks, steps, where, rule)[0]


def _bits(key: Key | int | torch.Tensor) -> Any:
    """The 64 bits of a key; a tensor stays one on the way to the registered operation."""
    if isinstance(key, torch.Tensor) and torch.compiler.is_compiling():
        return key
    return key.seed if isinstance(key, Key) else key_bits(key)  # type: ignore[arg-type]


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ShapeError(f"attention needs (B, H, T, K), (B, N, S, K) and (B, N, S, W); got {shapes}")
    B, H, T, K = query.shape
    if key.shape[:3] != value.shape[:3] or key.shape[0] != B or key.shape[3] != K:
        raise ShapeError(f"attention needs (B, H, T, K), (B, N, S, K) and (B, N, S, W); got {shapes}")
    if not key.shape[1] or H % key.shape[1]:
        raise ShapeError(f"the number of key heads must divide that of query heads; got {shapes}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype or x.device != query.device:
            raise ShapeError(
                f"{name} must have the dtype and device of query ({query.dtype}, {query.device}); "
                f"got {x.dtype}, {x.device}"
            )
    if query.dtype not in _TYPES:
        raise ShapeError(
            f"attention serves float32, float64, bfloat16 and float16; got {query.dtype}; cast it first"
        )
    if bias is not None:
        whole = (B, H, T, key.shape[2])
        shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        if bias.dim() > 4 or any(size not in (1, full) for size, full in zip(shape, whole, strict=True)):
            raise ShapeError(f"bias must be broadcastable to (B, H, T, S) = {whole}; got {tuple(bias.shape)}")
        if bias.dtype != torch.bool and bias.dtype not in _TYPES:
            raise ShapeError(f"bias must be boolean or floating; got {bias.dtype}")
    if sinks is not None and tuple(sinks.shape) != (H,):
        raise ShapeError(f"sinks must be (H,) with H = {H}; got {tuple(sinks.shape)}")
    if window is not None and window < 1:
        raise ConfigError(f"window must be at least 1; got {window}; leave it out for none")
    if softcap is not None and not softcap > 0:
        raise ConfigError(f"softcap must be positive; got {softcap}; leave it out for none")


class _Attention(torch.autograd.Function):
    """The gradient: weights and mask computed again, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        sinks: torch.Tensor | None,
        steps: torch.Tensor,
        example: torch.Tensor,
        position: torch.Tensor,
        column: torch.Tensor | None,
        rule: Rule,
    ) -> torch.Tensor:
        where = Coordinates((*query.shape[:3], key.shape[2]), example, position, column)
        out, lse = forward(query, key, value, bias, sinks, steps, where, rule)
        ctx.save_for_backward(query, key, value, bias, sinks, steps, example, position, column, out, lse)
        ctx.rule = rule
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, bias, sinks, steps, example, position, column, out, lse = ctx.saved_tensors
        where = Coordinates((*query.shape[:3], key.shape[2]), example, position, column)
        needs = ctx.needs_input_grad
        grads = backward(
            grad, query, key, value, bias, sinks, steps, where, ctx.rule, out, lse, needs[3], needs[4]
        )
        return *grads, None, None, None, None, None
