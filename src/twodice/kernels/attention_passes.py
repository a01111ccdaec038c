"""The two passes of attention with keyed dropout: which kernel serves them, and what is made before it runs.

Native blocks on the CPU, Triton on a GPU; the readable twin, whole and once more for the gradient, where they
do not serve: float64, no native module, no triton, on the CPU the gradient of a bias under a softcap, on a
GPU DropKey and heads wider than 256. This module knows no autograd and no registered operation.

Letters: B rows, H query heads, T queries, S keys, W value width.
"""

from __future__ import annotations

import torch

from twodice.kernels import attention_blocks as blocks
from twodice.kernels import dispatch
from twodice.kernels.attention_reference import Rule, attention_reference, gradients_reference
from twodice.kernels.dropout_layout import Coordinates, coordinates
from twodice.random.draws import ONE, check_bounds


def coordinates_of(
    query: torch.Tensor,
    S: int,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
) -> Coordinates:
    """The coordinates of the weights (B, H, T, S), checked where that stops no device."""
    B, H, T, _ = query.shape
    weights = query.new_empty(1).expand(B, H, T, S)  # has the shape, and takes no memory
    where = coordinates(weights, "bhts", examples, positions, key_positions)
    if query.is_cpu:
        for name, values in where.given():
            check_bounds(name, values)
    return where


def _in_blocks(query: torch.Tensor, rule: Rule, of_bias: bool) -> bool:
    """Whether the native kernels serve: they see the gradient of a bias by that of the scores alone."""
    hidden = of_bias and (rule.softcap > 0 or rule.scale == 0)
    return dispatch.native is not None and query.is_cpu and query.dtype != torch.float64 and not hidden


def _in_triton(query: torch.Tensor, value: torch.Tensor, rule: Rule) -> bool:
    """Whether the Triton kernels serve. Nobody without a tensor on a GPU loads triton."""
    if not (query.is_cuda and dispatch.triton_is_there()):
        return False
    from twodice.kernels import attention_triton

    return attention_triton.not_served(query, value, rule) is None


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    steps: torch.Tensor,
    where: Coordinates,
    rule: Rule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and the log of the sum of exponentials of each row."""
    out = empty_result(query, value)
    if _nothing(query, key, value, rule):
        return out.zero_(), query.new_zeros(query.shape[:3], dtype=torch.float32)
    if _in_blocks(query, rule, False):
        return out, blocks.forward(blocks.Inputs(query, key, value, bias, sinks, steps, where, rule), out)
    if _in_triton(query, value, rule):
        from twodice.kernels import attention_triton

        return out, attention_triton.forward(query, key, value, bias, sinks, steps, where, rule, out)
    if query.is_cpu:
        dispatch.say_once_when_slow()
    found, lse = attention_reference(query, key, value, bias, sinks, steps, where, rule)
    return out.copy_(found), lse.to(torch.float32)


def _nothing(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule) -> bool:
    """Whether the result is zero or has no element."""
    everything = isinstance(rule.threshold, int) and rule.threshold == ONE
    return everything or not query.numel() or not key.numel() or not value.numel()


def empty_result(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """An empty result; its memory is (B, T, H, W) where the queries' is, so that joining heads is free."""
    B, H, T, _ = query.shape
    if T > 1 and H > 1 and query.stride(1) < query.stride(2):
        return query.new_empty((B, T, H, value.shape[3])).transpose(1, 2)
    return query.new_empty((B, H, T, value.shape[3]))


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    steps: torch.Tensor,
    where: Coordinates,
    rule: Rule,
    out: torch.Tensor,
    lse: torch.Tensor,
    of_bias: bool,
    of_sinks: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key, value, bias and sinks."""
    inputs = [query, key, value, bias if of_bias else None, sinks if of_sinks else None]
    if _nothing(query, key, value, rule):
        return tuple(None if x is None else torch.zeros_like(x) for x in inputs)
    if _in_blocks(query, rule, of_bias):
        given = blocks.Inputs(query, key, value, bias, sinks, steps, where, rule)
        return blocks.backward(given, grad, out, lse, of_bias, of_sinks)
    if _in_triton(query, value, rule):
        from twodice.kernels import attention_triton

        needs = (True, True, True, of_bias, of_sinks)
        return attention_triton.backward(
            grad, out, lse, query, key, value, bias, sinks, steps, where, rule, needs
        )
    return gradients_reference(grad, query, key, value, bias, sinks, steps, where, rule, of_bias, of_sinks)
