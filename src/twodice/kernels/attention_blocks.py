"""The native call of attention on the CPU: addresses, strides, and how many queries a block has.

A block is some queries of one head with all keys that they may see; the native half works through the blocks
of each head, forward and backward, with torch's own product of matrices. Scores live in its scratch. This
module knows no autograd.

Letters: B rows, H query heads, N key heads, T queries, S keys, K key width, W value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from twodice.kernels import dispatch, lent
from twodice.kernels.attention_reference import Rule
from twodice.kernels.dropout_layout import Coordinates
from twodice.random.draws import ONE

#: Queries of a block where their places decide what they see (half of them with few keys, as less of a block
#: then lies beyond the diagonal), and elements of a block where they do not: small enough for the caches,
#: large enough for few products.
ROWS = 64
ELEMENTS = 1 << 16

lent.lend()


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a call is given, of one dtype on the CPU; see `kernels.attention.attention`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    steps: torch.Tensor
    where: Coordinates
    rule: Rule


def _serves(x: torch.Tensor) -> bool:
    """Whether rows are contiguous and do not overlap, as products need it."""
    width = x.shape[3]
    return (width == 1 or x.stride(3) == 1) and (x.shape[2] == 1 or x.stride(2) >= width)


def _served(x: torch.Tensor) -> torch.Tensor:
    return x.detach() if _serves(x) else x.detach().contiguous()


def _like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor for the gradient of `x`, in the same memory format where that serves."""
    found = torch.empty_like(x)
    return found if _serves(found) else torch.empty(x.shape, dtype=x.dtype)


def _tensor(x: torch.Tensor) -> tuple[int, tuple[int, int, int]]:
    """Address and strides of rows, heads and positions."""
    return x.data_ptr(), (x.stride(0), x.stride(1), x.stride(2) if x.shape[2] > 1 else x.shape[3])


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _step(x: torch.Tensor, axis: int) -> int:
    """The stride along an axis, 0 where one value serves for all."""
    return x.stride(axis) if x.shape[axis] > 1 else 0


def _steps(x: torch.Tensor | None, *axes: int) -> tuple[int, tuple[int, ...]]:
    """Address, and strides along axes, of what is broadcast; 0 where there is none."""
    return _address(x), tuple(0 if x is None else _step(x, axis) for axis in axes)


def _rows(T: int, S: int, rule: Rule) -> int:
    """How many queries a block has."""
    if rule.causal or rule.window:
        width = min(S, rule.window) if rule.window else S
        return min(T, ROWS if width > 8 * ROWS else max(1, ROWS // 2))
    return min(T, max(ROWS, ELEMENTS // S))


class Call:
    """The native half of a call, and what keeps its addresses alive."""

    def __init__(self, given: Inputs, lse: torch.Tensor, delta: torch.Tensor | None) -> None:
        B, H, T, K = given.query.shape
        N, S, W = *given.key.shape[1:3], given.value.shape[3]
        rule, where, bias, sinks = given.rule, given.where, given.bias, given.sinks
        if bias is not None:
            bias = bias.detach().to(torch.bool if bias.dtype == torch.bool else torch.float32)
            bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
            bias = bias.expand(*bias.shape[:3], S)
            bias = bias if S == 1 or bias.stride(3) == 1 else bias.contiguous()
        sinks = None if sinks is None else sinks.detach().to(torch.float32).contiguous()
        example, position = where.example.to(torch.int64), where.position.to(torch.int64)
        column = None if where.column is None else where.column.to(torch.int64)
        steps = given.steps.expand(B).contiguous()
        self.query, self.key, self.value = _served(given.query), _served(given.key), _served(given.value)
        self.alive = bias, sinks, lse, delta, example, position, column, steps
        self.native: Any = dispatch.native.Attention(
            lent.product(),
            (B, H, N, T, S, K, W),
            8 * given.query.element_size(),
            given.query.dtype == torch.bfloat16,
            _rows(T, S, rule),
            rule.scale,
            rule.softcap,
            rule.causal,
            rule.window,
            _steps(bias, 0, 1, 2),
            bias is not None and bias.dtype == torch.bool,
            _address(sinks),
            lse.data_ptr(),
            _address(delta),
            _steps(example, 0, 2),
            _steps(position, 0, 2),
            _steps(column, 0, 3),
            steps.data_ptr(),
            rule.key,
            rule.threshold,
            rule.keys_key,
            # With every key dropped each row keeps all; 65536 does not fit the kernel's 16 bits.
            0 if rule.drop_keys == ONE else rule.drop_keys,
            torch.get_num_threads(),
        )

    def tensors(self) -> list[tuple[int, tuple[int, int, int]]]:
        return [_tensor(x) for x in (self.query, self.key, self.value)]


def forward(given: Inputs, out: torch.Tensor) -> torch.Tensor:
    """Write the result into `out` and return the log of the sum of exponentials of each row, (B, H, T)."""
    lse = torch.empty(given.query.shape[:3])
    call = Call(given, lse, None)
    call.native.forward(*call.tensors(), _tensor(out))
    return lse


def backward(
    given: Inputs, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, of_bias: bool, of_sinks: bool
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of query, key, value, bias (not at a scale of 0) and sinks."""
    bias, sinks, delta = given.bias, given.sinks, torch.empty_like(lse)
    found = [_like(x) for x in (given.query, given.key, given.value)]
    for_bias = None
    if of_bias and bias is not None:
        for_bias = torch.zeros((1,) * (4 - bias.dim()) + tuple(bias.shape))
    call, out, grad = Call(given, lse, delta), _served(out), _served(grad)
    call.native.backward(
        *call.tensors(),
        _tensor(out),
        _tensor(grad),
        *(_tensor(x) for x in found),
        _steps(for_bias, 0, 1, 2),
        0 if for_bias is None else _step(for_bias, 3),
    )
    for_sinks = None
    if of_sinks and sinks is not None:
        # The sink's share of a row's mass; no value stands behind it, so its gradient is minus delta's part.
        share = torch.exp(sinks.detach().float()[None, :, None] - lse)
        for_sinks = -(share * delta).sum(dim=(0, 2)).to(sinks.dtype)
    if for_bias is not None and bias is not None:
        for_bias = for_bias.div_(given.rule.scale).reshape(bias.shape).to(bias.dtype)
    return *found, for_bias, for_sinks
