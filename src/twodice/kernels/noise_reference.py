"""The readable twin of noise: decisions and multipliers in torch operations, on any device.

Bernoulli: a unit is kept where its lane is at least t. Gaussian: ``y = dtype(float32(x) * float32(1 + s n))``
with ``s = sqrt(t / (65536 - t))`` and n the unit's normal, ``1 + s n`` in float64 (float64 stays float64
throughout). Locked noise has position 0, a block of N columns the column ``column // N``. This module knows
no gradient.

Letters: B rows, H heads, T positions, C columns.
"""

from __future__ import annotations

import math

import torch

from twodice.kernels.dropout_layout import Coordinates, from_canonical
from twodice.kernels.noise_form import Noise
from twodice.random.draws import ONE, lane_grid, lanes
from twodice.random.gaussian import normal_grid, normals


def deviation(threshold: int | torch.Tensor) -> float | torch.Tensor:
    """Return ``s = sqrt(t / (65536 - t))`` in float64: the standard deviation of the Gaussian multiplier."""
    if isinstance(threshold, torch.Tensor):
        t = threshold.to(torch.float64)
        return torch.sqrt(t / (ONE - t))
    return math.sqrt(threshold / (ONE - threshold))


def _drawn(
    key: int, step: int | torch.Tensor, where: Coordinates, noise: Noise, *, normal: bool
) -> torch.Tensor:
    """The lane or the normal of every unit, broadcastable to (B, H, T, C)."""
    head = torch.arange(where.shape[1], device=where.example.device)[None, :, None]
    example, position = where.example.to(torch.int64), where.position.to(torch.int64)
    if noise.locked:
        position = torch.zeros_like(position[..., :1])
    if isinstance(step, torch.Tensor) and step.dim() == 1:
        step = step.to(device=example.device, dtype=torch.int64)[:, None, None, None]
    if where.column is not None:
        column = where.column.to(torch.int64) // noise.block
        one_by_one = normals if normal else lanes
        return one_by_one(key, step, example[..., None], position[..., None], head[..., None], column)
    blocks = -(-where.shape[3] // noise.block)
    drawn = (normal_grid if normal else lane_grid)(key, step, example, position, head, blocks)
    if noise.block > 1:
        drawn = drawn.repeat_interleave(noise.block, dim=-1)[..., : where.shape[3]]
    return drawn


def kept_reference(
    threshold: int | torch.Tensor,
    key: int,
    step: int | torch.Tensor,
    where: Coordinates,
    layout: str,
    noise: Noise,
    shape: torch.Size,
) -> torch.Tensor:
    """Return the mask in the layout's own shape: True where a unit stays."""
    mask = (_drawn(key, step, where, noise, normal=False) >= threshold).expand(where.shape)
    return from_canonical(mask, layout, shape)


def noise_reference(
    x: torch.Tensor,
    threshold: int | torch.Tensor,
    key: int,
    step: int | torch.Tensor,
    where: Coordinates,
    layout: str,
    noise: Noise,
) -> torch.Tensor:
    """Return `x` under the noise; a new tensor. `key` is that of the stream: for Gaussian noise the child."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if noise.form == "gaussian":
        n = _drawn(key, step, where, noise, normal=True)
        m = (1.0 + deviation(threshold) * n).to(wide).expand(where.shape)
        return (x.to(wide) * from_canonical(m, layout, x.shape)).to(x.dtype)
    mask = kept_reference(threshold, key, step, where, layout, noise, x.shape)
    t = torch.as_tensor(threshold, dtype=torch.float64, device=x.device)
    scale = (ONE / (ONE - t)).to(wide)  # p = 1 divides by zero and keeps nothing
    return torch.where(mask, x.to(wide) * scale, torch.zeros((), dtype=wide, device=x.device)).to(x.dtype)
