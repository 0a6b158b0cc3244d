"""The rows that an engine answers in: a cache of keys and values with room to grow, whose rows are refilled.

Every row ends at the same column, which is that of its last token; what comes before its first token is masked. So a
prompt enters a free row at any time, its keys and values to the left of that column, and the model's own attention
needs to know nothing of it: distances between the columns of a row are those between its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

GROWTH = 64
"""Columns that are added at least, where there is no room."""


class RowsLayer(DynamicLayer):
    """Keys and values of one layer, [rows, heads, columns, dim]: views of buffers that have room behind them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.columns = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns; all there is."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.columns + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end:
            room = end + max(GROWTH, self.columns // 2)
            self._buffers = self._grown(key_states, room, 0), self._grown(value_states, room, 1)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.columns : end] = new
        return self._view(end)

    def _grown(self, like: Tensor, room: int, which: int) -> Tensor:
        grown = like.new_zeros(*like.shape[:-2], room, like.shape[-1])
        if self._buffers is not None:
            grown[:, :, : self.columns] = self._buffers[which][:, :, : self.columns]
        return grown

    def _view(self, columns: int) -> tuple[Tensor, Tensor]:
        assert self._buffers is not None
        self.columns = columns
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self._buffers)
        return self.keys, self.values

    def select(self, rows: Tensor, first_column: int = 0) -> None:
        """Keep these rows, [rows] int64, and the columns from one on."""
        assert self._buffers is not None
        self._buffers = tuple(buffer[rows, :, first_column:] for buffer in self._buffers)  # type: ignore[assignment]
        self._view(self.columns - first_column)

    def put(self, rows: Tensor, other: RowsLayer, theirs: Tensor) -> None:
        """Put rows of another layer in place of these, so that they end at the same column."""
        assert self._buffers is not None
        start = self.columns - other.columns
        for buffer, new in zip(self._buffers, (other.keys, other.values), strict=True):
            buffer[rows, :, start : self.columns] = new[theirs]  # type: ignore[index]


class Rows:
    """Rows in flight: their cache, and of each its mask and the position of its last token."""

    def __init__(self, cache: Cache, mask: Tensor, positions: Tensor) -> None:
        self.cache, self.mask, self.positions = cache, mask, positions

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def columns(self) -> int:
        return self.mask.shape[1]

    def advance(self) -> None:
        """Make a column for the next token of every row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.positions = self.positions + 1

    def select(self, rows: Tensor) -> None:
        """Keep these rows, [rows] int64, and no column that is masked in all of them."""
        mask = self.mask[rows]
        first = int(mask.any(0).to(torch.int64).argmax())
        if first or not torch.equal(rows, torch.arange(len(self), device=rows.device)):
            for layer in self.cache.layers:
                layer.select(rows, first)  # type: ignore[union-attr]
        self.mask, self.positions = mask[:, first:], self.positions[rows]

    def put(self, rows: Tensor, other: Rows, theirs: Tensor) -> None:
        """Put rows of others, which have no more columns, in place of these."""
        for layer, new in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.put(rows, new, theirs)  # type: ignore[union-attr]
        self.mask[rows] = 0
        self.mask[rows, self.columns - other.columns :] = other.mask[theirs]
        self.positions[rows] = other.positions[theirs]
        if int(self.mask.any(0).to(torch.int64).argmax()) > self.columns // 2:
            self.select(torch.arange(len(self), device=self.mask.device))

    def idle(self, rows: Sequence[int]) -> None:
        """Let rows go along without meaning anything, until others take their place."""
        if rows:
            self.positions[list(rows)] = 0


def new_cache() -> Cache:
    """A cache without rows yet."""
    return Cache(layer_class_to_replicate=RowsLayer)
