"""64-bit uniforms in two levels, Gumbel noise, and the logarithm and exponential that all backends share.

Every operation here is exact integer work or one of ``+ - * /`` in float64, in a stated order and without
fused multiply-add, so that ``native/noise.hpp`` repeats it bit for bit. The file knows counters and bits; it
does not know logits, settings or rows of a batch.

Letters: h the 16 leading bits of a uniform, U the whole 64-bit integer, w = (U + 1/2) / 2^64 the uniform in
(0, 1), E = -log(1 - w) the exponential variable, g = -log(E) the Gumbel noise. A small U means a large g.

References
----------
Salmon et al. 2011 (Philox). Gumbel-max: Gumbel 1954; Maddison, Tarlow and Minka 2014. The logarithm's
coefficients are those of fdlibm (Sun Microsystems 1993), whose error is below one unit in the last place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from twodice.random.philox import philox4x32

PURPOSE_TOKEN = 0
"""Purpose of the draw of a token."""
PURPOSE_XTC = 1
"""Purpose of the coin of XTC, at id 0. The numbers 2 to 2^31 - 1 are reserved."""
SECOND_LEVEL = 1 << 31
"""Added to the purpose for the 48 further bits."""

LN2_HIGH = 6.93147180369123816490e-01  # the upper 32 bits of log 2: its product with an exponent is exact
LN2_LOW = 1.90821492927058770002e-10
LOG2_E = 1.44269504088896338700e00
LOG_SERIES = (  # fdlibm's Lg1 .. Lg7
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
EXP_SERIES = tuple(1.0 / math.factorial(n) for n in range(12))
ROUND = (
    6755399441055744.0  # 1.5 * 2^52: adding and taking it away rounds to the nearest integer, ties to even
)
_MANTISSA = (1 << 52) - 1
SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # bits of sqrt(1/2)
ONE_BITS = 0x3FF0000000000000
HALVE_FROM = 0.2928932188134524  # 1 - sqrt(1/2)
EXP_FLOOR = -700.0
WEIGHT_BITS = 42
"""Fixed-point digits of a token's mass: the top token of a row weighs exactly 2^42."""


def _log_core(f: Tensor, k: Tensor) -> Tensor:
    """Return ``k log 2 + log(1 + f)`` for ``1 + f`` in [sqrt(1/2), sqrt(2))."""
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    even = w * (LOG_SERIES[1] + w * (LOG_SERIES[3] + w * LOG_SERIES[5]))
    odd = z * (LOG_SERIES[0] + w * (LOG_SERIES[2] + w * (LOG_SERIES[4] + w * LOG_SERIES[6])))
    rest = odd + even
    half = (0.5 * f) * f
    return k * LN2_HIGH - ((half - (s * (half + rest) + k * LN2_LOW)) - f)


def log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float64 numbers, the same bits on every backend.

    The relative error is below 2^-50 (tested against 60-digit arithmetic).
    """
    bits = x.view(torch.int64)
    # Taking sqrt(1/2) away in the integers moves the exponent's border from 1 to sqrt(1/2).
    shifted = bits - SQRT_HALF_BITS
    k = shifted >> 52
    m = (bits - (k << 52)).view(torch.float64)
    return _log_core(m - 1.0, k.to(torch.float64))


def _log1p_minus(w: Tensor) -> Tensor:
    """``log(1 - w)`` for w in (0, 1/2]: both branches of the reduction are exact in float64."""
    halve = w > HALVE_FROM
    f = torch.where(halve, 1.0 - 2.0 * w, -w)
    k = torch.where(halve, -1.0, 0.0).to(torch.float64)
    return _log_core(f, k)


def exp(z: Tensor) -> Tensor:
    """Exponential of float64 numbers in [-inf, 0], the same bits on every backend; 0 below -700.

    The relative error is below 2^-45 (tested against 60-digit arithmetic).
    """
    low = torch.clamp(z, min=EXP_FLOOR)
    n = (low * LOG2_E + ROUND) - ROUND
    r = (low - n * LN2_HIGH) - n * LN2_LOW
    y = torch.full_like(r, EXP_SERIES[-1])
    for c in reversed(EXP_SERIES[:-1]):
        y = y * r + c
    scale = ((n.to(torch.int64) << 52) + ONE_BITS).view(torch.float64)
    return torch.where(z < EXP_FLOOR, 0.0, y * scale)


def weights(z: Tensor) -> Tensor:
    """Fixed-point masses ``round_half_even(exp(z) * 2^42)`` as int64, for z in [-inf, 0].

    Integer sums are free of order: a set that is decided by them is the same however the sum was taken.
    """
    return torch.round(exp(z) * float(1 << WEIGHT_BITS)).to(torch.int64)


def leading16(
    ids: Tensor, position: Tensor | int, completion: Tensor | int, purpose: int, key: Any
) -> Tensor:
    """The 16 leading bits of each uniform: lane ``id % 8`` at ``(id // 8, position, completion, purpose)``.

    All tensors are int64 and broadcast; the result is int64 in [0, 65536).
    """
    words = philox4x32(ids >> 3, position, completion, purpose, key)
    lane = ids & 7
    word = torch.where(
        lane < 4,
        torch.where(lane < 2, words[0], words[1]),
        torch.where(lane < 6, words[2], words[3]),
    )
    return (word >> ((lane & 1) << 4)) & 0xFFFF


def uniform64(
    ids: Tensor, position: Tensor | int, completion: Tensor | int, purpose: int, key: Any
) -> Tensor:
    """The whole uniform U of each token, 64 bits held in int64 (two's complement).

    *Randomness*: 16 bits from `leading16`, 48 from counter ``(id, position, completion, purpose + 2^31)``:
    word 0 and the lower half of word 1.
    """
    high = leading16(ids, position, completion, purpose, key)
    words = philox4x32(ids, position, completion, purpose + SECOND_LEVEL, key)
    low: Tensor = words[0] | ((words[1] & 0xFFFF) << 32)
    return (high << 48) | low


def gumbel_from_bits(u: Tensor) -> Tensor:
    """Gumbel noise of 64-bit uniforms held in int64; float64, between about -3.8 and 45.1.

    ``w = (U + 1/2) / 2^64``; ``E = -log(1 - w)``; ``g = -log(E)``. Both ends are resolved to 2^-64: the lower
    half of U takes log1p, the upper half the logarithm of ``1 - w``, which is formed in the integers.
    """
    lower = u >= 0  # as unsigned: U < 2^63
    v = (torch.where(lower, u, ~u).to(torch.float64) + 0.5) * 2.0**-64
    e = -torch.where(lower, _log1p_minus(v), log(v))
    return -log(e)


def gumbel(ids: Tensor, position: Tensor | int, completion: Tensor | int, purpose: int, key: Any) -> Tensor:
    """Gumbel noise of tokens: a pure function of (key, purpose, completion, position, id).

    Parameters
    ----------
    ids : int64 tensor
        Token ids in [0, 2^32).
    position, completion : int or int64 tensor
        In [0, 2^32); broadcast against `ids`.
    purpose : int
        ``PURPOSE_TOKEN`` or a later entry of the list, below 2^31.
    key : int or int64 tensor
        64 bits, as ``Key.value`` (or its two's complement in a tensor).
    """
    return gumbel_from_bits(uniform64(ids, position, completion, purpose, key))


def coin(position: Tensor | int, completion: Tensor | int, purpose: int, key: Any) -> Tensor:
    """One uniform in [0, 1) for each place, a multiple of 2^-53: the 53 leading bits of the uniform of id 0.

    *Randomness*: a function of (key, purpose, completion, position) alone.
    """
    first = torch.zeros_like(torch.as_tensor(position))
    u = uniform64(first, position, completion, purpose, key)
    return ((u >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53
