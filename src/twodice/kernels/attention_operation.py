"""Attention with keyed dropout as the registered operations that ``torch.compile`` sees.

Thresholds and keys are 0-dim tensors there, so that no schedule compiles again. This module computes nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from twodice.kernels.attention_passes import backward, coordinates_of, empty_result, forward
from twodice.kernels.attention_reference import Rule

_SIGN = 1 << 63


def _scalar(value: int | torch.Tensor) -> torch.Tensor:
    """An integer of 64 bits as the 0-dim tensor that a compiled graph takes."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.full((), value - (1 << 64) if value >= _SIGN else value, dtype=torch.int64)


def _rule(
    threshold: torch.Tensor,
    key: torch.Tensor,
    drop_keys: torch.Tensor,
    keys_key: torch.Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    on_cpu: bool,
) -> Rule:
    keys = int(key) % (1 << 64), int(keys_key) % (1 << 64)
    t, d = (int(threshold), int(drop_keys)) if on_cpu else (threshold, drop_keys)
    return Rule(scale, causal, window, softcap, t, keys[0], d, keys[1])


@torch.library.custom_op("twodice::attention", mutates_args=())
def _operation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    steps: torch.Tensor,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    threshold: torch.Tensor,
    site_key: torch.Tensor,
    drop_keys: torch.Tensor,
    keys_key: torch.Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    rule = _rule(threshold, site_key, drop_keys, keys_key, scale, causal, window, softcap, query.is_cpu)
    where = coordinates_of(query, key.shape[2], examples, positions, key_positions)
    return forward(query, key, value, bias, sinks, steps, where, rule)


@_operation.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_result(query, value), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("twodice::attention_backward", mutates_args=())
def _operation_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    steps: torch.Tensor,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    threshold: torch.Tensor,
    site_key: torch.Tensor,
    drop_keys: torch.Tensor,
    keys_key: torch.Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    of_bias: bool,
    of_sinks: bool,
) -> list[torch.Tensor]:
    rule = _rule(threshold, site_key, drop_keys, keys_key, scale, causal, window, softcap, query.is_cpu)
    where = coordinates_of(query, key.shape[2], examples, positions, key_positions)
    grads = backward(grad, query, key, value, bias, sinks, steps, where, rule, out, lse, of_bias, of_sinks)
    return [
        torch.empty_like(x).copy_(y)
        for x, y in zip((query, key, value, bias, sinks), grads, strict=True)
        if x is not None and y is not None
    ]


@_operation_backward.register_fake
def _(
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *rest: Any,
) -> list[torch.Tensor]:
    of_bias, of_sinks = rest[-2:]
    inputs = query, key, value, bias if of_bias else None, sinks if of_sinks else None
    return [torch.empty_like(x) for x in inputs if x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:13], *output)
    ctx.numbers = inputs[13:]


def _gradient(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    wanted = ctx.needs_input_grad[3:5]
    found = iter(_operation_backward(grad, out, lse, *inputs, *ctx.numbers, *wanted))
    grads = [next(found) if want else None for want in (True, True, True, *wanted)]
    return (*grads, *(None,) * 12)


_operation.register_autograd(_gradient, setup_context=_keep)


def through_operation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    steps: torch.Tensor,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    rule: Rule,
) -> torch.Tensor:
    """Return attention by the registered operation."""
    numbers = (_scalar(x) for x in (rule.threshold, rule.key, rule.drop_keys, rule.keys_key))
    place = examples, positions, key_positions
    shape = rule.scale, rule.causal, rule.window, rule.softcap
    result: torch.Tensor = _operation(query, key, value, bias, sinks, steps, *place, *numbers, *shape)[0]
    return result
