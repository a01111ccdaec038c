"""Philox4x32-10 in plain integer operations: the readable twin of ``native/philox.hpp``.

The functions use only ``* >> & ^ +``, so that the same text runs on Python integers, numpy ``uint64`` arrays
and torch ``int64`` tensors, each broadcast elementwise. This module loads neither numpy nor torch and knows
nothing of what the words are used for.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import Any

MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85
ROUNDS = 10
MASK_32 = 0xFFFFFFFF


def key_words(key: int) -> tuple[int, int]:
    """Return the two words of a 64-bit key: (low 32 bits, high 32 bits)."""
    return key & MASK_32, (key >> 32) & MASK_32


def philox4x32(c0: Any, c1: Any, c2: Any, c3: Any, key: int) -> tuple[Any, Any, Any, Any]:
    """Return the four output words of Philox4x32-10.

    Parameters
    ----------
    c0, c1, c2, c3 : int, numpy uint64 array or torch int64 tensor
        Counter words, each in [0, 2^32), of one kind and broadcastable. Numpy scalars are not welcome (they
        warn when a product wraps): use arrays of at least one dimension.
    key : int
        64 bits; the low half is the first word.

    Returns
    -------
    tuple
        Four words in [0, 2^32), of the kind of the input.

    Notes
    -----
    A product of two 32-bit words wraps in a signed 64-bit tensor; its bits are right all the same, and the
    mask after the arithmetic shift takes away the sign.
    """
    k0, k1 = key_words(key)
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK_32) ^ c1 ^ k0,
            p1 & MASK_32,
            ((p0 >> 32) & MASK_32) ^ c3 ^ k1,
            p0 & MASK_32,
        )
        k0, k1 = (k0 + WEYL_0) & MASK_32, (k1 + WEYL_1) & MASK_32
    return c0, c1, c2, c3
