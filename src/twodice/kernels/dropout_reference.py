"""The readable twin of the dropout kernel, in torch operations, on any device.

``y = dtype(float32(x) * float32(65536 / (65536 - t)))`` where the lane is at least t, +0 by selection
elsewhere (so that infinity and NaN are dropped too); float64 stays float64. This module knows no gradient.

Letters: B rows, H heads, T positions, C columns.
"""

from __future__ import annotations

import torch

from twodice.kernels.dropout_layout import Coordinates, from_canonical
from twodice.random.draws import ONE, lane_grid, lanes


def kept(
    threshold: int | torch.Tensor, key: int, step: int | torch.Tensor, coordinates: Coordinates
) -> torch.Tensor:
    """Return the mask (B, H, T, C): True where a unit stays."""
    B, H, T, C = coordinates.shape
    head = torch.arange(H, device=coordinates.example.device)[None, :, None]
    example, position = coordinates.example.to(torch.int64), coordinates.position.to(torch.int64)
    if coordinates.column is None:
        lane = lane_grid(key, step, example, position, head, C)
    else:
        column = coordinates.column.to(torch.int64)
        lane = lanes(key, step, example[..., None], position[..., None], head[..., None], column)
    return (lane >= threshold).expand(B, H, T, C)


def dropout_reference(
    x: torch.Tensor,
    threshold: int | torch.Tensor,
    key: int,
    step: int | torch.Tensor,
    coordinates: Coordinates,
    layout: str,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `x` with units dropped and scaled, plus `residual` where there is one; a new tensor."""
    mask = from_canonical(kept(threshold, key, step, coordinates), layout, x.shape)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    t = torch.as_tensor(threshold, dtype=torch.float64, device=x.device)
    scale = (ONE / (ONE - t)).to(wide)  # p = 1 divides by zero and keeps nothing
    y = torch.where(mask, x.to(wide) * scale, torch.zeros((), dtype=wide, device=x.device)).to(x.dtype)
    return y if residual is None else residual + y
