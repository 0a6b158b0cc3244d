"""Filters that are SQL predicates over the record: ``len(messages) >= 2``, ``lang = 'en' AND score > 0.5``.

DuckDB evaluates them over batches of records. Columns are typed by what they hold over the whole source, so that a
predicate means the same in every batch: lists and structs where the records agree. A record that has another kind of
value than most, in a place that a predicate looks at, is a bad one and bears on no type.
A predicate that gives NULL drops the record, as a WHERE clause does.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from postlude.data.example import Record
from postlude.data.formats.columns import kind_of
from postlude.data.records import record_json
from postlude.errors import DataError, UserError
from postlude.nearest import suggestion_or_list

_Path = tuple[str, ...]
"""The column, and below it the keys of objects; lists on the way do not count."""

_ROW, _RECORD = "__postlude_row", "__postlude_record"


class Predicates:
    """The predicates of one data set, bound to the columns of its source.

    ``batches`` gives all the records, each time it is iterated: the types of the mentioned columns are made of them.
    DataError, naming the predicate, where one is not SQL or does not fit the columns.
    """

    def __init__(self, predicates: Sequence[str], batches: Iterable[Sequence[Record]]) -> None:
        self._written = " ".join(predicates)
        self._mentioned = self._written.casefold()
        self._connection = duckdb.connect(config={"threads": 1, "autoinstall_known_extensions": False})
        # A predicate that read files would depend on more than the fingerprint of the data set knows.
        self._connection.execute("SET enable_external_access = false")
        self._columns: dict[str, None] = {}
        self._kinds: dict[_Path, Counter[str]] = {}
        self._structure = self._learn(map(self._count_kinds, batches))
        self._usual = {path: counts.most_common(1)[0][0] for path, counts in self._kinds.items()}
        if any(len(counts) > 1 for counts in self._kinds.values()):
            usual = ([record for record in records if self.odd(record) is None] for records in batches)
            self._structure = self._learn(usual)
        for predicate in predicates:
            if not predicate.strip():
                raise DataError("A filter is an empty text. Write a SQL predicate, or remove it from 'filters'.")
            self.keeps(predicate, [], str)

    def keeps(self, predicate: str, records: Sequence[Record], where: Callable[[int], str]) -> list[bool]:
        """For each record whether the predicate is true of it. ``where`` tells where the record at a place stands."""
        try:
            return self._evaluate(predicate, records)
        except duckdb.Error as error:
            place = f" for {where(self._first_that_fails(predicate, records))}" if records else ""
            raise DataError(
                f"The filter '{predicate}' cannot be evaluated{place}. {self._reason(error)} Correct it in 'filters'."
            ) from error

    def odd(self, record: Record) -> str | None:
        """What is wrong with a record whose value, in a place that the predicates look at, is of another kind than
        the rest have there; None where nothing is."""
        for path, kind in self._kinds_in(record):
            usual = self._usual.get(path, kind)
            if kind != usual:
                return f"its '{'.'.join(path)}' is {kind}, where most records have {usual}, which a filter looks at"
        return None

    def _count_kinds(self, records: Sequence[Record]) -> Sequence[Record]:
        """The records as they are."""
        for record in records:
            for path, kind in self._kinds_in(record):
                self._kinds.setdefault(path, Counter())[kind] += 1
        return records

    def _kinds_in(self, record: Record) -> Iterator[tuple[_Path, str]]:
        for name in self._names(record):
            yield from self._kinds_below((name,), record[name])

    def _kinds_below(self, path: _Path, value: object) -> Iterator[tuple[_Path, str]]:
        plain = value if isinstance(value, dict | list | tuple | str) else json.loads(record_json(value))
        if plain is None:
            return
        yield path, kind_of(plain)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, dict):
                for key, inner in item.items():
                    if key and key.casefold() in self._mentioned:
                        yield from self._kinds_below((*path, key), inner)

    def _names(self, record: Record) -> list[str]:
        """The columns that a predicate mentions; of those whose names differ in case alone, the one written so."""
        chosen: dict[str, str] = {}
        for name in record:
            if name and name.casefold() in self._mentioned:
                known = chosen.get(name.casefold())
                if known is None or (name in self._written and known not in self._written):
                    chosen[name.casefold()] = name
        return list(chosen.values())

    def _learn(self, batches: Iterable[Sequence[Record]]) -> str:
        """The type of the mentioned columns over all the records, as DuckDB describes the structure of JSON."""
        schema = pa.schema([(_RECORD, pa.string())])
        failure: list[UserError] = []

        def texts() -> Iterator[pa.RecordBatch]:
            try:
                for records in batches:
                    self._columns.update(dict.fromkeys(name for record in records for name in record))
                    yield pa.record_batch([self._texts(records)], schema=schema)
            except UserError as error:  # would come out of DuckDB as one of its own
                failure.append(error)
                raise

        self._connection.register("every", pa.RecordBatchReader.from_batches(schema, texts()))
        try:
            query = f"SELECT json_group_structure({_RECORD}::JSON) FROM every"
            structure = self._connection.execute(query).fetchall()[0][0]
        except duckdb.Error:
            if failure:
                raise failure[0] from None
            raise
        # Records without any of the columns have no structure that could be told apart from an empty one.
        has_columns = structure is not None and isinstance(json.loads(structure), dict)
        structure = json.dumps(_as_columns(json.loads(structure))) if has_columns else None
        return structure if structure is not None else f'{{"{_ROW}_": "NULL"}}'

    def _evaluate(self, predicate: str, records: Sequence[Record]) -> list[bool]:
        rows = pa.array(range(len(records)), pa.int64())
        self._connection.register("batch", pa.table({_ROW: rows, _RECORD: self._texts(records)}))
        columns = f"SELECT {_ROW}, unnest(from_json({_RECORD}::JSON, $1)) FROM batch"
        query = f"SELECT {_ROW} FROM ({columns}) WHERE ({predicate}\n)"
        true = {row for (row,) in self._connection.execute(query, [self._structure]).fetchall()}
        return [row in true for row in range(len(records))]

    def _texts(self, records: Sequence[Record]) -> pa.Array:
        """The JSON of the columns whose names stand in a predicate: the others would only cost time."""
        mentioned = [{name: record[name] for name in self._names(record)} for record in records]
        return pa.array(map(record_json, mentioned), pa.string())

    def _first_that_fails(self, predicate: str, records: Sequence[Record]) -> int:
        low, high = 0, len(records)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                self._evaluate(predicate, records[low:middle])
            except duckdb.Error:
                high = middle
            else:
                low = middle
        return low

    def _reason(self, error: duckdb.Error) -> str:
        message = str(error).partition("\n\nLINE")[0]
        unknown = re.search(r'Referenced column "([^"]+)" not found', message)
        if unknown is None:
            if isinstance(error, duckdb.PermissionException):
                return "A predicate sees the record and no file; the source 'query' can join files."
            return message if message.endswith((".", "!")) else f"{message}."
        hint = suggestion_or_list(unknown[1], self._columns)
        return f"No record has the column '{unknown[1]}'.{hint}"


def _as_columns(structure: Any) -> Any:
    """The structure of JSON, where an object that DuckDB has no struct for (a key is empty, or two differ in case
    alone) stays JSON."""
    if isinstance(structure, list):
        return [_as_columns(item) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if "" in structure or len({key.casefold() for key in structure}) < len(structure):
        return "JSON"
    return {key: _as_columns(item) for key, item in structure.items()}
