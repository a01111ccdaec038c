"""Attention with keyed dropout in Triton, forward and backward, for tensors on a GPU.

Blocks of scores stay on the chip and the softmax is taken as they come (FlashAttention-2, Dao 2023). Kept for
the backward pass are the result and one number a row; the masks are computed again from the key, with the
counter of ``dropout`` in layout ``bhts``: head the query head, position the query's, column the key's
position. So a masked weight is the same weight on every backend, while sums differ in their order. No atomic
addition: the gradients are the same at every call. This module imports triton and decides nothing that the
readable twin ``attention_reference`` does not define.

Letters: B rows, H query heads, N key heads, G = H / N, T queries, S keys, K key width, W value width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from twodice.kernels import attention_triton_kernels as kernels
from twodice.kernels.attention_reference import Rule
from twodice.kernels.dropout_layout import Coordinates
from twodice.kernels.dropout_triton import number, plain
from twodice.kernels.philox_triton import INTERPRETED, signed_words

_WIDEST_HEAD = 256


def not_served(query: torch.Tensor, value: torch.Tensor, rule: Rule) -> str | None:
    """Return why the kernels do not serve this, in words, or None where they do."""
    if query.dtype == torch.float64:
        return "float64"
    if max(query.shape[-1], value.shape[-1]) > _WIDEST_HEAD:
        return f"heads wider than {_WIDEST_HEAD}"
    dropped = plain(rule.drop_keys)
    if not isinstance(dropped, int) or dropped:
        return "DropKey"
    return None


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    step: torch.Tensor,
    where: Coordinates,
    rule: Rule,
    out: torch.Tensor,
    block: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Write the result (B, H, T, W) into `out` and return the log of the sum of exponentials, (B, H, T).

    The other arguments are those of `attention_reference`; `block` is the number of queries and keys of a
    tile, powers of two from 16.
    """
    call = _Call(query, key, value, bias, step, where, rule, block, backward=False)
    B, H, T, _ = query.shape
    lse = torch.empty(B, H, T, dtype=torch.float32, device=query.device)
    sinks = None if sinks is None else sinks.contiguous()
    call.run(kernels.forward_kernel, call.row_blocks * B * H, out, *call.of(out), lse, sinks)
    return lse


def backward(
    grad: torch.Tensor,
    result: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    step: torch.Tensor,
    where: Coordinates,
    rule: Rule,
    needs: tuple[bool, bool, bool, bool, bool] = (True, True, True, True, True),
    block: tuple[int, int] | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients for query, key, value, bias and sinks, None where `needs` has False."""
    call = _Call(query, key, value, bias, step, where, rule, block, backward=True)
    B, H, T, _ = query.shape
    S = key.shape[2]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    delta = (grad.float() * result.float()).sum(-1).contiguous()
    shared = (grad, *call.of(grad), lse, delta)
    of_query = of_key = of_value = of_bias = of_sinks = None
    empty = not (B * H * T * S)
    if needs[0]:
        of_query = torch.zeros_like(query) if empty else torch.empty_like(query)
        of_query = of_query if of_query.stride(-1) == 1 else of_query.contiguous()
        if not empty:
            call.run(kernels.query_kernel, call.row_blocks * B * H, *shared, of_query, *call.of(of_query))
    if needs[1] or needs[2]:
        of_key = torch.zeros(key.shape, dtype=key.dtype, device=key.device)
        of_value = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        if not empty:
            programs = call.key_blocks * B * key.shape[1]
            call.run(
                kernels.key_kernel, programs, *shared, of_key, *call.of(of_key), of_value, *call.of(of_value)
            )
    if bias is not None and needs[3] and bias.dtype != torch.bool:
        shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        whole = torch.zeros(shape[0], shape[1], T, S, dtype=torch.float32, device=query.device)
        if not empty:
            programs = call.row_blocks * call.key_blocks * shape[0] * shape[1]
            call.run(kernels.bias_kernel, programs, *shared, whole, B, *shape[:2])
        of_bias = whole.sum_to_size(shape).reshape(bias.shape).to(bias.dtype)
    if sinks is not None and needs[4]:
        mass = torch.exp(sinks.float()[None, :, None] - lse)
        of_sinks = -(mass * delta).sum((0, 2)).to(sinks.dtype)
    return of_query, of_key if needs[1] else None, of_value if needs[2] else None, of_bias, of_sinks


class _Call:
    """The arguments that all kernels share, brought to what they read: rows in a row, strides, words."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        step: torch.Tensor,
        where: Coordinates,
        rule: Rule,
        block: tuple[int, int] | None,
        *,
        backward: bool,
    ) -> None:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        B, H, T, K = query.shape
        S, W = key.shape[2], value.shape[3]
        widest = max(triton.next_power_of_2(K), triton.next_power_of_2(W), 16)
        if block is None:
            # float32 takes no tensor core, as those round it, and its larger blocks compile for minutes.
            small = widest > 128 or query.dtype == torch.float32
            block = (32, 32) if small else (64, 64) if widest <= 64 else (64, 32)
        self.block = block
        self.row_blocks, self.key_blocks = triton.cdiv(T, block[0]), triton.cdiv(S, block[1])
        self.device = query.device
        boolean = bias is not None and bias.dtype == torch.bool
        if bias is not None:
            bias = (bias.view(torch.uint8) if boolean else bias).broadcast_to(B, H, T, S)
        across = (0, 0, 0, 0) if bias is None else bias.stride()
        threshold = plain(rule.threshold)
        example, position, column = where.example[:, 0], where.position[:, 0], where.column
        self.first = (
            query, *self.of(query), key, *self.of(key), value, *self.of(value), bias, *across,
            example, *_along(example), position, *_along(position),
            *((None, 0, 0) if column is None else (column, *_along(column[:, 0, 0]))),
            step, 1 if step.shape[0] > 1 else 0,
            *number(threshold, query.device), *signed_words(rule.key),
            rule.scale, rule.softcap, rule.window, H, H // key.shape[1], T, S, K, W,
        )  # fmt: skip
        self.constants: dict[str, Any] = {
            "DROP": threshold != 0 if isinstance(threshold, int) else True,
            "CAUSAL": rule.causal,
            "WINDOW": rule.window > 0,
            "SOFTCAP": rule.softcap > 0,
            "BOOLEAN": boolean,
            "ROWS": block[0],
            "KEYS": block[1],
            "WIDE_K": max(triton.next_power_of_2(K), 16),
            "WIDE_W": max(triton.next_power_of_2(W), 16),
            "BY_BITS": INTERPRETED,
            "num_warps": 8 if widest > 128 or (backward and widest > 64) else 4,
            "num_stages": 2,
            "enable_fp_fusion": True,
        }

    @staticmethod
    def of(x: torch.Tensor) -> tuple[int, int, int]:
        """Strides along rows, heads and places; along the width it is 1."""
        return x.stride(0), x.stride(1), x.stride(2)

    def run(self, kernel: Any, programs: int, *rest: Any) -> None:
        with torch.cuda.device_of(self.first[0]):
            kernel[(programs,)](*self.first, *rest, **self.constants)


def _along(values: torch.Tensor) -> tuple[int, int]:
    """The strides of a coordinate along B and T, 0 along one value."""
    down, along = values.stride()
    return down if values.shape[0] > 1 else 0, along if values.shape[1] > 1 else 0
