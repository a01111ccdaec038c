"""The loss of a model from which one attention head or one unit is taken away.

To take away is to put zero in its place, where the output projection of the attention, or the last linear of
the feed-forward, reads it. No weight is touched. Knows neither text nor how the loss is measured.

Letters: C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from twodice.dropout.places import Inventory, Place
from twodice.errors import ShapeError
from twodice.random.keys import Key
from twodice.random.permutation import permute


class Part(NamedTuple):
    """Columns `first` to `stop` of what a module reads: one head, or one unit."""

    module: nn.Module
    first: int
    stop: int


def heads_of(found: Inventory) -> list[Part]:
    """Every attention head, by the columns of its output projection."""
    parts = []
    for place in _read(found, "head"):
        count = int(place.extra["heads"])
        width = _width(place.module) // count
        parts += [Part(place.module, i * width, (i + 1) * width) for i in range(count)]
    return parts


def units_of(found: Inventory) -> list[Part]:
    """Every unit of the feed-forwards, by the column of the last linear."""
    return [
        Part(place.module, i, i + 1)
        for place in _read(found, "activation")
        for i in range(_width(place.module))
    ]


def _read(found: Inventory, kind: str) -> list[Place]:
    return [place for place in found.places if place.kind == kind and place.tensor == "input"]


def _width(module: nn.Module) -> int:
    """Columns that a linear reads: nn.Linear keeps them last, the Conv1D of transformers first."""
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise ShapeError(f"a projection must hold one matrix; got {type(module).__name__}")
    return int(weight.shape[1 if isinstance(module, nn.Linear) else 0])


def chosen(parts: list[Part], count: int, key: Key) -> list[Part]:
    """`count` of the parts, or all where there are fewer, in the order of the model.

    *Randomness.* The parts that a keyed bijection sends to the first `count` places: for one key always the
    same.
    """
    if len(parts) <= count:
        return parts
    order = permute(key, np.arange(count), len(parts))
    return [parts[int(i)] for i in np.sort(order)]


@contextmanager
def without(part: Part) -> Iterator[None]:
    """A model without one head or unit, inside."""

    def zero(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept = args[0].clone()
        kept[..., part.first : part.stop] = 0
        return (kept, *args[1:])

    hook = part.module.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        hook.remove()


def rises(parts: list[Part], loss: Callable[[], float]) -> list[float]:
    """How far the loss rises when each part alone is taken away (negative: it falls).

    Notes
    -----
    Michel, Levy and Neubig 2019, "Are sixteen heads really better than one?" (arXiv 1905.10650), section 3.2,
    for heads; Morcos et al. 2018, "On the importance of single directions for generalization" (arXiv
    1803.06959), for units. A small rise says that the rest stands in for the part, or that it did little.
    """
    if not parts:
        return []
    whole = loss()
    found = []
    for part in parts:
        with without(part):
            found.append(loss() - whole)
    return found
