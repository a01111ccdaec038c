"""Dropout as functions, for one's own models. Knows no plan and no model: a rate becomes a threshold, a text
a noise, no more.

Letters: B rows, H heads, T positions, C columns, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twodice.errors import ShapeError
from twodice.kernels import dropout as kernel
from twodice.kernels.noise import UNIT, Noise, noisy
from twodice.random.draws import threshold, threshold_of_tensor
from twodice.random.keys import Key

__all__ = ["dropout", "dropout_add"]


def _threshold(p: float | torch.Tensor) -> int | torch.Tensor:
    """The threshold of a rate. One in a tensor is read, and so checked, only where that stops no device."""
    if not isinstance(p, torch.Tensor):
        return threshold(p)
    readable = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
    if p.device.type == "cpu" and readable and p.numel() == 1:
        return threshold(float(p), constant=False)
    return threshold_of_tensor(p)


def _integers(name: str, given: torch.Tensor | Sequence[int] | None) -> torch.Tensor | None:
    """A coordinate as a tensor; lists and arrays of integers are taken too."""
    if given is None or isinstance(given, torch.Tensor):
        return given
    try:
        tensor = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise ShapeError(f"{name} must be integers in a tensor, an array or a list; got {given!r}") from None
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise ShapeError(f"{name} must be integers; got {tensor.dtype}")
    return tensor.to(torch.int64)


def _step(step: int | torch.Tensor | Sequence[int]) -> int | torch.Tensor:
    """A step as it came, or, where it is one for each row, as a tensor."""
    return _integers("step", step) if hasattr(step, "__len__") else step  # type: ignore


def dropout(
    x: torch.Tensor,
    p: float | torch.Tensor,
    *,
    key: Key | int | torch.Tensor,
    step: int | torch.Tensor | Sequence[int],
    examples: torch.Tensor | Sequence[int] | None = None,
    positions: torch.Tensor | Sequence[int] | None = None,
    key_positions: torch.Tensor | Sequence[int] | None = None,
    layout: str = "btc",
    noise: str | Noise = "unit",
) -> torch.Tensor:
    """Drop units of `x` at rate `p` and scale the others, so that the mean stays; or other noise of mean 1.

    Parameters
    ----------
    x : tensor
        float32, float64, bfloat16 or float16, with the axes that `layout` names.
    p : float or 0-dim tensor
        Probability of *dropping*, in [0, 1]; 0 is neutral. It is rounded to 16 bits and the scale follows
        what it was rounded to. A float is a constant: in (0, 2^-17) or (1 - 2^-17, 1) it is an error. A
        tensor is a value on a schedule: it rounds, is not checked, and never makes ``torch.compile`` compile
        again.
    key : Key, int or 0-dim int64 tensor
        Names this place in the model: two places with one key drop the same units. An integer means
        ``Key(integer)``; in a tensor another one never makes ``torch.compile`` compile again.
    step : int, or int64 tensor () or (B,)
        The training step, in [0, 2^32). One number a row makes each row another draw: K Monte Carlo draws of
        a batch are ``x`` repeated K times with ``step=arange(K).repeat_interleave(B)`` and
        ``examples=arange(B).repeat(K)``, whose masks do not depend on how many draws run together.
    examples : int64 tensor (B,) or (B, T), optional
        Slot of each row in the *global* batch of the step, in [0, 2^32); default 0 .. B-1, which is right for
        one micro-batch on one rank. Otherwise ``(micro * world + rank) * B + arange(B)``, or all of them get
        equal masks.
    positions : int64 tensor (B, T) or (1, T), optional
        Position of each token, in [0, 2^32); default 0 .. T-1. Zeros lock the mask over positions.
    key_positions : int64 tensor (B, S) or (1, S), optional
        Only for ``bhts``: position of each key, in [0, 2^23); default 0 .. S-1. With (B, 1) or (1, 1) that of
        the first, from which the others count on.
    layout : {"btc", "tbc", "bc", "nc", "bhts", "bct", "bchw"}
        What the axes of `x` mean: b example, t position, c feature, n example and position flattened, h head,
        s key. Of an image, ``bchw``, c is the channel and the position h * W + w.
    noise : str or Noise
        ``unit`` (neutral): one decision for every unit. ``feature``: one for all positions (variational
        dropout; for ``bct`` and ``bchw`` whole channels). ``block(N)``: one for N neighbouring columns.
        ``gaussian``: units are multiplied by ``1 + s n``, n standard normal and ``s^2 = p / (1 - p)``, which
        has the mean and the variance of dropout at p. Joined with ``+``: ``feature+gaussian``.

    Returns
    -------
    tensor
        A new tensor of the shape and dtype of `x`, never `x` itself. What is dropped is +0 also where `x` is
        infinite or NaN.

    Raises
    ------
    ConfigError
        If the rate, the layout, the noise or a coordinate is outside its range; Gaussian noise at p = 1.
    ShapeError
        If shapes or types do not fit.

    Notes
    -----
    *Randomness.* Whether a unit is dropped is a pure function of (key, step, example, position, head,
    column), the same on every backend; what is dropped at p is a subset of what is dropped at a higher p. The
    backward pass computes the noise again and stores none. ``docs/contracts/noise.md`` says it bit by bit.

    Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting", section 10
    (the inverted form: scaling while training; and the Gaussian form, r ~ N(1, p / (1 - p)) with their p
    turned round; Kingma, Salimans and Welling 2015, "Variational dropout and the local reparameterization
    trick", section 3.1, name it type A). Unlike `torch.nn.functional.dropout` there is no hidden generator,
    and the scale is exact for the rate in force.

    ``feature``: Gal and Ghahramani 2016, "A theoretically grounded application of dropout in recurrent neural
    networks", equation 7: one mask a sequence. Theirs also locks the recurrent state, which is inside a
    cell and so not here. Of channels: Tompson et al. 2015, "Efficient object localization using
    convolutional networks" (SpatialDropout).

    Weights (DropConnect: Wan et al. 2013, "Regularization of neural networks using DropConnect") are a matrix
    (output units, input units) in layout ``bc``: ``dropout(weight, p, key=key, step=step, layout="bc")``.
    There they draw once for each example and at inference sample a Gaussian; here one draw serves the step
    and inference takes the mean.

    Examples
    --------
    >>> import torch, twodice
    >>> twodice.dropout(torch.ones(1, 1, 8), 0.5, key=7, step=17)
    tensor([[[2., 2., 0., 0., 0., 2., 0., 2.]]])
    >>> twodice.dropout(torch.ones(1, 2, 4), 0.5, key=7, step=17, noise="feature+block(2)")
    tensor([[[2., 2., 2., 2.],
             [2., 2., 2., 2.]]])
    """
    return noisy(
        x,
        _threshold(p),
        key,
        _step(step),
        noise=Noise.parse(noise),
        examples=_integers("examples", examples),
        positions=_integers("positions", positions),
        key_positions=_integers("key_positions", key_positions),
        layout=layout,
    )


def dropout_add(
    x: torch.Tensor,
    residual: torch.Tensor,
    p: float | torch.Tensor,
    *,
    key: Key | int | torch.Tensor,
    step: int | torch.Tensor | Sequence[int],
    examples: torch.Tensor | Sequence[int] | None = None,
    positions: torch.Tensor | Sequence[int] | None = None,
    layout: str = "btc",
    noise: str | Noise = "unit",
) -> torch.Tensor:
    """Return ``residual + dropout(x, p, ...)``, bit for bit; with noise ``unit`` in one pass over memory.

    Parameters
    ----------
    x, residual : tensor
        Of one shape and dtype.
    p, key, step, examples, positions, layout, noise
        As in `dropout`.

    Returns
    -------
    tensor
        A new tensor of the shape and dtype of `x`.

    Raises
    ------
    ConfigError, ShapeError
        As in `dropout`; and if the residual does not have the shape, dtype and device of `x`.

    Notes
    -----
    *Randomness.* As in `dropout`: the same key gives the same mask in both functions.
    """
    form, at = Noise.parse(noise), _step(step)
    examples, positions = _integers("examples", examples), _integers("positions", positions)
    if form != UNIT or (isinstance(at, torch.Tensor) and at.dim() > 0):
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ShapeError(
                f"residual must have the shape and dtype of x ({tuple(x.shape)}, {x.dtype}); got "
                f"{tuple(residual.shape)}, {residual.dtype}"
            )
        return residual + noisy(
            x, _threshold(p), key, at, noise=form, examples=examples, positions=positions, layout=layout
        )
    return kernel.dropout(
        x,
        _threshold(p),
        key,
        at,
        examples=examples,
        positions=positions,
        layout=layout,
        residual=residual,
    )
