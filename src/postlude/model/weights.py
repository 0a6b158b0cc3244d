"""Tensors that are in files, or made of such, of which any part can be read without the rest.

A checkpoint's tensors are not always those of the model: experts that are one tensor in the model are one each in the
file, a gate and an up projection are two. What transformers would do to whole tensors while loading is described here
as a view of them, and a rank reads out of it what its shard needs.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
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
    """A tensor in a safetensors file. It is read, not mapped: pages of a mapped file would be memory of the rank."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Where its bytes begin in the file."""

    def read(self, region: Region) -> Tensor:
        rows = region[0] if region else slice(0, 1)
        below = self.shape[1:]
        row_bytes = math.prod(below) * self.dtype.itemsize
        found = torch.empty((rows.stop - rows.start, *below), dtype=self.dtype)
        if found.numel():
            with self.path.open("rb") as stream:
                stream.seek(self.start + rows.start * row_bytes)
                into: Any = found.reshape(-1).view(torch.uint8).numpy()
                read = stream.readinto(memoryview(into))
                if read != found.nbytes:
                    raise OSError(f"{self.path} ends before the tensor at byte {self.start}")
        return found[(slice(None), *region[1:])] if region else found[0]


def tensors_in(path: Path) -> dict[str, InFile]:
    """The tensors of a safetensors file by name. SafetensorError if it is not one, or not whole."""
    with safe_open(path, framework="pt"):  # compares the header with the size of the file
        pass
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: InFile(path, _DTYPES[said["dtype"]], tuple(said["shape"]), 8 + length + said["data_offsets"][0])
        for name, said in header.items()
    }


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""As safetensors names them."""


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
