"""Records: the shape that every source takes, files made of groups made of rows.

- A group is what is read and shuffled at a time. A source in which single rows are cheap is one group of all its
  rows; a stream has many, and nothing holds more than one of them in memory.
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
import uuid
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from postlude.data.example import Record


@dataclass(frozen=True)
class Unreadable:
    """A row that is no record; ``reason`` says why, not where."""

    reason: str


class Records(ABC):
    """The rows of a source."""

    groups: Sequence[int]
    """Rows in each group."""
    files: Sequence[Sequence[int]]
    """The groups of each file, in file order."""
    seekable: bool
    """Whether the groups of a file are cheap in any order; without it (compressed files) only in theirs."""
    fingerprint: str
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


class Stream(Records):
    """Parts, one after another: their groups stay apart."""

    def __init__(self, parts: Sequence[Records]) -> None:
        self._parts = list(parts)
        self._starts = [0, *accumulate(len(part.groups) for part in parts)]
        self.groups = [rows for part in parts for rows in part.groups]
        self.files = [
            [start + group for group in file]
            for part, start in zip(self._parts, self._starts, strict=False)
            for file in part.files
        ]
        self.seekable = all(part.seekable for part in parts)
        self.fingerprint = digest("stream", *(part.fingerprint for part in parts))

    def read(self, group: int, rows: Sequence[int] | None = None) -> list[Record | Unreadable]:
        part = bisect_right(self._starts, group) - 1
        return self._parts[part].read(group - self._starts[part], rows)

    def where(self, group: int, row: int) -> str:
        part = bisect_right(self._starts, group) - 1
        return self._parts[part].where(group - self._starts[part], row)


class RandomAccess(Records):
    """Parts of one group each, as one group: their rows are permuted together."""

    def __init__(self, parts: Sequence[Records]) -> None:
        self._parts = list(parts)
        self._starts = [0, *accumulate(part.rows for part in parts)]
        self.groups = [self._starts[-1]]
        self.files = [[0]]
        self.seekable = True
        self.fingerprint = digest("random access", *(part.fingerprint for part in parts))

    def read(self, group: int, rows: Sequence[int] | None = None) -> list[Record | Unreadable]:
        wanted = range(self.groups[0]) if rows is None else rows
        by_part: dict[int, list[int]] = {}
        for place, row in enumerate(wanted):
            by_part.setdefault(bisect_right(self._starts, row) - 1, []).append(place)
        found: list[Record | Unreadable] = [Unreadable("not read")] * len(wanted)
        for part, places in by_part.items():
            records = self._parts[part].read(0, [int(wanted[place]) - self._starts[part] for place in places])
            for place, record in zip(places, records, strict=True):
                found[place] = record
        return found

    def where(self, group: int, row: int) -> str:
        part = bisect_right(self._starts, row) - 1
        return self._parts[part].where(0, row - self._starts[part])


def digest(*parts: str) -> str:
    """32 hexadecimal digits that stand for the parts and their order."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def record_json(record: Any, *, canonical: bool = False) -> str:
    """The JSON text of a record. ``canonical``: equal records, whatever the order of their keys, give equal text.

    What JSON lacks becomes what is nearest: dates and times their ISO text, decimals numbers, bytes hexadecimal
    text, NaN and the infinities null.
    """
    try:
        return json.dumps(
            record,
            default=_plain,
            allow_nan=False,
            sort_keys=canonical,
            separators=(",", ":") if canonical else None,
        )
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
