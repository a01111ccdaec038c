"""Dropout decisions: from a rate to a threshold, from coordinates to 16-bit lanes. The readable reference in
torch.

The law (``docs/contracts/randomness.md``): element (example, position, head, column) of a site at a step
reads lane ``column % 8`` of Philox at counter ``(head << 20 | column // 8, position, example, step)`` and is
dropped iff the lane is below ``t = round(p * 65536)``. This module knows no layout of tensors and no
arithmetic but the scale.

Letters: B rows, H heads, T positions, C columns.
"""

from __future__ import annotations

import torch

from twodice.errors import ConfigError
from twodice.random.keys import Key, key_bits
from twodice.random.philox import philox4x32
from twodice.random.thresholds import ONE as ONE
from twodice.random.thresholds import round_rate as round_rate

BOUNDS = {"head": 1 << 12, "column": 1 << 23, "position": 1 << 32, "example": 1 << 32, "step": 1 << 32}


def threshold(p: float, *, constant: bool = True, name: str = "p") -> int:
    """Return the threshold of a rate: an element is dropped iff its lane is below it.

    Parameters
    ----------
    p : float
        Probability of dropping, in [0, 1].
    constant : bool
        Whether the rate is meant as it stands. A constant in (0, 2^-17) or (1 - 2^-17, 1) is an error,
        because 16 bits would silently make it 0 or 1; a value on a schedule rounds.
    name : str
        What the message calls the rate.

    Returns
    -------
    int
        In [0, 65536]; the rate in force is this over 65536.

    Raises
    ------
    ConfigError
        If the rate is NaN, outside [0, 1], or a constant that cannot be told from 0 or 1.
    """
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0.0 <= p <= 1.0:
        raise ConfigError(f"{name} must be a number in [0, 1]; got {p!r}")
    t = round_rate(float(p))
    if constant and ((t == 0 and p != 0) or (t == ONE and p != 1)):
        raise ConfigError(
            f"a constant {name} must be 0, 1 or in [2^-17, 1 - 2^-17], as decisions have 16 bits; got {p!r}; "
            f"write {0 if t == 0 else 1} if that is meant"
        )
    return t


def threshold_of_tensor(p: torch.Tensor) -> torch.Tensor:
    """Return the threshold of a rate in a 0-dim tensor, by the rule of `round_rate`, as int64."""
    scaled = p.double() * ONE
    return torch.where(scaled <= ONE // 2, torch.floor(scaled + 0.5), torch.ceil(scaled - 0.5)).to(
        torch.int64
    )


def check_bound(name: str, value: int) -> None:
    """Raise unless ``0 <= value < BOUNDS[name]``."""
    if not 0 <= value < BOUNDS[name]:
        raise ConfigError(f"{name} must be in [0, {BOUNDS[name]}); got {value}")


def check_bounds(name: str, values: torch.Tensor) -> None:
    """Raise unless all integers of a tensor on the host are within the bounds of that coordinate."""
    if values.numel():
        low, high = (int(v) for v in torch.aminmax(values))
        check_bound(name, low)
        check_bound(name, high)


def lanes(
    key: Key | int,
    step: int | torch.Tensor,
    example: torch.Tensor,
    position: torch.Tensor,
    head: torch.Tensor,
    column: torch.Tensor,
) -> torch.Tensor:
    """Return the 16-bit lane of every element, coordinate by coordinate.

    Parameters
    ----------
    key : Key or int
        The site's key.
    step : int or 0-dim int64 tensor
        In [0, 2^32).
    example, position, head, column : int64 tensor
        Broadcastable; within `BOUNDS`, which the caller has checked.

    Returns
    -------
    int64 tensor
        Values in [0, 65536), of the broadcast shape.

    Notes
    -----
    *Randomness.* This is the definition. `lane_grid` gives the same for consecutive columns with an eighth of
    the work.
    """
    words = philox4x32((head << 20) | (column >> 3), position, example, step, key_bits(key))
    word = (column & 7) >> 1
    chosen = torch.where(
        word < 2, torch.where(word == 0, words[0], words[1]), torch.where(word == 2, words[2], words[3])
    )
    return (chosen >> ((column & 1) << 4)) & 0xFFFF


def lane_grid(
    key: Key | int,
    step: int | torch.Tensor,
    example: torch.Tensor,
    position: torch.Tensor,
    head: torch.Tensor,
    columns: int,
) -> torch.Tensor:
    """Return the lanes of columns 0 .. `columns` - 1: the coordinates' broadcast shape and one more
    dimension, last.

    Parameters and randomness as in `lanes`.
    """
    counter = torch.arange(-(-columns // 8), device=example.device)
    words = philox4x32(
        (head[..., None] << 20) | counter, position[..., None], example[..., None], step, key_bits(key)
    )
    pairs = torch.stack(torch.broadcast_tensors(*words), dim=-1)
    both = torch.stack((pairs & 0xFFFF, pairs >> 16), dim=-1)
    return both.flatten(-3)[..., :columns]
