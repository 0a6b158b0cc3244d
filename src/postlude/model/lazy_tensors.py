"""Tensors that are in files, or made of such, of which any part can be read without the rest.

A checkpoint's tensors are not always those of the model: experts that are one tensor in the model are one each in the
file, a gate and an up projection are two. What transformers would do to whole tensors while loading is described here
as a view of them, and a rank reads out of it what its shard needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Region = tuple[slice, ...]
"""A part of a tensor: one slice with a start and an end for each dimension."""


class LazyTensor(Protocol):
    """A tensor of which parts are read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, region: Region) -> Tensor:
        """A part of it, as stored."""
        ...


@dataclass(frozen=True)
class InFile:
    """A tensor in an open safetensors file."""

    file: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> torch.dtype:
        return self.file.get_slice(self.name)[tuple(slice(0, 0) for _ in self.shape)].dtype

    def read(self, region: Region) -> Tensor:
        if not region:
            return self.file.get_tensor(self.name)
        return self.file.get_slice(self.name)[region]


@dataclass(frozen=True)
class InMemory:
    """A tensor that is there."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, region: Region) -> Tensor:
        return self.tensor[region]


@dataclass(frozen=True)
class Joined:
    """Tensors one after the other along a dimension."""

    parts: Sequence[LazyTensor]
    dimension: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.dimension] = sum(part.shape[self.dimension] for part in self.parts)
        return tuple(shape)

    def read(self, region: Region) -> Tensor:
        wanted, found, begin = region[self.dimension], [], 0
        for part in self.parts:
            size = part.shape[self.dimension]
            start, stop = max(wanted.start - begin, 0), min(wanted.stop - begin, size)
            if start < stop:
                found.append(part.read(_replaced(region, self.dimension, slice(start, stop))))
            begin += size
        if not found:
            return self.parts[0].read(_replaced(region, self.dimension, slice(0, 0)))
        return found[0] if len(found) == 1 else torch.cat(found, self.dimension)


@dataclass(frozen=True)
class Stacked:
    """Tensors of one shape along a new dimension."""

    parts: Sequence[LazyTensor]
    dimension: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape.insert(self.dimension, len(self.parts))
        return tuple(shape)

    def read(self, region: Region) -> Tensor:
        wanted = region[self.dimension]
        within = region[: self.dimension] + region[self.dimension + 1 :]
        read = [part.read(within) for part in self.parts[wanted.start : wanted.stop]]
        if not read:
            shape = [part.stop - part.start for part in region]
            return torch.empty(shape, dtype=self.parts[0].read(tuple(slice(0, 0) for _ in within)).dtype)
        return torch.stack(read, self.dimension)


@dataclass(frozen=True)
class Transposed:
    """A tensor with two dimensions exchanged."""

    of: LazyTensor
    first: int
    second: int

    @property
    def shape(self) -> tuple[int, ...]:
        return _exchanged(self.of.shape, self.first, self.second)

    def read(self, region: Region) -> Tensor:
        return self.of.read(_exchanged(region, self.first, self.second)).transpose(self.first, self.second)


@dataclass(frozen=True)
class Extended:
    """A tensor with rows of zeros after its own."""

    of: LazyTensor
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.of.shape[1:])

    def read(self, region: Region) -> Tensor:
        there, wanted = self.of.shape[0], region[0]
        own = self.of.read(_replaced(region, 0, slice(min(wanted.start, there), min(wanted.stop, there))))
        missing = wanted.stop - wanted.start - len(own)
        return torch.cat([own, own.new_zeros(missing, *own.shape[1:])]) if missing else own


def _replaced(region: Region, dimension: int, part: slice) -> Region:
    return (*region[:dimension], part, *region[dimension + 1 :])


def _exchanged(of: tuple[Any, ...], first: int, second: int) -> tuple[Any, ...]:
    exchanged = list(of)
    exchanged[first], exchanged[second] = exchanged[second], exchanged[first]
    return tuple(exchanged)
