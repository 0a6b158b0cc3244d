"""Compressed text files, read from their start to their end, a group at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import IO, Any

import numpy as np

from postlude.data.example import Record
from postlude.data.records import LastRead, Records, Unreadable, digest, groups_of
from postlude.data.sources.cache import make_once
from postlude.data.sources.compression import open_plain
from postlude.data.sources.text import Layout, Piece


class Sequential(Records):
    """One compressed file. A group after the one read last is cheap; one before it is read from the file's start.

    Counting the rows takes one pass over the file, the first time.
    """

    seekable = False

    def __init__(self, uri: str, layout: Layout, cache: str, group_rows: int, fingerprint: str) -> None:
        self._uri, self._layout, self._group_rows = uri, layout, group_rows
        count = f"count-{digest(uri, fingerprint, type(layout).__name__)}.npy"
        rows = int(np.load(make_once(cache, count, self._write_count)))
        super().__init__(groups_of(rows, group_rows), fingerprint)
        self._open: tuple[IO[bytes], Iterator[Piece], int] | None = None
        """The open file, the pieces that come next in it, and the group that begins with them."""
        self._pieces = LastRead(self._read_group)

    def read(self, group: int, rows: Sequence[int] | None = None) -> list[Record | Unreadable]:
        pieces = self._pieces(group)
        return [self._layout.decode(pieces[row].raw) for row in (range(len(pieces)) if rows is None else rows)]

    def where(self, group: int, row: int) -> str:
        return f"{self._uri}, {self._layout.unit} {self._pieces(group)[row].number}"

    def _read_group(self, group: int) -> list[Piece]:
        file, pieces, next_group = self._open if self._open is not None and self._open[2] <= group else self._rewind()
        skipped = (group - next_group) * self._group_rows
        next(islice(pieces, skipped, skipped), None)
        self._open = file, pieces, group + 1
        return list(islice(pieces, self.groups[group]))

    def _rewind(self) -> tuple[IO[bytes], Iterator[Piece], int]:
        if self._open is not None:
            self._open[0].close()
        file = open_plain(self._uri)
        return file, self._layout.pieces(file), 0

    def _write_count(self, path: str) -> None:
        with open_plain(self._uri) as stream:
            rows = sum(1 for _ in self._layout.pieces(stream))
        with open(path, "wb") as file:
            np.save(file, np.int64(rows))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}
