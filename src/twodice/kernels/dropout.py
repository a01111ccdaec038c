"""Dropout on a tensor with declared axes: forward, gradient, and the operation that ``torch.compile`` sees.

Eager calls on the CPU go straight to the native kernel with raw addresses (a registered operation costs tens
of microseconds a call); tensors on a GPU go to the Triton kernel; compiled code and fake tensors go through
``torch.ops.twodice.dropout``; everything else takes the readable twin in ``dropout_reference``. The choice
changes speed only. This module knows no rate (only thresholds), no plan and no model.

Letters: B rows, H heads, T positions, C columns, S keys, N rows of a flattened batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from twodice.errors import ConfigError, ContractError, ShapeError
from twodice.kernels import dispatch, lent
from twodice.kernels.dropout_layout import LAYOUTS, coordinates, follow, sizes, spread, strides
from twodice.kernels.dropout_reference import dropout_reference
from twodice.random.draws import BOUNDS, ONE, check_bound, check_bounds
from twodice.random.keys import Key, key_bits

__all__ = ["LAYOUTS", "dropout"]

_native = dispatch.native
lent.lend()
_SIGN = 1 << 63
_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_NO_STRIDES = (0, 0, 0, 0)
_NOTHING: tuple[int, tuple[int, int], torch.Tensor | None] = (0, (0, 0), None)
# From this size of the result on, it is written past the caches, which it would only empty.
_STREAM_BYTES = 16 << 20
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_transforms_active = torch._C._are_functorch_transforms_active
_many_at_once = torch._C._functorch.is_legacy_batchedtensor


def dropout(
    x: torch.Tensor,
    threshold: int | torch.Tensor,
    key: Key | int | torch.Tensor,
    step: int | torch.Tensor,
    *,
    examples: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    layout: str = "btc",
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `x` with units dropped, and `residual` added where one is given.

    Parameters
    ----------
    x : tensor
        float32, float64, bfloat16 or float16, with the axes that `layout` names.
    threshold : int or 0-dim int64 tensor
        In [0, 65536]: 65536 times the rate. A tensor, so that a schedule never recompiles.
    key : Key, int or 0-dim int64 tensor
        The site's key. A tensor, so that another draw of masks never recompiles.
    step : int or 0-dim int64 tensor
        In [0, 2^32).
    examples : int64 tensor (B,) or (B, T), optional
        Slot of each row in the global batch of the step; default 0 .. B-1. For ``nc`` (N,) or what flattens
        to it.
    positions : int64 tensor (B, T) or (1, T), optional
        Position of each token; default 0 .. T-1. For ``nc`` it must be given, as (N,) or as what flattens to
        it.
    key_positions : int64 tensor (B, S) or (1, S), optional
        Only for ``bhts``: the column of each key is its position; default 0 .. S-1. With (B, 1) or (1, 1) it
        is that of the first, and the others follow.
    layout : {"btc", "tbc", "bc", "nc", "bhts", "bct", "bchw"}
        What the axes mean; ``bc`` has position 0, ``bchw`` position h * W + w, ``bhts`` head h.
    residual : tensor, optional
        Of the shape and dtype of `x`; the sum is rounded after the product, as in ``residual + dropout(x)``.
    out : tensor, optional
        Where the result is written, for eager calls that need no gradient; `x` itself is allowed.

    Returns
    -------
    tensor
        A new tensor of the shape and dtype of `x`, never `x` itself, also where nothing is dropped.

    Raises
    ------
    ShapeError
        If shapes, layout or dtype do not fit.
    ConfigError
        If a coordinate is outside its range.

    Notes
    -----
    *Randomness.* A pure function of (key, step, example, position, head, column); the backward pass computes
    the mask again from them, and keeps no mask. Dropout at fixed coordinates is linear, so gradients of any
    order and forward-mode tangents are the same selection and scale. ``torch.vmap`` gives what a loop would;
    as then all elements with one set of coordinates have one mask, it demands mapped coordinates or
    ``randomness="same"``.
    """
    if torch.compiler.is_compiling() or type(x) not in _PLAIN:
        if out is not None:
            raise ContractError("out= serves eager calls only; leave it out in compiled code")
        return _through_operation(
            x, threshold, key, step, examples, positions, key_positions, layout, residual
        )
    bits = key.seed if isinstance(key, Key) else key_bits(key)  # type: ignore[arg-type]
    if _transforms_active() or forward_ad._current_level >= 0:
        if out is not None:
            raise ContractError(
                "out= serves plain calls only; leave it out under torch.func, vmap and forward-mode AD"
            )
        return _Transformed.apply(  # type: ignore[no-any-return]
            x, residual, threshold, bits, step, examples, positions, key_positions, layout, False
        )
    if x.is_cpu:
        # Values now: a schedule's tensor may be changed in place before the backward pass reads it.
        threshold = int(threshold)
        if type(step) is not int:
            step = _whole(step)
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        if out is not None:
            raise ContractError(
                "out= serves calls that need no gradient; leave it out or use torch.no_grad()"
            )
        if not x.is_cpu:  # as above, without waiting for the device
            threshold, step = (v.clone() if isinstance(v, torch.Tensor) else v for v in (threshold, step))
        return _apply(x, residual, (threshold, bits, step, layout), examples, positions, key_positions)
    return _forward(x, residual, threshold, bits, step, examples, positions, key_positions, layout, out)


def _whole(step: Any) -> int:
    """A step that is not plainly an int: numpy's, a tensor's; never a rounded fraction."""
    try:
        return operator.index(step)
    except TypeError:
        raise ConfigError(f"step must be an integer in [0, {BOUNDS['step']}); got {step!r}") from None


class _Dropout(torch.autograd.Function):
    """The gradient: the same selection and scale on what comes from above. Keeps coordinates only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        rest: tuple[Any, ...],
        examples: torch.Tensor | None,
        positions: torch.Tensor | None,
        key_positions: torch.Tensor | None,
    ) -> torch.Tensor:
        if examples is not None or positions is not None or key_positions is not None:
            ctx.save_for_backward(examples, positions, key_positions)
        ctx.rest = rest
        threshold, key, step, layout = rest
        return _forward(x, residual, threshold, key, step, examples, positions, key_positions, layout)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        threshold, key, step, layout = ctx.rest
        examples, positions, key_positions = ctx.saved_tensors or (None, None, None)
        for_x = None
        needs = ctx.needs_input_grad
        if needs[0]:
            for_x = _again(grad, None, threshold, key, step, examples, positions, key_positions, layout)
        return for_x, grad if needs[1] else None, None, None, None, None


# Straight to torch's own apply: the one in Python looks for transforms, which are served before, and costs a
# microsecond and a half a call.
_apply: Callable[..., torch.Tensor] = super(torch.autograd.Function, _Dropout).apply


class _Transformed(torch.autograd.Function):
    """The same under ``torch.func``, vmap and forward-mode AD, whose rules cost every call microseconds.

    The last argument says whether this is a gradient or a tangent, so that the mask was decided elsewhere.
    """

    @staticmethod
    def forward(
        x: torch.Tensor,
        residual: torch.Tensor | None,
        threshold: int | torch.Tensor,
        key: int,
        step: int | torch.Tensor,
        examples: torch.Tensor | None,
        positions: torch.Tensor | None,
        key_positions: torch.Tensor | None,
        layout: str,
        decided: bool,
    ) -> torch.Tensor:
        if x.is_cpu:
            threshold, step = int(threshold), _whole(step)
        return _one_or_many(x, residual, threshold, key, step, examples, positions, key_positions, layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, _, threshold, key, step, examples, positions, key_positions, layout, _ = inputs
        # A rate and a step may be mapped tensors here, so they are kept like the coordinates.
        kept = [v if isinstance(v, torch.Tensor) else None for v in (threshold, step)]
        ctx.save_for_backward(*kept, examples, positions, key_positions)
        ctx.save_for_forward(*kept, examples, positions, key_positions)
        ctx.rest = threshold if kept[0] is None else None, key, step if kept[1] is None else None, layout

    @staticmethod
    def _rest(ctx: Any) -> tuple[Any, ...]:
        threshold, step, examples, positions, key_positions = ctx.saved_tensors
        plain, key, number, layout = ctx.rest
        threshold, step = plain if threshold is None else threshold, number if step is None else step
        return threshold, key, step, examples, positions, key_positions, layout

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for_x = None
        if ctx.needs_input_grad[0]:
            # What was kept may be wrapped by a transform that is over; apply takes the wrapping off.
            for_x = _Transformed.apply(grad, None, *_Transformed._rest(ctx), True)
        return for_x, grad if ctx.needs_input_grad[1] else None, *[None] * 8

    @staticmethod
    def jvp(ctx: Any, for_x: torch.Tensor | None, for_residual: torch.Tensor | None, *_: Any) -> Any:
        if for_x is None:
            return for_residual
        return _Transformed.apply(for_x, for_residual, *_Transformed._rest(ctx), True)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[torch.Tensor, int]:
        coordinates_mapped = any(axis is not None for axis in in_dims[4:8])
        *_, decided = inputs
        if not (decided or coordinates_mapped or info.randomness == "same"):
            raise ContractError(
                "under vmap the elements must have coordinates of their own, or all drop the same units; got "
                "neither examples nor another coordinate that is mapped; give each element its slot of the "
                "global batch through vmap (examples), or write vmap(..., randomness='same') if one mask for "
                "all is meant"
            )
        each = []
        for i in range(info.batch_size):
            x, residual, threshold, key, step, examples, positions, key_positions, layout, _ = (
                v if axis is None else v.select(axis, i) for v, axis in zip(inputs, in_dims, strict=True)
            )
            each.append(
                _again(x, residual, threshold, key, step, examples, positions, key_positions, layout)
                if decided
                else dropout(
                    x,
                    threshold,
                    key,
                    step,
                    examples=examples,
                    positions=positions,
                    key_positions=key_positions,
                    layout=layout,
                    residual=residual,
                )
            )
        return torch.stack(each), 0


def _again(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    threshold: int | torch.Tensor,
    key: int,
    step: int | torch.Tensor,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    layout: str,
) -> torch.Tensor:
    """The selection and scale of a forward call on its gradient or tangent, itself differentiable."""
    rest = key, step, examples, positions, key_positions, layout
    if _transforms_active() or forward_ad._current_level >= 0:
        return _Transformed.apply(x, residual, threshold, *rest, True)  # type: ignore[no-any-return]
    if x.is_cpu and not (type(threshold) is int and type(step) is int):
        threshold, rest = int(threshold), (key, int(step), *rest[2:])
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        return _apply(x, residual, (threshold, key, rest[1], layout), examples, positions, key_positions)
    return _one_or_many(x, residual, threshold, *rest)


def _one_or_many(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    threshold: int | torch.Tensor,
    key: int,
    step: int | torch.Tensor,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    layout: str,
) -> torch.Tensor:
    """`_forward`, also where autograd runs many gradients as one (``is_grads_batched=True``)."""
    if not (_many_at_once(x) or (residual is not None and _many_at_once(residual))):
        return _forward(x, residual, threshold, key, step, examples, positions, key_positions, layout)
    where = coordinates(x, layout, examples, positions, key_positions)
    return dropout_reference(x, threshold, key, step, where, layout, residual)


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    threshold: int | torch.Tensor,
    key: int,
    step: int | torch.Tensor,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    layout: str,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if x.dtype not in _CODES:
        raise ShapeError(
            f"dropout serves float32, float64, bfloat16 and float16; got {x.dtype}; cast it first"
        )
    if residual is not None:
        _check_like("residual", residual, x)
    if out is not None:
        _check_like("out", out, x)
    if isinstance(threshold, int) and not 0 <= threshold <= ONE:
        raise ConfigError(f"a threshold must be in [0, {ONE}]; got {threshold}")
    if isinstance(step, int) and not 0 <= step < BOUNDS["step"]:
        check_bound("step", step)
    if x.is_cpu and _native is not None:
        return _native_forward(
            x, residual, threshold, key, step, examples, positions, key_positions, layout, out
        )
    if x.is_cuda and dispatch.triton_is_there():
        # Here, so that nobody without a tensor on a GPU loads triton.
        from twodice.kernels.dropout_triton import dropout_triton

        return dropout_triton(
            x, residual, threshold, key, step, examples, positions, key_positions, layout, out
        )
    where = coordinates(x, layout, examples, positions, key_positions)
    if x.is_cpu:
        for name, values in where.given():
            check_bounds(name, values)
        dispatch.say_once_when_slow()
    y = torch.empty_like(x) if out is None else out
    y.copy_(dropout_reference(x, threshold, key, step, where, layout, residual))
    return y


def _check_like(name: str, other: torch.Tensor, x: torch.Tensor) -> None:
    if other.shape != x.shape or other.dtype != x.dtype or other.device != x.device:
        raise ShapeError(
            f"{name} must have the shape, dtype and device of x ({tuple(x.shape)}, {x.dtype}, {x.device}); "
            f"got {tuple(other.shape)}, {other.dtype}, {other.device}"
        )


def _native_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    threshold: Any,
    key: int,
    step: Any,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    layout: str,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    shape = sizes(x, layout)
    y = torch.empty_like(x) if out is None else out
    if threshold == ONE or not x.numel():
        # The kernel does not run, and what was given must be right all the same.
        for name, values in coordinates(x, layout, examples, positions, key_positions).given():
            check_bounds(name, values)
        # 65536 does not fit the kernel's 16 bits; nothing is kept, and a sum with +0 is the residual but for
        # -0.
        return y.zero_() if residual is None else torch.add(residual, 0.0, out=y)
    into, out_of = strides(y, layout), strides(x, layout)
    over = _NO_STRIDES if residual is None else strides(residual, layout)
    if into is None or out_of is None or over is None:
        # Only bchw with axes that do not join; a plain copy has one stride for h and w.
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        return y.copy_(
            _native_forward(x, residual, threshold, key, step, examples, positions, key_positions, layout)
        )
    example = position = column = _NOTHING
    if layout == "nc":
        where = coordinates(x, layout, examples, positions, key_positions)
        example = _address("examples", where.example[:, 0], x, "btc", shape[0], 1)
        position = _address("positions", where.position[:, 0], x, "btc", shape[0], 1)
    else:
        if key_positions is not None:
            if layout != "bhts":
                coordinates(x, layout, examples, positions, key_positions)  # raises
            column = _address("key_positions", key_positions, x, layout, shape[0], shape[3])
        if examples is not None:
            example = _address("examples", examples, x, layout, shape[0], shape[2])
        if positions is not None:
            position = _address("positions", positions, x, layout, shape[0], shape[2])
    served = _native.dropout(
        x.data_ptr(),
        y.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        _CODES[x.dtype],
        shape,
        out_of,
        into,
        over,
        example[0],
        example[1],
        position[0],
        position[1],
        column[0],
        column[1],
        follow(key_positions),
        key,
        step,
        threshold,
        torch.get_num_threads(),
        _STREAM_BYTES // x.element_size(),
    )
    if not served:
        for name, values in coordinates(x, layout, examples, positions, key_positions).given():
            check_bounds(name, values)
    return y


def _address(
    name: str, values: torch.Tensor, x: torch.Tensor, layout: str, rows: int, columns: int
) -> tuple[int, tuple[int, int], torch.Tensor]:
    """Where a coordinate lies, its strides along B and T (0 along one value), and what keeps it alive.

    Views cost microseconds, and every site of a training step comes by: so the usual shapes go without one.
    """
    if values.dtype is torch.int64 and values.is_cpu:
        shape, stride = values.shape, values.stride()
        if (
            len(shape) == 2
            and shape[1] == columns
            and (shape[0] == rows or (shape[0] == 1 and name != "examples"))
        ):
            return values.data_ptr(), (stride[0] if shape[0] > 1 else 0, stride[1]), values
        if name == "examples" and len(shape) == 1 and shape[0] == rows:
            return values.data_ptr(), (stride[0], 0), values
    values = spread(name, values, x, layout, rows, columns).to("cpu", torch.int64)
    down, along = values.stride()
    return (
        values.data_ptr(),
        (down if values.shape[0] > 1 else 0, along if values.shape[1] > 1 else 0),
        values,
    )


@torch.library.custom_op("twodice::dropout", mutates_args=())
def _operation(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    threshold: torch.Tensor,
    key: torch.Tensor,
    step: torch.Tensor,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    layout: str,
) -> torch.Tensor:
    bits = int(key) % (1 << 64)
    if forward_ad._current_level >= 0 and any(
        v is not None and forward_ad.unpack_dual(v).tangent is not None for v in (x, residual)
    ):
        raise ContractError(
            "compiled code and subclasses of tensors have no forward-mode derivative of dropout, so the "
            "tangent would be lost; call it eagerly on plain tensors, or take the derivative in reverse mode"
        )
    if x.is_cpu:
        return _forward(
            x, residual, int(threshold), bits, int(step), examples, positions, key_positions, layout
        )
    return _forward(x, residual, threshold, bits, step, examples, positions, key_positions, layout)


@_operation.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, _, threshold, key, step, examples, positions, key_positions, layout = inputs
    ctx.save_for_backward(threshold, key, step, examples, positions, key_positions)
    ctx.layout = layout


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    threshold, key, step, examples, positions, key_positions = ctx.saved_tensors
    for_x = None
    if ctx.needs_input_grad[0]:
        for_x = _operation(grad, None, threshold, key, step, examples, positions, key_positions, ctx.layout)
    return for_x, grad if ctx.needs_input_grad[1] else None, None, None, None, None, None, None, None


_operation.register_autograd(_gradient, setup_context=_keep)


def scalar(value: int | torch.Tensor) -> torch.Tensor:
    """An integer of 64 bits, signed or not, as the 0-dim tensor that a compiled graph takes."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.full((), value - (1 << 64) if value >= _SIGN else value, dtype=torch.int64)


def scalar_key(key: Key | int | torch.Tensor) -> torch.Tensor:
    """A key as the 0-dim tensor that a compiled graph takes."""
    if isinstance(key, torch.Tensor):
        return key
    return scalar(key.seed if isinstance(key, Key) else key_bits(key))


def _through_operation(
    x: torch.Tensor,
    threshold: int | torch.Tensor,
    key: Key | int | torch.Tensor,
    step: int | torch.Tensor,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    layout: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    if x.dtype not in _CODES:
        raise ShapeError(
            f"dropout serves float32, float64, bfloat16 and float16; got {x.dtype}; cast it first"
        )
    sizes(x, layout)
    y: torch.Tensor = _operation(
        x,
        residual,
        scalar(threshold),
        scalar_key(key),
        scalar(step),
        examples,
        positions,
        key_positions,
        layout,
    )
    return y
