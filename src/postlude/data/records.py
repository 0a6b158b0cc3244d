"""Records: the form that every source takes, files made of groups made of rows.

- A group is what is read and shuffled at a time. A source in which single rows are cheap is one group of all its
  rows; one that is read as a stream has many, and nothing holds more than one of them in memory.
- A row that cannot be read is not an exception but an :class:`Unreadable` in its place, so that whoever asked for
  many rows decides what becomes of it.
- Reading is safe from several threads, and records can be pickled: what is open is opened anew.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import math
import threading
import uuid
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

from postlude.data.example import Record

Content = TypeVar("Content")


@dataclass(frozen=True)
class Unreadable:
    """A row that is no record; ``reason`` says why, not where."""

    reason: str


class Records(ABC):
    """The rows of a source."""

    seekable: bool = True
    """Whether the groups of a file are cheap in any order; without it (compressed files) only in theirs."""

    def __init__(self, groups: Sequence[int], fingerprint: str, files: Sequence[Sequence[int]] | None = None) -> None:
        self.groups = groups
        """Rows in each group."""
        self.files = [list(range(len(groups)))] if files is None else files
        """The groups of each file, in file order; by default of one file."""
        self.fingerprint = fingerprint
        """Changes when the data do: made of names, sizes and time stamps or entity tags, not of the content."""

    @abstractmethod
    def read(self, group: int, rows: Sequence[int] | None = None) -> list[Record | Unreadable]:
        """The rows at positions ``rows`` of a group, in the order asked for; all of them by default."""

    @abstractmethod
    def where(self, group: int, row: int) -> str:
        """Where a row stands, for a human: ``data/chats.jsonl, line 17``."""

    @property
    def rows(self) -> int:
        """How many rows there are in all."""
        return sum(self.groups)


class _Joined(Records):
    """Parts, one after another. ``starts`` says where each begins, in what ``_part`` counts."""

    def __init__(
        self,
        kind: str,
        parts: Sequence[Records],
        starts: Sequence[int],
        groups: Sequence[int],
        files: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(groups, digest(kind, *(part.fingerprint for part in parts)), files)
        self._parts, self._starts = parts, starts

    def _part(self, place: int) -> tuple[Records, int]:
        """The part that holds a group or row, and which of its own that is."""
        part = bisect_right(self._starts, place) - 1
        return self._parts[part], place - self._starts[part]


class GroupAccess(_Joined):
    """Parts whose groups stay apart, each read at a time."""

    def __init__(self, parts: Sequence[Records]) -> None:
        starts = [0, *accumulate(len(part.groups) for part in parts)]
        files = [[start + group for group in file] for part, start in zip(parts, starts) for file in part.files]
        super().__init__("stream", parts, starts, [rows for part in parts for rows in part.groups], files)
        self.seekable = all(part.seekable for part in parts)

    def read(self, group: int, rows: Sequence[int] | None = None) -> list[Record | Unreadable]:
        part, own_group = self._part(group)
        return part.read(own_group, rows)

    def where(self, group: int, row: int) -> str:
        part, own_group = self._part(group)
        return part.where(own_group, row)


class RandomAccess(_Joined):
    """Parts of one group each, as one group: their rows are permuted together."""

    def __init__(self, parts: Sequence[Records]) -> None:
        starts = [0, *accumulate(part.rows for part in parts)]
        super().__init__("random access", parts, starts, starts[-1:])

    def read(self, group: int, rows: Sequence[int] | None = None) -> list[Record | Unreadable]:
        wanted = range(self.groups[0]) if rows is None else rows
        by_part: dict[int, list[int]] = {}
        for place, row in enumerate(wanted):
            by_part.setdefault(bisect_right(self._starts, row) - 1, []).append(place)
        records: list[Record | Unreadable] = [Unreadable("not read")] * len(wanted)
        for part, places in by_part.items():
            own = self._parts[part].read(0, [int(wanted[place]) - self._starts[part] for place in places])
            for place, record in zip(places, own, strict=True):
                records[place] = record
        return records

    def where(self, group: int, row: int) -> str:
        part, own_row = self._part(row)
        return part.where(0, own_row)


class LastRead(Generic[Content]):
    """What was read of the group read last, for a group is read in several portions. Pickled without it."""

    def __init__(self, read: Callable[[int], Content]) -> None:
        self._read = read
        self._held: tuple[int, Content] | None = None
        self._lock = threading.Lock()

    def __call__(self, group: int) -> Content:
        with self._lock:
            if self._held is None or self._held[0] != group:
                self._held = None  # first, so that no two groups are held
                self._held = group, self._read(group)
            return self._held[1]

    def __reduce__(self) -> Any:
        return LastRead, (self._read,)


def groups_of(rows: int, group_rows: int) -> list[int]:
    """The sizes of groups of so many rows each, the last one with what is left."""
    whole, rest = divmod(rows, group_rows)
    return [group_rows] * whole + ([rest] if rest else [])


def digest(*parts: str) -> str:
    """32 hexadecimal digits that stand for the parts and their order."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def record_json(record: Any, *, canonical: bool = False) -> str:
    """The JSON text of a record. ``canonical``: equal records, whatever the order of their keys, give equal text.

    What JSON lacks becomes what is nearest: dates and times their ISO text, decimals numbers, bytes hexadecimal
    text, NaN and the infinities null.
    """
    separators = (",", ":") if canonical else None
    try:
        return json.dumps(record, default=_plain, allow_nan=False, sort_keys=canonical, separators=separators)
    except ValueError:
        return record_json(_finite(record), canonical=canonical)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        if not value.is_finite():
            return None
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, uuid.UUID):
        return str(value)
    raise TypeError(f"A record cannot hold {type(value).__name__}.")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
