"""Dropout in Triton, for tensors on a GPU: the bits of ``dropout_reference`` in one pass over memory.

One program takes a tile of rows and columns and computes the four Philox words once for 8 neighbouring
columns. Rate and step may be integers or 0-dim tensors on the device; the latter are read by the kernel, so
that a schedule neither waits for the device nor compiles again. Coordinates on the device are not checked
against their bounds, which would wait for it; those that lie on the host are. This module imports triton:
``dropout`` loads it for the first tensor on a GPU. It knows no gradient; the backward pass is the same kernel
on what comes from above.

Letters: B rows, H heads, T positions, C columns.
"""

from __future__ import annotations

import operator

import torch
import triton
import triton.language as tl

from twodice.errors import ShapeError
from twodice.kernels.dropout_layout import coordinates, follow, sizes, spread, strides
from twodice.kernels.philox_triton import (
    INTERPRETED,
    dropped_groups,
    lane_each,
    narrow,
    signed_word,
    signed_words,
    widen,
)
from twodice.random.draws import check_bounds

_NOTHING = (None, 0, 0)
# Elements of a tile: what one program of 4 warps takes in registers.
_TILE = 2048
_WIDEST = 1024


def dropout_triton(
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
    """Return `x` with units dropped and `residual` added; the arguments are those of ``kernels.dropout``."""
    B, H, T, C = shape = sizes(x, layout)
    y = torch.empty_like(x) if out is None else out
    given = _given(x, shape, layout, examples, positions, key_positions)
    if not x.numel():
        return y
    from_x, to_y = strides(x, layout), strides(y, layout)
    from_residual = (0, 0, 0, 0) if residual is None else strides(residual, layout)
    if from_x is None or to_y is None or from_residual is None:
        # Only bchw with axes that do not join; a plain copy has one stride for h and w.
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        whole = dropout_triton(x, residual, threshold, key, step, examples, positions, key_positions, layout)
        return y.copy_(whole)
    rows_in_tile, columns_in_tile = tile(C, narrow=abs(to_y[3]) > 1 and abs(to_y[2]) == 1)
    programs = triton.cdiv(B * H * T, rows_in_tile) * triton.cdiv(C, columns_in_tile)
    with torch.cuda.device_of(x):
        _kernel[(programs,)](
            x,
            residual,
            y,
            *given[0],
            *given[1],
            *given[2],
            *number(threshold, x.device),
            *number(step, x.device),
            *signed_words(key),
            B * H * T,
            H,
            T,
            C,
            *from_x,
            *from_residual,
            *to_y,
            ROWS=rows_in_tile,
            COLUMNS=columns_in_tile,
            FOLLOW=follow(key_positions),
            BY_BITS=INTERPRETED,
            LONG=B * H * T + rows_in_tile >= 1 << 31,
            # The product is rounded before the sum: a fused multiply-add would give other bits.
            enable_fp_fusion=False,
        )
    return y


def tile(columns: int, *, narrow: bool = False) -> tuple[int, int]:
    """Return rows and columns of a tile, powers of two: little beyond the last column, no row below 8.

    `narrow` is for tensors whose neighbours in memory are rows (``bct``): 8 columns, many rows.
    """
    if narrow:
        return _TILE // 16, 8
    wide = min(max(triton.next_power_of_2(columns), 8), _WIDEST)
    while wide > 64 and -columns % wide > columns // 8:
        wide //= 2
    return max(_TILE // wide, 1), wide


def _given(
    x: torch.Tensor,
    shape: tuple[int, int, int, int],
    layout: str,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
) -> list[tuple[torch.Tensor | None, int, int]]:
    """Each coordinate that is given, on the device of `x`, with its strides along B and T (or B and S)."""
    B, _, T, C = shape
    if layout == "nc" or (key_positions is not None and layout != "bhts"):
        where = coordinates(x, layout, examples, positions, key_positions)  # may raise
        found = [where.example[:, 0], where.position[:, 0], None]
    else:
        found = [
            None if values is None else spread(name, values, x, layout, B, length)
            for name, values, length in (
                ("examples", examples, T),
                ("positions", positions, T),
                ("key_positions", key_positions, C),
            )
        ]
    told = ("example", examples), ("position", positions), ("column", key_positions)
    for name, values in told:
        if values is not None and values.is_cpu:
            check_bounds(name, values)
            if name == "column" and follow(values):
                check_bounds(name, values + (C - 1))
    return [_NOTHING if values is None else _strided(values, x.device) for values in found]


def _strided(values: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, int, int]:
    values = values.to(device)
    down, along = values.stride()
    return values, down if values.shape[0] > 1 else 0, along if values.shape[1] > 1 else 0


def number(value: int | torch.Tensor, device: torch.device) -> tuple[int, torch.Tensor | None]:
    """A threshold or step: its value where the host knows it, else where the kernel reads it."""
    value = plain(value)
    if not isinstance(value, torch.Tensor):
        return signed_word(value), None
    if value.device != device or value.is_floating_point():
        raise ShapeError(
            f"rate and step must be integers on the host or on {device}; got {value.dtype} on {value.device}"
        )
    return 0, value


def plain(value: int | torch.Tensor) -> int | torch.Tensor:
    """The integer itself where the host knows it; the interpreter takes the host for the device."""
    if isinstance(value, torch.Tensor) and (INTERPRETED or not value.is_cpu):
        return value
    return operator.index(value)  # type: ignore[arg-type]


@triton.jit(do_not_specialize=["threshold", "step", "k0", "k1", "rows"])
def _kernel(
    x, residual, y,
    examples, example_b, example_t,
    positions, position_b, position_t,
    columns, column_b, column_s,
    threshold, threshold_at, step, step_at, k0, k1,
    rows, H, T, C,
    xb, xh, xt, xc,
    rb, rh, rt, rc,
    yb, yh, yt, yc,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FOLLOW: tl.constexpr, LONG: tl.constexpr,
    BY_BITS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(C, COLUMNS)
    program = tl.program_id(0)
    first_row, first = program // tiles, (program % tiles) * COLUMNS
    if LONG:
        first_row = first_row.to(tl.int64)
    row = first_row * ROWS + tl.arange(0, ROWS)
    here = row < rows
    t, h, b = row % T, (row // T) % H, (row // T) // H

    example = b
    if examples is not None:
        example = tl.load(examples + b.to(tl.int64) * example_b + t * example_t, mask=here, other=0)
    position = t
    if positions is not None:
        position = tl.load(positions + b.to(tl.int64) * position_b + t * position_t, mask=here, other=0)
    if threshold_at is not None:
        threshold = tl.load(threshold_at)
    if step_at is not None:
        step = tl.load(step_at)
    least = threshold.to(tl.uint32)
    example, position, head = example.to(tl.uint32), position.to(tl.uint32), h.to(tl.uint32)
    k0, k1, step = k0.to(tl.uint32), k1.to(tl.uint32), step.to(tl.uint32)

    # Columns in two axes, groups and the 8 of a group: a thread loads neighbours and knows their decisions.
    group = first // 8 + tl.arange(0, COLUMNS // 8)
    eight = tl.arange(0, 8)
    column = group[None, :, None] * 8 + eight[None, None, :]
    inside = here[:, None, None] & (column < C)
    if columns is not None:
        place = tl.load(
            columns + (b.to(tl.int64) * column_b)[:, None, None] + column * column_s, mask=inside, other=0
        )
        if FOLLOW:
            place = place + column
        lane = lane_each(
            place.to(tl.uint32),
            head[:, None, None],
            position[:, None, None],
            example[:, None, None],
            step,
            k0,
            k1,
        )
        keep = lane >= least
    else:
        dropped = dropped_groups(
            group.to(tl.uint32)[None, :],
            head[:, None],
            position[:, None],
            example[:, None],
            step,
            k0,
            k1,
            least,
        )
        keep = (dropped[:, :, None] >> eight[None, None, :].to(tl.uint32)) & 1 == 0

    b, h, t, column = b.to(tl.int64), h.to(tl.int64), t.to(tl.int64), column.to(tl.int64)
    from_x = x + (b * xb + h * xh + t * xt)[:, None, None] + column * xc
    value = tl.load(from_x, mask=inside, other=0.0)
    stays = tl.maximum(65536 - least.to(tl.int32), 1)  # at p = 1 nothing is kept, whatever the scale
    if x.dtype.element_ty == tl.float64:
        result = tl.where(keep, value * (65536.0 / stays.to(tl.float64)), 0.0)
    else:
        # The quotient in float32 has the bits of the quotient in float64 rounded to float32: both operands
        # have few bits, and 53 >= 2 * 24 + 2 (Figueroa, 1995).
        product = widen(value, BY_BITS) * tl.div_rn(65536.0, stays.to(tl.float32))
        result = narrow(tl.where(keep, product, 0.0), x.dtype.element_ty, BY_BITS)
    if residual is not None:
        from_residual = residual + (b * rb + h * rh + t * rt)[:, None, None] + column * rc
        other = tl.load(from_residual, mask=inside, other=0.0)
        if x.dtype.element_ty == tl.float64:
            result = other + result
        else:
            result = narrow(widen(other, BY_BITS) + widen(result, BY_BITS), x.dtype.element_ty, BY_BITS)
    to_y = y + (b * yb + h * yh + t * yt)[:, None, None] + column * yc
    tl.store(to_y, result, mask=inside)
