"""A named data set: its source with limit and filters applied, whose rows become examples with stable identities.

Notable:

- The filters run once over the whole source, in file order and in batches, so memory holds one batch and what the
  filters remember. Which rows they kept is written to the cache, and every later process reads that. Without
  filters nothing is read in advance.
- A bad record (a row that cannot be read, or that is not of the format) stops everything with its place, or is
  counted: once, however often it is met.
- An example's identity is the record's key, or a hash of the record: the same in every epoch, run and order.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
from pydantic import ValidationError

from postlude.data.example import BadRecord, Example, Format, Record
from postlude.data.filters.filter import Filter, content_of
from postlude.data.filters.sieve import Sieve, places_in
from postlude.data.records import Unreadable, digest, record_json
from postlude.data.sources.cache import make_once
from postlude.data.sources.source import Source
from postlude.errors import DataError
from postlude.manifest.component import Component, lookup, names
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import DatasetConfig

BATCH_ROWS = 2048
"""Rows that the filters see at a time."""
_SHOWN, _SNIPPET_CHARACTERS = 5, 80
BAD_RECORD = "bad record"
"""Why a record is left out that cannot be read, where such are skipped."""

Rows = Sequence[int] | np.ndarray


class NothingLeft(DataError):
    """The filters of a data set drop all of its records."""


@dataclass
class LeftOut:
    """Records that were left out for one reason."""

    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)
    """Of up to five of them the identity (the place, where there is none) and how they begin, or what is wrong."""


class Dataset:
    """The records of a data set that are used, and the examples in them.

    ``cache`` is the URI of a folder for what is made once; ``sample`` uses only so many records, spread evenly over
    a source with random access and the first ones of a stream.

    DataError if the source cannot be read, a predicate cannot be evaluated, or nothing is left.
    """

    def __init__(self, name: str, config: DatasetConfig, cache: str, sample: int | None = None) -> None:
        self.name, self._on_bad_record, self._key = name, config.on_bad_record, config.key
        self.format = Format.of(config.format)
        self._records = Source.of(config.source).open(cache)
        self.files: Sequence[Sequence[int]] = self._records.files
        """The groups of each file."""
        self.seekable: bool = self._records.seekable
        """Whether the groups of a file can be taken in any order."""
        self.fingerprint: str = digest(
            self._records.fingerprint,
            config.model_dump_json(by_alias=True, exclude={*DatasetConfig.free}),
            str(sample),
            name,
        )
        """Changes when the data or the configuration do."""
        self.dropped: dict[str, LeftOut] = {}
        """What was left out so far, by reason: what the filters dropped, and bad records met."""
        self._known_bad: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self._kept = _choose(self._records.groups, config.limit, sample)
        chosen = sum(map(len, self._kept))
        if config.filters:
            self._filter(config, cache, str(sample))
        self.dropped_by_filters = {reason: left_out.count for reason, left_out in self.dropped.items()}
        """How many records the filters left out, by reason, with those that they could not judge."""
        self.groups: Sequence[int] = [len(rows) for rows in self._kept]
        """The rows of each group that are used; the positions that :meth:`examples` takes count these."""
        whole = sum(map(len, _choose(self._records.groups, config.limit, None)))
        self.rows: int = round(whole * sum(self.groups) / chosen) if chosen else 0
        """How many rows are used; where this is a sample, about how many would be without."""

    def examples(self, group: int, positions: Sequence[int]) -> list[list[tuple[str, Example]]]:
        """For each position in a group its examples with their identities; none for a bad record that is skipped.

        DataError at a bad record, unless ``on_bad_record`` is ``skip``.
        """
        return [examples for _, examples in self.read(group, positions)]

    def read(self, group: int, positions: Sequence[int]) -> list[tuple[Record, list[tuple[str, Example]]]]:
        """As :meth:`examples`, each with the record that they are in; one that cannot be read is empty."""
        rows = [int(self._kept[group][position]) for position in positions]
        records = self._records.read(group, rows)
        return [
            ({} if isinstance(record, Unreadable) else record, self._examples(group, row, record))
            for row, record in zip(rows, records, strict=True)
        ]

    def identity(self, record: Record) -> str:
        """The data set's name and the record's key, or a hash of the record. :class:`BadRecord` without the key."""
        if self._key is None:
            content = record_json(record, canonical=True).encode()
            return f"{self.name}:{hashlib.blake2b(content, digest_size=8).hexdigest()}"
        if record.get(self._key) is None:
            raise BadRecord(f"it has no '{self._key}', which 'key' says identifies it")
        return f"{self.name}:{record[self._key]}"

    def _examples(self, group: int, row: int, record: Record | Unreadable) -> list[tuple[str, Example]]:
        try:
            if isinstance(record, Unreadable):
                raise BadRecord(record.reason)
            identity, examples = self.identity(record), self.format.parse(record)
        except BadRecord as error:
            self._set_aside(group, row, record, error)
            return []
        except Exception as error:  # a format's own code: what it raises goes on, with the record that it was about
            error.add_note(f"This was a record of the data set '{self.name}': {self._records.where(group, row)}.")
            raise
        if len(examples) == 1:
            return [(identity, examples[0])]
        return [(f"{identity}/{number}", example) for number, example in enumerate(examples)]

    # --- what is left out -----------------------------------------------------------------------------------

    def _set_aside(self, group: int, row: int, record: Record | Unreadable, error: BadRecord) -> None:
        """Count a bad record, or stop."""
        if self._on_bad_record == "stop":
            key = None if self._key is None or isinstance(record, Unreadable) else record.get(self._key)
            called = "" if key is None else f", {self._key} {key!r}"
            raise DataError(
                f"A record of the data set '{self.name}' cannot be used ({self._records.where(group, row)}{called}): "
                f"{error}. Mend it, or set 'on_bad_record: skip' to leave such records out and count them."
            ) from error
        with self._lock:
            if (group, row) not in self._known_bad:
                self._known_bad.add((group, row))
                self._drop(BAD_RECORD, lambda: (self._records.where(group, row), str(error)))

    def _drop(self, reason: str, example: Callable[[], tuple[str, str]]) -> None:
        left_out = self.dropped.setdefault(reason, LeftOut())
        left_out.count += 1
        if len(left_out.examples) < _SHOWN:
            left_out.examples.append(example())

    def _describe(self, group: int, row: int, record: Record) -> tuple[str, str]:
        try:
            identity, text = self.identity(record), content_of(self.format.parse(record)).text
        except BadRecord:
            identity, text = self._records.where(group, row), record_json(record)
        text = " ".join(text.split())
        return identity, text if len(text) <= _SNIPPET_CHARACTERS else text[: _SNIPPET_CHARACTERS - 1] + "…"

    # --- filters --------------------------------------------------------------------------------------------

    def _filter(self, config: DatasetConfig, cache: str, sample: str) -> None:
        filters = [_resolve(entry) for entry in config.filters]
        components = [self.format, *(entry for entry in filters if isinstance(entry, Filter))]
        keys = config.model_dump_json(
            by_alias=True, exclude={"source", "template", "train_on", "truncate", *DatasetConfig.free}
        )
        judged = self.name, self._records.fingerprint, keys, sample
        what = digest(*judged, version("postlude"), *map(_code_of, components))

        def run(path: str) -> None:
            kept = self._pass(filters)
            with open(path, "wb") as file:
                ends = np.cumsum([len(rows) for rows in kept])
                dropped = json.dumps({reason: asdict(left_out) for reason, left_out in self.dropped.items()})
                np.savez(file, rows=np.concatenate(kept), ends=ends, dropped=np.array(dropped))

        stored = np.load(make_once(cache, f"kept-{what}.npz", run))
        self._kept = list(np.split(stored["rows"], stored["ends"][:-1]))
        self.dropped = {
            reason: LeftOut(left_out["count"], [tuple(example) for example in left_out["examples"]])
            for reason, left_out in json.loads(str(stored["dropped"])).items()
        }
        if not any(map(len, self._kept)):
            counts = ", ".join(f"{left_out.count} by '{reason}'" for reason, left_out in self.dropped.items())
            raise NothingLeft(
                f"The filters of the data set '{self.name}' leave no record: dropped {counts}. Loosen them, or check "
                "that they mean these data."
            )

    def _pass(self, filters: Sequence[str | Filter]) -> list[np.ndarray]:
        """Judge all the rows once; the rows kept of each group."""
        sieve = Sieve(filters, self.format, lambda: (_readable(records) for _, _, records in self._batches()))
        kept = [array("q") for _ in self._kept]
        for group, rows, records in self._batches():
            readable = [row for row, record in zip(rows, records, strict=True) if not isinstance(record, Unreadable)]
            verdicts = iter(sieve(_readable(records), places_in(partial(self._records.where, group), readable)))
            for row, record in zip(rows, records, strict=True):
                verdict = BadRecord(record.reason) if isinstance(record, Unreadable) else next(verdicts)
                if verdict is None:
                    kept[group].append(row)
                elif isinstance(verdict, BadRecord):
                    self._set_aside(group, row, record, verdict)
                else:
                    self._drop(verdict, partial(self._describe, group, row, cast(Record, record)))
        return [np.array(rows) for rows in kept]

    def _batches(self) -> Iterator[tuple[int, list[int], list[Record | Unreadable]]]:
        """The chosen rows, in file order."""
        for file in self.files:
            for group in file:
                chosen = self._kept[group]
                for start in range(0, len(chosen), BATCH_ROWS):
                    rows = [int(row) for row in chosen[start : start + BATCH_ROWS]]
                    yield group, rows, self._records.read(group, rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def _readable(records: Sequence[Record | Unreadable]) -> list[Record]:
    return [record for record in records if not isinstance(record, Unreadable)]


def _choose(groups: Sequence[int], limit: int | None, sample: int | None) -> list[Rows]:
    """The rows of each group that are used, before filters."""
    left = sum(groups) if limit is None else limit
    chosen: list[Rows] = []
    for rows in groups:
        chosen.append(range(min(rows, left)))
        left -= len(chosen[-1])
    if sample is None:
        return chosen
    if len(chosen) == 1:
        rows = len(chosen[0])
        return [np.unique(np.linspace(0, rows - 1, min(sample, rows)).astype(np.int64))]
    return _choose([len(rows) for rows in chosen], sample, None)


def _resolve(entry: str | Component) -> str | Filter:
    """A filter as it is meant: a bare name of a registered one is that filter, any other text a predicate."""
    if isinstance(entry, str) and entry in names("filters"):
        try:
            return Filter.of(lookup("filters", entry).model_validate({}))
        except ValidationError as error:
            raise ManifestError(f"The filter '{entry}' needs keys of its own: {error.errors()[0]['msg']}.") from error
    return entry if isinstance(entry, str) else Filter.of(entry)


def _code_of(component: Component) -> str:
    """A hash of the folder's code that the component comes from: what it kept holds for that code only."""
    file = getattr(sys.modules.get(type(component).__module__), "__file__", None)
    if file is None:
        return ""
    return digest(*(path.read_text("utf-8", "replace") for path in sorted(Path(file).parent.glob("*.py"))))
