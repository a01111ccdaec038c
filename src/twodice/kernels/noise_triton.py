"""Logarithm, exponential, masses and Gumbel noise of ``random/noise.py`` in Triton, bit for bit.

The same float64 operations in the same order. They are bit-equal only in kernels that are launched with
``enable_fp_fusion=False``: without it the compiler makes one fused operation, which rounds once, of a product
and a sum. This module imports triton, so that it is itself imported only for a tensor on a GPU (or by
Triton's interpreter). It knows no logits and no tensor in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twodice.kernels.philox_triton import philox
from twodice.random import noise

_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (tl.constexpr(c) for c in noise.LOG_SERIES)
_E0, _E1, _E2, _E3, _E4, _E5, _E6, _E7, _E8, _E9, _E10, _E11 = (tl.constexpr(c) for c in noise.EXP_SERIES)
_LN2_HIGH = tl.constexpr(noise.LN2_HIGH)
_LN2_LOW = tl.constexpr(noise.LN2_LOW)
_LOG2_E = tl.constexpr(noise.LOG2_E)
_ROUND = tl.constexpr(noise.ROUND)
_SQRT_HALF_BITS = tl.constexpr(noise.SQRT_HALF_BITS)
_ONE_BITS = tl.constexpr(noise.ONE_BITS)
_HALVE_FROM = tl.constexpr(noise.HALVE_FROM)
_EXP_FLOOR = tl.constexpr(noise.EXP_FLOOR)
_UNIT = tl.constexpr(float(1 << noise.WEIGHT_BITS))
_SECOND_LEVEL = tl.constexpr(noise.SECOND_LEVEL)


@triton.jit
def _log_core(f, k):
    """Return ``k log 2 + log(1 + f)`` for ``1 + f`` in [sqrt(1/2), sqrt(2)); float64."""
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    even = w * (_L1 + w * (_L3 + w * _L5))
    odd = z * (_L0 + w * (_L2 + w * (_L4 + w * _L6)))
    rest = odd + even
    half = (0.5 * f) * f
    return k * _LN2_HIGH - ((half - (s * (half + rest) + k * _LN2_LOW)) - f)


@triton.jit
def log(x):
    """Return the logarithm of positive normal float64 numbers."""
    bits = x.to(tl.int64, bitcast=True)
    k = (bits - _SQRT_HALF_BITS) >> 52
    m = (bits - (k << 52)).to(tl.float64, bitcast=True)
    return _log_core(m - 1.0, k.to(tl.float64))


@triton.jit
def _log1p_minus(w):
    """Return ``log(1 - w)`` for float64 w in (0, 1/2]."""
    halve = w > _HALVE_FROM
    f = tl.where(halve, 1.0 - 2.0 * w, -w)
    k = tl.where(halve, -1.0, 0.0).to(tl.float64)
    return _log_core(f, k)


@triton.jit
def exp(z):
    """Return the exponential of float64 numbers in [-inf, 0]; 0 below -700."""
    low = tl.maximum(z, _EXP_FLOOR)
    n = (low * _LOG2_E + _ROUND) - _ROUND
    r = (low - n * _LN2_HIGH) - n * _LN2_LOW
    y = r * _E11 + _E10
    y = y * r + _E9
    y = y * r + _E8
    y = y * r + _E7
    y = y * r + _E6
    y = y * r + _E5
    y = y * r + _E4
    y = y * r + _E3
    y = y * r + _E2
    y = y * r + _E1
    y = y * r + _E0
    scale = ((n.to(tl.int64) << 52) + _ONE_BITS).to(tl.float64, bitcast=True)
    return tl.where(z < _EXP_FLOOR, 0.0, y * scale)


@triton.jit
def weights(z):
    """Return the masses ``round_half_even(exp(z) 2^42)`` as int64, for float64 z in [-inf, 0]."""
    mass = exp(z) * _UNIT
    return ((mass + _ROUND) - _ROUND).to(tl.int64)  # below 2^51 the sum with 1.5 * 2^52 rounds to integers


@triton.jit
def lane(which, w0, w1, w2, w3):
    """Return lane `which` in 0 .. 7 of four words; uint32."""
    word = tl.where(which < 4, tl.where(which < 2, w0, w1), tl.where(which < 6, w2, w3))
    return (word >> ((which & 1) << 4)) & 0xFFFF


@triton.jit
def gumbel(ids, position, completion, PURPOSE: tl.constexpr, k0, k1):
    """Return the float64 Gumbel noise of tokens; all arguments are uint32 and broadcastable."""
    w0, w1, w2, w3 = philox(ids >> 3, position, completion, PURPOSE, k0, k1)
    high = lane(ids & 7, w0, w1, w2, w3)
    w0, w1, w2, w3 = philox(ids, position, completion, PURPOSE + _SECOND_LEVEL, k0, k1)
    u = (high.to(tl.int64) << 48) | ((w1 & 0xFFFF).to(tl.int64) << 32) | w0.to(tl.int64)
    lower = u >= 0  # as unsigned: below 2^63
    v = (tl.where(lower, u, ~u).to(tl.float64) + 0.5) * (2.0**-64)
    e = -tl.where(lower, _log1p_minus(v), log(v))
    return -log(e)
