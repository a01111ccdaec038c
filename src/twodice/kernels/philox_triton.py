"""Philox4x32-10 and the lanes of dropout in Triton, for the kernels of this folder.

The twin of ``random/philox.py``: the same words, bit by bit, from unsigned 32-bit products and their high
halves. This module imports triton, so that it is itself imported only for a tensor on a GPU (or by Triton's
interpreter). It knows no tensor in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twodice.random.philox import key_words

# Whether Triton's interpreter runs the kernels, on tensors of the host.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_WRAP = 1 << 32
_SIGN = 1 << 31


def signed_words(key: int) -> tuple[int, int]:
    """Return the two words of a 64-bit key as signed 32-bit integers, so that every key has one type."""
    low, high = key_words(key)
    return signed_word(low), signed_word(high)


def signed_word(word: int) -> int:
    """Return an integer in [0, 2^32) as the signed integer of the same 32 bits."""
    return word - _WRAP if word >= _SIGN else word


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Return the four output words; counter and key words are uint32, broadcastable, the key scalar."""
    for _ in tl.static_range(10):
        high_0, high_1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        low_0 = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        low_1 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def below(word, least):
    """Return two bits: whether the low and the high half of a word are below the threshold."""
    return ((word & 0xFFFF) < least).to(tl.uint32) | ((word >> 16) < least).to(tl.uint32) << 1


@triton.jit
def dropped_groups(group, head, position, example, step, k0, k1, least):
    """Return words whose bit j says that column 8 * group + j is dropped: one Philox call for 8 decisions.

    All arguments are uint32 and broadcastable. Packed, since a word moves between threads at an
    eighth of the cost.
    """
    w0, w1, w2, w3 = philox((head << 20) | group, position, example, step, k0, k1)
    return below(w0, least) | below(w1, least) << 2 | below(w2, least) << 4 | below(w3, least) << 6


@triton.jit
def lane_each(column, head, position, example, step, k0, k1):
    """Return the lane of each of any columns: one Philox call for each. All arguments are uint32."""
    w0, w1, w2, w3 = philox((head << 20) | (column >> 3), position, example, step, k0, k1)
    word = (column >> 1) & 3
    chosen = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return (chosen >> ((column & 1) << 4)) & 0xFFFF


@triton.jit
def widen(value, BY_BITS: tl.constexpr):
    """Return float16, bfloat16 or float32 as float32."""
    if BY_BITS and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def narrow(value, dtype: tl.constexpr, BY_BITS: tl.constexpr):
    """Return float32 as `dtype`, rounded to nearest, ties to even.

    `BY_BITS` is for Triton's interpreter, whose bfloat16 is cut off where the device rounds.
    """
    if BY_BITS and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = tl.add(bits, 0x7FFF + ((bits >> 16) & 1), sanitize_overflow=False) >> 16
        rounded = tl.where(value != value, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)
