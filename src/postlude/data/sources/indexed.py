"""Plain text files, entered at any record through an index of where each begins and ends."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from postlude import storage
from postlude.data.example import Record
from postlude.data.records import LastRead, Records, Unreadable, digest, groups_of
from postlude.data.sources.cache import make_once
from postlude.data.sources.text import Layout


class Indexed(Records):
    """One plain file. ``group_rows``: rows of a group; None makes one group of all, for reading single rows.

    ``name`` and ``fingerprint`` are those of the file that the user knows, where this one is a copy.
    """

    def __init__(
        self, uri: str, layout: Layout, cache: str, group_rows: int | None, name: str, fingerprint: str
    ) -> None:
        self._uri, self._layout, self._name, self._group_rows = uri, layout, name, group_rows
        index = f"index-{digest(uri, fingerprint, type(layout).__name__)}"
        self._index = make_once(cache, index, self._write_index)
        self._spans = _map_spans(self._index)
        rows = len(self._spans)
        super().__init__([rows] if group_rows is None else groups_of(rows, group_rows), fingerprint)
        self._block = LastRead(self._read_group)

    def read(self, group: int, rows: Sequence[int] | None = None) -> list[Record | Unreadable]:
        wanted = np.arange(self.groups[group]) if rows is None else np.asarray(rows, np.int64)
        if self._group_rows is None:
            return [self._layout.decode(raw) for raw in self._single(wanted)]
        base, block = self._block(group)
        spans = self._spans[group * self._group_rows + wanted] - base
        return [self._layout.decode(block[start:end]) for start, end in spans.tolist()]

    def where(self, group: int, row: int) -> str:
        row += group * (self._group_rows or 0)
        number = row + 1 if self._layout.unit == "record" else self._line(int(self._spans[row, 0]))
        return f"{self._name}, {self._layout.unit} {number}"

    def _single(self, rows: np.ndarray) -> list[bytes]:
        with storage.open_file(self._uri, "rb") as file:
            pieces = []
            for start, end in self._spans[rows].tolist():
                file.seek(start)
                pieces.append(file.read(end - start))
            return pieces

    def _read_group(self, group: int) -> tuple[int, bytes]:
        """The offset and bytes of a group."""
        first = group * (self._group_rows or 0)
        start, end = int(self._spans[first, 0]), int(self._spans[first + self.groups[group] - 1, 1])
        with storage.open_file(self._uri, "rb") as file:
            file.seek(start)
            return start, file.read(end - start)

    def _line(self, offset: int) -> int:
        newlines = 0
        with storage.open_file(self._uri, "rb") as file:
            while offset > 0 and (chunk := file.read(min(offset, 2**22))):
                newlines += chunk.count(b"\n")
                offset -= len(chunk)
        return newlines + 1

    def _write_index(self, path: str) -> None:
        with storage.open_file(self._uri, "rb") as stream, open(path, "wb") as file:
            spans = array("q")
            for piece in self._layout.pieces(stream):
                spans.extend((piece.start, piece.start + len(piece.raw)))
                if len(spans) >= 2**16:
                    spans.tofile(file)
                    del spans[:]
            spans.tofile(file)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spans": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _spans=_map_spans(state["_index"]))


def _map_spans(path: str) -> np.ndarray:
    """[rows, 2] int64: where the bytes of each row begin and end."""
    if not os.path.getsize(path):  # nothing cannot be mapped
        return np.empty((0, 2), np.int64)
    return np.memmap(path, np.int64, mode="r").reshape(-1, 2)
