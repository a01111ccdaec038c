"""The kernels of ``attention_triton``: blocks of scores, forward and in three kinds of backward.

All take the same arguments first, in the same order: tensors each with the strides of rows, heads and places
(the width lies in a row), coordinates with theirs, words of the key, numbers, sizes. Every score is made by
`_scores` and every decision by `_kept`, so that the backward pass sees what the forward pass saw.

Letters: b row, h query head, n key head, G = H / N, t query, s key, K key width, W value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twodice.kernels.philox_triton import dropped_groups, lane_each, narrow, widen


@triton.jit
def _rows(pointer, first, stride, count, width, N: tl.constexpr, WIDE: tl.constexpr):
    """Load (N, WIDE) of rows `first` ..., zero beyond the last row and the width."""
    row, along = first + tl.arange(0, N), tl.arange(0, WIDE)
    inside = (row < count)[:, None] & (along < width)[None, :]
    return tl.load(pointer + row.to(tl.int64)[:, None] * stride + along[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(
    pointer, value, first, stride, count, width, N: tl.constexpr, WIDE: tl.constexpr, BY_BITS: tl.constexpr
):
    row, along = first + tl.arange(0, N), tl.arange(0, WIDE)
    inside = (row < count)[:, None] & (along < width)[None, :]
    to = pointer + row.to(tl.int64)[:, None] * stride + along[None, :]
    tl.store(to, narrow(value, pointer.dtype.element_ty, BY_BITS), mask=inside)


@triton.jit
def _product(a, b, BY_BITS: tl.constexpr):
    """Return a b in float32; float32 operands are not rounded to fewer bits."""
    if BY_BITS:
        a, b = widen(a, BY_BITS), widen(b, BY_BITS)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _scores(
    q, k, t0, s0, bias, ab, at, scale, softcap, window, T, S,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BOOLEAN: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BY_BITS: tl.constexpr,
):  # fmt: skip
    """Return the scores (ROWS, KEYS), -inf where a key is not seen, and the slope of the cap (1 without)."""
    t, s = (t0 + tl.arange(0, ROWS))[:, None], (s0 + tl.arange(0, KEYS))[None, :]
    score = _product(q, tl.trans(k), BY_BITS) * scale
    slope = 1.0
    if SOFTCAP:
        bent = 1.0 - 2.0 / (tl.exp(score * (2.0 / softcap)) + 1.0)
        score, slope = softcap * bent, 1.0 - bent * bent
    seen = (t < T) & (s < S)
    if CAUSAL:
        seen = seen & (s <= t)
    if WINDOW:
        seen = seen & (t - s < window) & (s - t < window)
    if bias is not None:
        added = tl.load(bias + t.to(tl.int64) * ab + s.to(tl.int64) * at, mask=seen, other=0)
        if BOOLEAN:
            seen = seen & (added != 0)
        else:
            score += widen(added, BY_BITS)
    return tl.where(seen, score, float("-inf")), slope


@triton.jit
def _kept(
    b, h, t0, s0, examples, eb, et, positions, pb, pt, columns, cb, cs, step, step_b, least, k0, k1, T, S,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Return (ROWS, KEYS): which weights stay."""
    t = t0 + tl.arange(0, ROWS)
    example = tl.load(examples + b * eb + t * et, mask=t < T, other=0).to(tl.uint32)[:, None]
    position = tl.load(positions + b * pb + t * pt, mask=t < T, other=0).to(tl.uint32)[:, None]
    number, head = tl.load(step + b * step_b).to(tl.uint32), h.to(tl.uint32)
    if columns is not None:
        s = s0 + tl.arange(0, KEYS)
        column = tl.load(columns + b * cb + s * cs, mask=s < S, other=0).to(tl.uint32)[None, :]
        return lane_each(column, head, position, example, number, k0, k1) >= least
    group = (s0 // 8 + tl.arange(0, KEYS // 8)).to(tl.uint32)[None, :]
    dropped = dropped_groups(group, head, position, example, number, k0, k1, least)
    eight = tl.arange(0, 8).to(tl.uint32)
    return tl.reshape((dropped[:, :, None] >> eight[None, None, :]) & 1, (ROWS, KEYS)) == 0


@triton.jit(do_not_specialize=["threshold", "k0", "k1", "window"])
def forward_kernel(
    query, qb, qh, qt, key, kb, kh, ks, value, vb, vh, vs, bias, ab, ah, at, as_,
    examples, eb, et, positions, pb, pt, columns, cb, cs, step, step_b,
    threshold, threshold_at, k0, k1, scale, softcap, window, H, G, T, S, K, W,
    result, ob, oh, ot, lse, sinks,
    DROP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BOOLEAN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDE_K: tl.constexpr,
    WIDE_W: tl.constexpr, BY_BITS: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: the result and the log of the sum of exponentials."""
    blocks = tl.cdiv(T, ROWS)
    program = tl.program_id(0)
    t0, h = program % blocks * ROWS, program // blocks % H
    b = (program // blocks // H).to(tl.int64)
    if threshold_at is not None:
        threshold = tl.load(threshold_at)
    least, k0, k1 = threshold.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
    stays = tl.div_rn(65536.0, tl.maximum(65536 - threshold.to(tl.int32), 1).to(tl.float32))
    bias_here = bias
    if bias is not None:
        bias_here = bias + b * ab + h * ah
    q = _rows(query + b * qb + h.to(tl.int64) * qh, t0, qt, T, K, ROWS, WIDE_K)
    key_here = key + b * kb + (h // G).to(tl.int64) * kh
    value_here = value + b * vb + (h // G).to(tl.int64) * vh
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDE_W), tl.float32)
    low, high = 0, S
    if CAUSAL:
        high = tl.minimum(S, t0 + ROWS)
    if WINDOW:
        low = tl.maximum(0, (t0 - window + 1) // KEYS * KEYS)
        if not CAUSAL:
            high = tl.minimum(S, t0 + ROWS - 1 + window)
    for s0 in range(low, high, KEYS):
        k = _rows(key_here, s0, ks, S, K, KEYS, WIDE_K)
        score, _slope = _scores(
            q, k, t0, s0, bias_here, at, as_, scale, softcap, window, T, S,
            CAUSAL, WINDOW, SOFTCAP, BOOLEAN, ROWS, KEYS, BY_BITS,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(score, 1))
        # Where no key is seen so far: exp(-inf) below, not NaN.
        at_zero = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(score - at_zero[:, None])
        shrink = tl.exp(top - at_zero)
        mass = mass * shrink + tl.sum(weight, 1)
        if DROP:
            keep = _kept(
                b, h, t0, s0, examples, eb, et, positions, pb, pt, columns, cb, cs, step, step_b,
                least, k0, k1, T, S, ROWS, KEYS,
            )  # fmt: skip
            weight = tl.where(keep, weight, 0.0)
        v = _rows(value_here, s0, vs, S, W, KEYS, WIDE_W)
        sums = sums * shrink[:, None] + _product(narrow(weight, v.dtype, BY_BITS), v, BY_BITS)
        top = higher
    if sinks is not None:
        sink = widen(tl.load(sinks + h), BY_BITS)
        higher = tl.maximum(top, sink)
        at_zero = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(top - at_zero)
        mass = mass * shrink + tl.exp(sink - at_zero)
        sums, top = sums * shrink[:, None], higher
    none = mass == 0.0
    share = 1.0 / tl.where(none, 1.0, mass)
    if DROP:
        share = share * stays
    _store_rows(
        result + b * ob + h.to(tl.int64) * oh, sums * tl.where(none, 0.0, share)[:, None],
        t0, ot, T, W, ROWS, WIDE_W, BY_BITS,
    )  # fmt: skip
    t = t0 + tl.arange(0, ROWS)
    log = tl.where(none, float("inf"), top + tl.log(tl.where(none, 1.0, mass)))
    tl.store(lse + (b * H + h) * T + t, log, mask=t < T)


@triton.jit(do_not_specialize=["threshold", "k0", "k1", "window"])
def query_kernel(
    query, qb, qh, qt, key, kb, kh, ks, value, vb, vh, vs, bias, ab, ah, at, as_,
    examples, eb, et, positions, pb, pt, columns, cb, cs, step, step_b,
    threshold, threshold_at, k0, k1, scale, softcap, window, H, G, T, S, K, W,
    grad, gb, gh, gt, lse, delta,
    to_query, ob, oh, ot,
    DROP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BOOLEAN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDE_K: tl.constexpr,
    WIDE_W: tl.constexpr, BY_BITS: tl.constexpr,
):  # fmt: skip
    """The gradient for one block of queries of one head."""
    blocks = tl.cdiv(T, ROWS)
    program = tl.program_id(0)
    t0, h = program % blocks * ROWS, program // blocks % H
    b = (program // blocks // H).to(tl.int64)
    if threshold_at is not None:
        threshold = tl.load(threshold_at)
    least, k0, k1 = threshold.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
    stays = tl.div_rn(65536.0, tl.maximum(65536 - threshold.to(tl.int32), 1).to(tl.float32))
    bias_here = bias
    if bias is not None:
        bias_here = bias + b * ab + h * ah
    key_here = key + b * kb + (h // G).to(tl.int64) * kh
    value_here = value + b * vb + (h // G).to(tl.int64) * vh
    q = _rows(query + b * qb + h.to(tl.int64) * qh, t0, qt, T, K, ROWS, WIDE_K)
    above = _rows(grad + b * gb + h.to(tl.int64) * gh, t0, gt, T, W, ROWS, WIDE_W)
    t = t0 + tl.arange(0, ROWS)
    row_lse = tl.load(lse + (b * H + h) * T + t, mask=t < T, other=float("inf"))
    row_delta = tl.load(delta + (b * H + h) * T + t, mask=t < T, other=0.0)
    sums = tl.zeros((ROWS, WIDE_K), tl.float32)
    low, high = 0, S
    if CAUSAL:
        high = tl.minimum(S, t0 + ROWS)
    if WINDOW:
        low = tl.maximum(0, (t0 - window + 1) // KEYS * KEYS)
        if not CAUSAL:
            high = tl.minimum(S, t0 + ROWS - 1 + window)
    for s0 in range(low, high, KEYS):
        k = _rows(key_here, s0, ks, S, K, KEYS, WIDE_K)
        v = _rows(value_here, s0, vs, S, W, KEYS, WIDE_W)
        score, slope = _scores(
            q, k, t0, s0, bias_here, at, as_, scale, softcap, window, T, S,
            CAUSAL, WINDOW, SOFTCAP, BOOLEAN, ROWS, KEYS, BY_BITS,
        )  # fmt: skip
        weight = tl.exp(score - row_lse[:, None])
        up = _product(above, tl.trans(v), BY_BITS)
        if DROP:
            keep = _kept(
                b, h, t0, s0, examples, eb, et, positions, pb, pt, columns, cb, cs, step, step_b,
                least, k0, k1, T, S, ROWS, KEYS,
            )  # fmt: skip
            up = tl.where(keep, up * stays, 0.0)
        down = weight * (up - row_delta[:, None]) * slope
        sums += _product(narrow(down, k.dtype, BY_BITS), k, BY_BITS)
    to = to_query + b * ob + h.to(tl.int64) * oh
    _store_rows(to, sums * scale, t0, ot, T, K, ROWS, WIDE_K, BY_BITS)


@triton.jit(do_not_specialize=["threshold", "k0", "k1", "window"])
def key_kernel(
    query, qb, qh, qt, key, kb, kh, ks, value, vb, vh, vs, bias, ab, ah, at, as_,
    examples, eb, et, positions, pb, pt, columns, cb, cs, step, step_b,
    threshold, threshold_at, k0, k1, scale, softcap, window, H, G, T, S, K, W,
    grad, gb, gh, gt, lse, delta,
    to_key, xb, xh, xs, to_value, yb, yh, ys,
    DROP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BOOLEAN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDE_K: tl.constexpr,
    WIDE_W: tl.constexpr, BY_BITS: tl.constexpr,
):  # fmt: skip
    """The gradients for one block of keys and their values, from all query heads that read them, in turn."""
    blocks = tl.cdiv(S, KEYS)
    program = tl.program_id(0)
    s0, n = program % blocks * KEYS, program // blocks % (H // G)
    b = (program // blocks // (H // G)).to(tl.int64)
    if threshold_at is not None:
        threshold = tl.load(threshold_at)
    least, k0, k1 = threshold.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
    stays = tl.div_rn(65536.0, tl.maximum(65536 - threshold.to(tl.int32), 1).to(tl.float32))
    k = _rows(key + b * kb + n.to(tl.int64) * kh, s0, ks, S, K, KEYS, WIDE_K)
    v = _rows(value + b * vb + n.to(tl.int64) * vh, s0, vs, S, W, KEYS, WIDE_W)
    key_sums = tl.zeros((KEYS, WIDE_K), tl.float32)
    value_sums = tl.zeros((KEYS, WIDE_W), tl.float32)
    low, high = 0, T
    if CAUSAL:
        low = s0 // ROWS * ROWS
    if WINDOW:
        high = tl.minimum(T, s0 + KEYS - 1 + window)
        if not CAUSAL:
            low = tl.maximum(0, (s0 - window + 1) // ROWS * ROWS)
    for g in range(0, G):
        h = n * G + g
        bias_here = bias
        if bias is not None:
            bias_here = bias + b * ab + h * ah
        for t0 in range(low, high, ROWS):
            q = _rows(query + b * qb + h.to(tl.int64) * qh, t0, qt, T, K, ROWS, WIDE_K)
            above = _rows(grad + b * gb + h.to(tl.int64) * gh, t0, gt, T, W, ROWS, WIDE_W)
            t = t0 + tl.arange(0, ROWS)
            row_lse = tl.load(lse + (b * H + h) * T + t, mask=t < T, other=float("inf"))
            row_delta = tl.load(delta + (b * H + h) * T + t, mask=t < T, other=0.0)
            score, slope = _scores(
                q, k, t0, s0, bias_here, at, as_, scale, softcap, window, T, S,
                CAUSAL, WINDOW, SOFTCAP, BOOLEAN, ROWS, KEYS, BY_BITS,
            )  # fmt: skip
            weight = tl.exp(score - row_lse[:, None])
            up = _product(above, tl.trans(v), BY_BITS)
            if DROP:
                keep = _kept(
                    b, h, t0, s0, examples, eb, et, positions, pb, pt, columns, cb, cs, step, step_b,
                    least, k0, k1, T, S, ROWS, KEYS,
                )  # fmt: skip
                up = tl.where(keep, up * stays, 0.0)
                passed = tl.where(keep, weight * stays, 0.0)
            else:
                passed = weight
            value_sums += _product(tl.trans(narrow(passed, above.dtype, BY_BITS)), above, BY_BITS)
            down = weight * (up - row_delta[:, None]) * slope
            key_sums += _product(tl.trans(narrow(down, q.dtype, BY_BITS)), q, BY_BITS)
    to = to_key + b * xb + n.to(tl.int64) * xh
    _store_rows(to, key_sums * scale, s0, xs, S, K, KEYS, WIDE_K, BY_BITS)
    to = to_value + b * yb + n.to(tl.int64) * yh
    _store_rows(to, value_sums, s0, ys, S, W, KEYS, WIDE_W, BY_BITS)


@triton.jit(do_not_specialize=["threshold", "k0", "k1", "window"])
def bias_kernel(
    query, qb, qh, qt, key, kb, kh, ks, value, vb, vh, vs, bias, ab, ah, at, as_,
    examples, eb, et, positions, pb, pt, columns, cb, cs, step, step_b,
    threshold, threshold_at, k0, k1, scale, softcap, window, H, G, T, S, K, W,
    grad, gb, gh, gt, lse, delta,
    to_bias, B, bias_b, bias_h,
    DROP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BOOLEAN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDE_K: tl.constexpr,
    WIDE_W: tl.constexpr, BY_BITS: tl.constexpr,
):  # fmt: skip
    """The gradient for one block of the bias, summed over the rows and heads that share it, in turn."""
    blocks, across = tl.cdiv(T, ROWS), tl.cdiv(S, KEYS)
    program = tl.program_id(0)
    t0, s0 = program % blocks * ROWS, program // blocks % across * KEYS
    one = program // blocks // across
    sums = tl.zeros((ROWS, KEYS), tl.float32)
    if threshold_at is not None:
        threshold = tl.load(threshold_at)
    least, k0, k1 = threshold.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
    stays = tl.div_rn(65536.0, tl.maximum(65536 - threshold.to(tl.int32), 1).to(tl.float32))
    for shared in range(0, B // bias_b * (H // bias_h)):
        # Where an axis of the bias is 1, all of that axis share it; else this block has one of them.
        h = one % bias_h + shared % (H // bias_h)
        b = (one // bias_h + shared // (H // bias_h)).to(tl.int64)
        bias_here = bias
        if bias is not None:
            bias_here = bias + b * ab + h * ah
        q = _rows(query + b * qb + h.to(tl.int64) * qh, t0, qt, T, K, ROWS, WIDE_K)
        above = _rows(grad + b * gb + h.to(tl.int64) * gh, t0, gt, T, W, ROWS, WIDE_W)
        t = t0 + tl.arange(0, ROWS)
        row_lse = tl.load(lse + (b * H + h) * T + t, mask=t < T, other=float("inf"))
        row_delta = tl.load(delta + (b * H + h) * T + t, mask=t < T, other=0.0)
        k = _rows(key + b * kb + (h // G).to(tl.int64) * kh, s0, ks, S, K, KEYS, WIDE_K)
        v = _rows(value + b * vb + (h // G).to(tl.int64) * vh, s0, vs, S, W, KEYS, WIDE_W)
        score, _slope = _scores(
            q, k, t0, s0, bias_here, at, as_, scale, softcap, window, T, S,
            CAUSAL, WINDOW, SOFTCAP, BOOLEAN, ROWS, KEYS, BY_BITS,
        )  # fmt: skip
        weight = tl.exp(score - row_lse[:, None])
        up = _product(above, tl.trans(v), BY_BITS)
        if DROP:
            keep = _kept(
                b, h, t0, s0, examples, eb, et, positions, pb, pt, columns, cb, cs, step, step_b,
                least, k0, k1, T, S, ROWS, KEYS,
            )  # fmt: skip
            up = tl.where(keep, up * stays, 0.0)
        sums += weight * (up - row_delta[:, None])
    row, column = (t0 + tl.arange(0, ROWS))[:, None], (s0 + tl.arange(0, KEYS))[None, :]
    to = to_bias + (one.to(tl.int64) * T + row) * S + column
    tl.store(to, sums, mask=(row < T) & (column < S))
