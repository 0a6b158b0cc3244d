"""Weights in safetensors files: read tensor by tensor, or any part of one, and written tensor by tensor.

A checkpoint's tensors are not always those of the model: experts that are one tensor in the model are one each in the
file, a gate and an up projection are two. What transformers would do to whole tensors while loading is described here
as a view of them, and a rank reads out of it what its shard needs.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, Protocol
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from postlude.manifest.problem import ManifestError
from postlude.model.places import LM_HEAD_FILE, SCALAR_FILE

INDEX_FILE = "model.safetensors.index.json"
"""Which file holds which tensor, where there are several."""
FILE_BYTES = 4 * 2**30
"""A file is closed before it grows beyond this."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""As safetensors names them."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}

Region = tuple[slice, ...]
"""A part of a tensor: one slice with a start and an end for each dimension."""


class LazyTensor(Protocol):
    """A tensor of which parts are read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, region: Region) -> Tensor:
        """A part of it, as stored."""


Sources = Mapping[str, LazyTensor]
"""Where the weights of a model come from, by name."""


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
        values = torch.empty((rows.stop - rows.start, *below), dtype=self.dtype)
        if values.numel():
            with self.path.open("rb") as stream:
                stream.seek(self.start + rows.start * row_bytes)
                into: Any = values.reshape(-1).view(torch.uint8).numpy()
                if stream.readinto(memoryview(into)) != values.nbytes:
                    raise OSError(f"{self.path} ends before the tensor at byte {self.start}")
        return values[(slice(None), *region[1:])] if region else values[0]


def read_whole(tensor: LazyTensor) -> Tensor:
    """All of a tensor, as stored."""
    return tensor.read(tuple(slice(0, size) for size in tensor.shape))


def tensors_in(path: Path) -> dict[str, InFile]:
    """The tensors of a safetensors file by name. SafetensorError if it is not one, or not whole."""
    with safe_open(path, framework="pt"):  # compares the header with the size of the file
        pass
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: InFile(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold the weights of the model in a local folder, there or not."""
    for name in ("model.safetensors", "pytorch_model.bin"):  # as transformers looks for them
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [name]
        if index.exists():
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return ["model.safetensors"]


def open_checkpoint(folder: Path, place: str) -> dict[str, LazyTensor]:
    """The tensors of a local folder's files, by the names that they have there. ManifestError if a file is missing or
    broken."""
    head = [LM_HEAD_FILE] if (folder / LM_HEAD_FILE).exists() else []
    tensors: dict[str, LazyTensor] = {}
    for name in (*weight_files(folder), *head):
        try:
            tensors |= _pickled_in(folder / name) if name.endswith(".bin") else tensors_in(folder / name)
        except (OSError, EOFError, KeyError, ValueError, RuntimeError, UnpicklingError, SafetensorError) as error:
            raise ManifestError(
                f"The model at '{place}' cannot be loaded: its file {name} cannot be read ({error}). Fetch or write "
                "the model anew."
            ) from error
    return tensors


def read_scalar(folder: str, place: str) -> Tensor | None:
    """The weight of the head ``scalar`` [1, hidden] in a local folder; None if it has none. ManifestError if its file
    is broken."""
    path = Path(folder, SCALAR_FILE)
    try:
        return read_whole(tensors_in(path)["weight"]) if path.exists() else None
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ManifestError(f"The model at '{place}' cannot be loaded: {SCALAR_FILE} is broken ({error}).") from error


def _pickled_in(path: Path) -> dict[str, InMemory]:
    """The tensors of a file of older models, mapped where its format allows it."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    return {name: InMemory(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)}


def dtype_in_files(sources: Sources) -> torch.dtype:
    """The dtype of a checkpoint whose configuration does not say it."""
    return next((tensor.dtype for tensor in sources.values() if isinstance(tensor, InFile | InMemory)), torch.float32)


class WeightWriter:
    """The safetensors files of a model in a folder, filled in order; with an index, where they are several.

    ``groups`` has all that is to come, in order and without values; the members of a group are written to one file.
    """

    def __init__(self, folder: Path, groups: Sequence[Mapping[str, Tensor]]) -> None:
        self._folder = folder
        self._contents: list[dict[str, Tensor]] = [{}]
        size = 0
        for group in groups:
            group_bytes = sum(tensor.nbytes for tensor in group.values())
            if size and size + group_bytes > FILE_BYTES:
                self._contents.append({})
                size = 0
            self._contents[-1] |= group
            size += group_bytes
        count = len(self._contents)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        self._names = names if count > 1 else ["model.safetensors"]
        self._pending = [(name, number) for number, content in enumerate(self._contents) for name in content]
        self._pending.reverse()
        self._open: BinaryIO | None = None

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, on the CPU, which have to come in the order of the plan."""
        for name, tensor in tensors.items():
            expected, number = self._pending.pop()
            assert expected == name, f"{name} comes before {expected}"
            if name == next(iter(self._contents[number])):
                self._begin(number)
            assert self._open is not None
            self._open.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _begin(self, number: int) -> None:
        if self._open is not None:
            self._open.close()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, tensor in self._contents[number].items():
            end = start + tensor.nbytes
            header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._open = (self._folder / self._names[number]).open("wb")
        self._open.write(struct.pack("<Q", len(text)) + text)

    def close(self) -> None:
        """Finish the last file, and write the index where there are several."""
        assert not self._pending, "not every tensor was given"
        if self._open is not None:
            self._open.close()
        if len(self._names) > 1:
            total = sum(tensor.nbytes for content in self._contents for tensor in content.values())
            places = {name: file for file, content in zip(self._names, self._contents) for name in content}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# --- tensors made of others ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class InMemory:
    """A tensor that is there."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

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
        wanted, pieces, begin = region[self.dimension], [], 0
        for part in self.parts:
            size = part.shape[self.dimension]
            start, stop = max(wanted.start - begin, 0), min(wanted.stop - begin, size)
            if start < stop:
                pieces.append(part.read(_replaced(region, self.dimension, slice(start, stop))))
            begin += size
        if not pieces:
            return self.parts[0].read(_replaced(region, self.dimension, slice(0, 0)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dimension)


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
