"""A keyed bijection on [0, n) with random access: the order of the data, without a list of it.

Up to 2^16 elements it is the order of as many keyed 64-bit words, which makes every ordering equally likely
(a small Feistel network only reaches the even ones). Beyond, it is a Feistel network over Z_a x Z_b with a *
b just above n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"), whose round function is
Philox, walked along its cycle until it lands below n. This module knows neither what is ordered nor torch (a
torch tensor is served where one is given).
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import Any

import numpy as np

from twodice.errors import ConfigError
from twodice.random.keys import Key
from twodice.random.philox import philox4x32

ROUNDS = 8
SMALL = 2**16  # up to here the order is a sorted table, kept for the last few keys
_TABLE = 0xFFFFFFFF  # counter word 1 of the table's words; the network has its round number there


@lru_cache(maxsize=16)
def _table(key: int, n: int) -> np.ndarray:
    index = np.arange(n, dtype=np.uint64)
    zero = index & 0
    w0, w1, _, _ = philox4x32(index, zero + _TABLE, zero, zero, key)
    order = np.argsort(w0 | (w1 << 32), kind="stable")
    order.flags.writeable = False
    return order


def _sides(n: int) -> tuple[int, int]:
    a = isqrt(n - 1) + 1
    return a, -(-n // a)


def _once(key: int, x: Any, a: int, b: int) -> Any:
    """One pass of the network over Python integers or uint64 arrays with values in [0, a * b)."""
    left, right = x // b, x % b
    zero = x & 0
    for number in range(ROUNDS):
        side, other = (a, right) if number % 2 == 0 else (b, left)
        # c1 holds the number of the round: no two rounds share a counter. 64 bits leave a bias below 2^-32.
        w0, w1, _, _ = philox4x32(other, zero + number, zero, zero, key)
        noise = (w0 | (w1 << 32)) % side
        if number % 2 == 0:
            left = (left + noise) % a
        else:
            right = (right + noise) % b
    return left * b + right


def permute(key: Key, index: Any, n: int) -> Any:
    """Return where a keyed bijection on [0, n) sends `index`.

    Parameters
    ----------
    key : Key
        Names the bijection. Another key gives an unrelated one.
    index : int, integer numpy array or integer torch tensor
        Values in [0, n).
    n : int
        Size of the set, in [1, 2^62].

    Returns
    -------
    int, numpy int64 array or torch int64 tensor
        Of the kind and shape of `index`, values in [0, n); different indices give different values.

    Raises
    ------
    ConfigError
        If `n` or an index is outside its range.

    Notes
    -----
    *Randomness.* A pure function of (key, n, index). Above 2^16 one element costs the same wherever it
    stands; up to 2^16 the first one pays for a table of the whole order.
    """
    if not 1 <= n <= 2**62:
        raise ConfigError(f"the size of a permutation must be in [1, 2^62]; got {n}")
    if isinstance(index, int | np.integer):
        index = int(index)
        if not 0 <= index < n:
            raise ConfigError(f"an index must be in [0, {n}); got {index}")
        if n <= SMALL:
            return int(_table(key.value, n)[index])
        a, b = _sides(n)
        x: int = _once(key.value, index, a, b)
        while x >= n:
            x = _once(key.value, x, a, b)
        return x
    if not isinstance(index, np.ndarray):
        import torch

        return torch.from_numpy(permute(key, index.cpu().numpy(), n)).to(index.device)
    if index.dtype.kind not in "iu":
        raise ConfigError(f"indices must be integers; got an array of {index.dtype}")
    if index.size == 0:
        return index.astype(np.int64)
    if int(index.min()) < 0 or int(index.max()) >= n:
        raise ConfigError(f"indices must be in [0, {n}); got {int(index.min())} to {int(index.max())}")
    if n <= SMALL:
        found: np.ndarray = _table(key.value, n)[index]
        return found
    a, b = _sides(n)
    flat: np.ndarray = _once(key.value, index.reshape(-1).astype(np.uint64), a, b)
    while (outside := np.flatnonzero(flat >= n)).size:
        flat[outside] = _once(key.value, flat[outside], a, b)
    sent: np.ndarray = flat.astype(np.int64).reshape(index.shape)
    return sent
