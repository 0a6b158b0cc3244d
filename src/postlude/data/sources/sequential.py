"""Compressed text files, read from their start to their end, a group at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import IO, Any

import numpy as np

from postlude.data.example import Record
from postlude.data.records import Records, Unreadable, digest
from postlude.data.sources.cache import cached
from postlude.data.sources.compression import open_plain
from postlude.data.sources.text import Layout, Piece


class Sequential(Records):
    """One compressed file. A group after the one read last is cheap; one before it is read from the file's start.

    Counting the rows takes one pass over the file, the first time.
    """

    seekable = False

    _stream: IO[bytes] | None
    """The open file; ``_next_group`` comes next in it."""
    _pieces: Iterator[Piece]
    _next_group: int
    _held: list[Piece]
    """The pieces of the last group that was read, ``_held_group``."""
    _held_group: int

    def __init__(self, uri: str, layout: Layout, cache: str, group_rows: int, fingerprint: str) -> None:
        self._uri, self._layout, self._group_rows = uri, layout, group_rows
        self.fingerprint = fingerprint
        count = f"count-{digest(uri, fingerprint, type(layout).__name__)}.npy"
        rows = int(np.load(cached(cache, count, self._write_count)))
        whole, rest = divmod(rows, group_rows)
        self.groups = [group_rows] * whole + ([rest] if rest else [])
        self.files = [list(range(len(self.groups)))]
        self._lock = threading.Lock()
        self._rewind()

    def read(self, group: int, rows: Sequence[int] | None = None) -> list[Record | Unreadable]:
        pieces = self._pieces_of(group)
        return [self._layout.decode(pieces[row].raw) for row in (range(len(pieces)) if rows is None else rows)]

    def where(self, group: int, row: int) -> str:
        return f"{self._uri}, {self._layout.unit} {self._pieces_of(group)[row].number}"

    def _pieces_of(self, group: int) -> list[Piece]:
        """The group's pieces; the last group read is kept, for it is read in several portions."""
        with self._lock:
            if group == self._held_group:
                return self._held
            if self._stream is None or group < self._next_group:
                if self._stream is not None:
                    self._stream.close()
                self._rewind()
                self._stream = open_plain(self._uri)
                self._pieces = self._layout.pieces(self._stream)
            skipped = (group - self._next_group) * self._group_rows
            self._held_group, self._held = -1, []
            next(islice(self._pieces, skipped, skipped), None)
            self._held = list(islice(self._pieces, self.groups[group]))
            self._held_group, self._next_group = group, group + 1
            return self._held

    def _rewind(self) -> None:
        self._stream, self._pieces, self._next_group = None, iter(()), 0
        self._held, self._held_group = [], -1

    def _write_count(self, path: str) -> None:
        with open_plain(self._uri) as stream:
            rows = sum(1 for _ in self._layout.pieces(stream))
        with open(path, "wb") as file:
            np.save(file, np.int64(rows))

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_uri", "_layout", "_group_rows", "fingerprint", "groups", "files")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._rewind()
