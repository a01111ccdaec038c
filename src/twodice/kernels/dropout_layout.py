"""What the axes of a tensor mean to dropout, and the coordinates that follow.

Every layout is brought to one form, (B, H, T, C): each (row, head, position) has one example, position and
head, and the columns run along C. This module knows neither Philox nor gradients.

Letters: B rows, H heads, T positions, C columns, S keys, N rows of a flattened batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from twodice.errors import ConfigError, ShapeError, nearest
from twodice.random.draws import BOUNDS, check_bound

_DIMENSIONS = {"btc": 3, "tbc": 3, "bc": 2, "nc": 2, "bhts": 4, "bct": 3, "bchw": 4}
LAYOUTS = tuple(_DIMENSIONS)


@dataclass(frozen=True, slots=True)
class Coordinates:
    """The coordinates of a tensor in canonical form, each broadcastable to (B, H, T).

    ``column`` is (B or 1, 1, 1, S) where the keys have positions of their own, else None (columns 0 .. C-1).
    """

    shape: tuple[int, int, int, int]
    example: torch.Tensor
    position: torch.Tensor
    column: torch.Tensor | None

    def given(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, values) of what must be within bounds."""
        yield "example", self.example
        yield "position", self.position
        if self.column is not None:
            yield "column", self.column


def sizes(x: torch.Tensor, layout: str) -> tuple[int, int, int, int]:
    """Return (B, H, T, C) of a tensor with that layout, or raise the error that names both."""
    if layout not in _DIMENSIONS:
        raise ConfigError(
            f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}{nearest(layout, LAYOUTS)}"
        )
    shape = tuple(x.shape)
    if len(shape) != _DIMENSIONS[layout]:
        raise ShapeError(
            f"layout {layout!r} needs {_DIMENSIONS[layout]} dimensions; got shape {shape}; "
            "name another layout"
        )
    if layout == "btc":
        found = shape[0], 1, shape[1], shape[2]
    elif layout == "bhts":
        found = shape[0], shape[1], shape[2], shape[3]
    elif layout == "tbc":
        found = shape[1], 1, shape[0], shape[2]
    elif layout == "bct":
        found = shape[0], 1, shape[2], shape[1]
    elif layout == "bchw":
        found = shape[0], 1, shape[2] * shape[3], shape[1]
    else:
        found = shape[0], 1, 1, shape[1]
    if found[1] > BOUNDS["head"]:
        check_bound("head", found[1] - 1)
    if found[3] > BOUNDS["column"]:
        check_bound("column", found[3] - 1)
    return found


def strides(x: torch.Tensor, layout: str) -> tuple[int, int, int, int] | None:
    """Return the strides of (B, H, T, C), or None where h and w of ``bchw`` do not share one."""
    d = x.stride()
    if layout == "btc":
        return d[0], 0, d[1], d[2]
    if layout == "bhts":
        return d[0], d[1], d[2], d[3]
    if layout == "tbc":
        return d[1], 0, d[0], d[2]
    if layout == "bct":
        return d[0], 0, d[2], d[1]
    if layout == "bchw":
        return (d[0], 0, d[3], d[1]) if x.shape[2] == 1 or d[2] == x.shape[3] * d[3] else None
    return d[0], 0, 0, d[1]


def from_canonical(full: torch.Tensor, layout: str, shape: torch.Size) -> torch.Tensor:
    """Return a (B, H, T, C) tensor in the layout's own shape."""
    if layout == "bhts":
        return full
    if layout in ("bc", "nc"):
        return full[:, 0, 0]
    if layout == "tbc":
        return full[:, 0].transpose(0, 1)
    if layout in ("bct", "bchw"):
        return full[:, 0].transpose(1, 2).reshape(shape)
    return full[:, 0]


def spread(
    name: str, values: torch.Tensor, x: torch.Tensor, layout: str, rows: int, columns: int
) -> torch.Tensor:
    """Return one coordinate as (B, T), (B, 1) or (1, T), or raise the error that names the shape."""
    if values.dtype not in (torch.int64, torch.int32):
        raise ShapeError(f"{name} must be int64; got {values.dtype}")
    shape = tuple(values.shape)
    if layout == "nc":
        if values.numel() != rows:
            raise ShapeError(
                f"layout 'nc' has {rows} rows, so {name} must have as many values "
                f"(row by row, (B, T) or (N,)); got {shape}"
            )
        return values.reshape(rows, 1)
    if shape == (rows,) and name == "examples":
        return values[:, None]
    if (
        len(shape) == 2
        and (shape[1] == columns or (name == "key_positions" and follow(values)))
        and (shape[0] == rows or (shape[0] == 1 and name != "examples"))
    ):
        return values
    wanted = (
        "(B,) or (B, T)"
        if name == "examples"
        else "(B, T) or (1, T)"
        if name == "positions"
        else "(B, 1) or (B, S)"
    )
    raise ShapeError(
        f"{name} must be {wanted} with B = {rows} and {wanted[-2]} = {columns} for x of shape "
        f"{tuple(x.shape)} in layout {layout!r}; got {shape}"
    )


def follow(key_positions: torch.Tensor | None) -> bool:
    """Whether the first column of each row is given, (B, 1), from which the others count on."""
    return key_positions is not None and key_positions.dim() == 2 and key_positions.shape[1] == 1


def coordinates(
    x: torch.Tensor,
    layout: str,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
) -> Coordinates:
    """Return the coordinates of `x`, with the defaults of the contract where none are given."""
    B, H, T, C = sizes(x, layout)
    if layout == "nc":
        if positions is None or examples is None:
            raise ShapeError(
                "layout 'nc' needs examples and positions, as a flattened batch does not say where its "
                "rows stood; give (B, T) or (N,) of each, or use layout 'bc' for rows that are examples"
            )
        if examples.numel() != B and positions.dim() == 2 and tuple(examples.shape) == (positions.shape[0],):
            examples = examples[:, None].expand(positions.shape)
    if key_positions is not None and layout != "bhts":
        raise ShapeError(f"key_positions belong to layout 'bhts' only; got layout {layout!r}")
    device = x.device
    if examples is None:
        example = torch.arange(B, device=device)[:, None]
    else:
        example = spread("examples", examples, x, layout, B, T).to(device)
    if positions is None:
        position = torch.arange(T, device=device)[None]
    else:
        position = spread("positions", positions, x, layout, B, T).to(device)
    column = None
    if key_positions is not None:
        column = spread("key_positions", key_positions, x, layout, B, C).to(device)[:, None, None, :]
        if follow(key_positions):
            column = column + torch.arange(C, device=device)
    return Coordinates((B, H, T, C), example[:, None, :], position[:, None, :], column)
