"""A key/value cache for many sequences of unlike lengths, allocated once.

The sequences stand right-aligned in one buffer a layer, so that every step writes one column and reads one
view; nothing is concatenated or copied while tokens are made. Knows transformers' interface for caches, and
no model.

Letters: R rows (sequences), H heads, C columns (capacity), K head width, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class Extent:
    """What part of the buffers the next forward writes; shared by all layers, set by the cache's owner.

    While `rows` is None the forward continues the first `num_rows` rows by one column at `length`. Otherwise
    it starts sequences: row ``rows[i]`` takes the states of the forward's sequence ``sources[i]`` at `start`.
    """

    num_rows: int
    capacity: int
    length: int = 0
    rows: Tensor | None = None
    sources: Tensor | None = None
    start: int = 0


class _Layer(CacheLayerMixin):
    """Keys and values of one layer in buffers (R, H, C, K)."""

    is_sliding = False

    def __init__(self, extent: Extent) -> None:
        super().__init__()
        self.extent = extent

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def buffer(like: Tensor) -> Tensor:
            shape = (self.extent.num_rows, like.shape[1], self.extent.capacity, like.shape[3])
            # Zeros, not whatever was there: a masked column is multiplied by 0, and 0 * NaN would be NaN.
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        extent, keys, values = self.extent, self.keys, self.values
        assert keys is not None and values is not None, "the buffers were just made"
        if extent.rows is not None:
            end = extent.start + key_states.shape[2]
            keys[extent.rows, :, extent.start : end] = key_states[extent.sources]
            values[extent.rows, :, extent.start : end] = value_states[extent.sources]
            return key_states, value_states
        end = extent.length + key_states.shape[2]
        keys[: extent.num_rows, :, extent.length : end] = key_states
        values[: extent.num_rows, :, extent.length : end] = value_states
        return keys[: extent.num_rows, :, :end], values[: extent.num_rows, :, :end]

    def get_seq_length(self) -> int:
        return 0 if self.extent.rows is not None else self.extent.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.extent.capacity


class RowCache(Cache):
    """The cache of R sequences. Sequences start by `starting`, go on by `continuing`, leave by `remove`.

    Parameters
    ----------
    num_rows
        Sequences at most (R).
    capacity
        Columns (C): the longest sequence must fit.
    """

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.extent = Extent(num_rows, capacity)
        super().__init__(layer_class_to_replicate=lambda: _Layer(self.extent))  # type: ignore[arg-type]

    def starting(self, rows: list[int], sources: list[int], start: int) -> None:
        """The next forward holds prompts: row ``rows[i]`` takes its sequence ``sources[i]``, from `start`."""
        self.extent.rows, self.extent.sources = torch.tensor(rows), torch.tensor(sources)
        self.extent.start = start

    def continuing(self, length: int) -> None:
        """The next forward holds one token for every row, to be written at column `length`."""
        self.extent.rows = self.extent.sources = None
        self.extent.length = length

    def remove(self, row: int) -> None:
        """Give up `row`: the last row moves into its place. Copies one row, no more."""
        last = self.extent.num_rows - 1
        if row != last:
            for layer in self.layers:
                layer.keys[row].copy_(layer.keys[last])  # type: ignore[union-attr]
                layer.values[row].copy_(layer.values[last])  # type: ignore[union-attr]
        self.extent.num_rows = last
