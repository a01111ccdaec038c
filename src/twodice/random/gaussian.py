"""Standard normal numbers from Philox words, by one transform that all backends share.

A counter's four words are two pairs; each pair gives two normals (Box and Muller 1958), so that column j
reads normal ``j % 4`` of counter ``head << 20 | j // 4``. Radius and angle are formed in float64 from
integers by ``+ - * /``, in a stated order and without fused multiply-add, so that ``native/gaussian.cpp``
repeats them bit for bit. The square root is our own too: that of torch is not rounded correctly where a
vector library serves it. This module knows no rate and no tensor's layout.

Letters: B rows, H heads, T positions, C columns.

References
----------
Box and Muller 1958, "A note on the generation of random normal deviates". The coefficients of sine and cosine
are those of fdlibm (Sun Microsystems 1993), whose error is below one unit in the last place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twodice.random.keys import Key, key_bits
from twodice.random.noise import log
from twodice.random.philox import philox4x32

COLUMNS = 1 << 22
"""Columns below this have a normal: ``column // 4`` has the 20 bits below the head."""

_ANGLE = 3.141592653589793 * 2.0**-31  # a quarter turn over 2^30
_QUARTER = (1 << 30) - 1
_GUESS = 0x5FE6EB50C7B537A9  # taking half the bits away gives 1 / sqrt(x) within 3.5 %
_SIN = (
    -1.66666666666666324348e-01,
    8.33333333332248946124e-03,
    -1.98412698298579493134e-04,
    2.75573137070700676789e-06,
    -2.50507602534068634195e-08,
    1.58969099521155010221e-10,
)
_COS = (
    4.16666666666666019037e-02,
    -1.38888888888741095749e-03,
    2.48015872894767294178e-05,
    -2.75573143513906633035e-07,
    2.08757232129817482790e-09,
    -1.13596475577881948265e-11,
)


def _horner(z: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    y = torch.full_like(z, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y = y * z + c
    return y


def sine_cosine(phi: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of float64 angles in [-pi/4, pi/4], the same bits on every backend.

    The relative error is below 2^-51 (tested against 60-digit arithmetic).
    """
    z = phi * phi
    sine = phi + (phi * z) * _horner(z, _SIN)
    cosine = 1.0 - (0.5 * z - (z * z) * _horner(z, _COS))
    return sine, cosine


def root(x: Tensor) -> Tensor:
    """Square root of positive normal float64 numbers, the same bits on every backend.

    A guess of the reciprocal root from the bits, four steps of Newton's, and a product. The relative error is
    below 2^-50 (tested against 60-digit arithmetic).
    """
    y = (_GUESS - (x.view(torch.int64) >> 1)).view(torch.float64)
    half = 0.5 * x
    for _ in range(4):
        y = y * (1.5 - (half * y) * y)
    return x * y


def radius(word: Tensor) -> Tensor:
    """``sqrt(-2 log u)`` for ``u = (word + 1/2) / 2^32``; at most 6.77."""
    u = (word.to(torch.float64) + 0.5) * 2.0**-32
    return root(-2.0 * log(u))


def direction(word: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of an angle that is uniform on the circle.

    The two upper bits are the quadrant; the 30 lower ones place phi in (-pi/4, pi/4), in the middle of its
    cell: ``phi = (low + 1/2 - 2^29) * (pi / 2^31)``. The angle is phi plus so many quarter turns.
    """
    phi = (((word & _QUARTER) - (1 << 29)).to(torch.float64) + 0.5) * _ANGLE
    sine, cosine = sine_cosine(phi)
    quadrant = word >> 30
    turned = (quadrant & 1) == 1
    x, y = torch.where(turned, sine, cosine), torch.where(turned, cosine, sine)
    x = torch.where((quadrant == 1) | (quadrant == 2), -x, x)
    return x, torch.where(quadrant >= 2, -y, y)


def _quadruple(words: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second = radius(words[0]), radius(words[2])
    a, b = direction(words[1])
    c, d = direction(words[3])
    return first * a, first * b, second * c, second * d


def normals(
    key: Key | int,
    step: int | Tensor,
    example: Tensor,
    position: Tensor,
    head: Tensor,
    column: Tensor,
) -> Tensor:
    """Return the normal of every element, coordinate by coordinate.

    Parameters
    ----------
    key : Key or int
        The key of the stream: for noise, ``child("gaussian")`` of the site's key.
    step : int or int64 tensor
        In [0, 2^32); broadcast with the coordinates.
    example, position, head, column : int64 tensor
        Broadcastable; within the bounds of `twodice.random.draws`, columns below 2^22; the caller has
        checked.

    Returns
    -------
    float64 tensor
        Of the broadcast shape.

    Notes
    -----
    *Randomness.* This is the definition: normal ``column % 4`` at counter ``(head << 20 | column // 4,
    position, example, step)``. `normal_grid` gives the same for consecutive columns with a quarter of the
    work.
    """
    z = _quadruple(philox4x32((head << 20) | (column >> 2), position, example, step, key_bits(key)))
    which = column & 3
    return torch.where(which < 2, torch.where(which == 0, z[0], z[1]), torch.where(which == 2, z[2], z[3]))


def normal_grid(
    key: Key | int,
    step: int | Tensor,
    example: Tensor,
    position: Tensor,
    head: Tensor,
    columns: int,
) -> Tensor:
    """Return the normals of columns 0 .. `columns` - 1: the coordinates' broadcast shape and one more
    dimension, last.

    Parameters and randomness as in `normals`; a step in a tensor has the dimensions of the result.
    """
    counter = torch.arange(-(-columns // 4), device=example.device)
    words = philox4x32(
        (head[..., None] << 20) | counter, position[..., None], example[..., None], step, key_bits(key)
    )
    z = torch.stack(torch.broadcast_tensors(*_quadruple(words)), dim=-1)
    return z.flatten(-2)[..., :columns]
