"""Filters that are SQL predicates over the record: ``len(messages) >= 2``, ``lang = 'en' AND score > 0.5``.

DuckDB evaluates them over batches of records. Columns are typed by what they hold over the whole source, so that a
predicate means the same in every batch: lists and structs where the records agree. A record that has another kind of
value than most, in a place that a predicate looks at, is a bad one and bears on no type; where no kind is that of most,
nothing is guessed. Whole numbers and fractions are one kind, and each record is evaluated on what its own number is:
one fraction does not make floating point of the identifiers of the others.
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
_MOST = 2 / 3
"""The share of the values in a place that are of the kind that the others are odd beside."""
_WHOLE = {"BIGINT": (-(2**63), 2**63), "UBIGINT": (0, 2**64), "HUGEINT": (-(2**127), 2**127)}
"""The types of whole numbers, from the least to before the end."""


class Predicates:
    """The predicates of one data set, bound to the columns of its source.

    ``batches`` gives all the records, each time it is iterated: the types of the mentioned columns are made of them.
    DataError, naming the predicate, where one is not SQL or does not fit the columns.
    """

    def __init__(self, predicates: Sequence[str], batches: Iterable[Sequence[Record]]) -> None:
        self._written = " ".join(predicates)
        self._mentions: dict[str, bool] = {}
        self._connection = duckdb.connect(config={"threads": 1, "autoinstall_known_extensions": False})
        # A predicate that read files would depend on more than the fingerprint of the data set knows.
        self._connection.execute("SET enable_external_access = false")
        self._columns: dict[str, None] = {}
        self._kinds: dict[_Path, Counter[str]] = {}
        self._whole: dict[_Path, tuple[int, int]] = {}
        """The least and the greatest of the whole numbers in a place."""
        self._fractions: set[_Path] = set()
        """Places in which some number is a fraction."""
        self._structures: dict[frozenset[_Path], str] = {}
        self._structure = self._learn(map(self._count_kinds, batches))
        self._usual = {path: _usual_kind(counts) for path, counts in self._kinds.items()}
        if any(len(counts) > 1 for counts in self._kinds.values()):
            usual = ([record for record in records if not self._is_odd(record)] for records in batches)
            self._structure = self._learn(usual)
        for predicate in predicates:
            if not predicate.strip():
                raise DataError("A filter is an empty text. Write a SQL predicate, or remove it from 'filters'.")
            if None not in self._usual.values():  # else the first record that has such a value tells more
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

    def odd(self, record: Record, where: Callable[[], str]) -> str | None:
        """What is wrong with a record whose value, in a place that the predicates look at, is of another kind than
        the rest have there; None where nothing is. DataError, which says ``where`` the record is, if no kind is that of
        most."""
        oddity = self._oddity(record)
        if oddity is None:
            return None
        path, kind, usual = oddity
        place = ".".join(path)
        if usual is None:
            counts = ", ".join(f"{other} {count:,} times" for other, count in self._kinds[path].most_common())
            raise DataError(
                f"The filters look at '{place}', which is of several kinds ({counts}), none of them clearly that of "
                f"most records: it is {kind} in {where()}. Make all alike there, or take it out of 'filters'."
            )
        return f"its '{place}' is {kind}, where most records have {usual}, which a filter looks at"

    def _is_odd(self, record: Record) -> bool:
        oddity = self._oddity(record)
        return oddity is not None and oddity[2] is not None

    def _oddity(self, record: Record) -> tuple[_Path, str, str | None] | None:
        """The first value that is not of the kind that most have in its place: the place, and both kinds."""
        for path, value in self._values_in(record):
            kind = _kind(value)
            usual = self._usual.get(path, kind)
            if kind != usual:
                return path, kind, usual
        return None

    def _count_kinds(self, records: Sequence[Record]) -> Sequence[Record]:
        """The records as they are."""
        for record in records:
            for path, value in self._values_in(record):
                self._kinds.setdefault(path, Counter())[_kind(value)] += 1
                for number in _numbers_in(value):
                    if isinstance(number, float):
                        self._fractions.add(path)
                    else:
                        least, greatest = self._whole.get(path, (number, number))
                        self._whole[path] = min(least, number), max(greatest, number)
        return records

    def _values_in(self, record: Record) -> Iterator[tuple[_Path, Any]]:
        """The values that predicates look at, as JSON has them, without nulls."""
        for name in self._names(record):
            yield from self._values_below((name,), record[name])

    def _values_below(self, path: _Path, value: object) -> Iterator[tuple[_Path, Any]]:
        plain = value if isinstance(value, dict | list | tuple | str) else json.loads(record_json(value))
        if plain is None:
            return
        yield path, plain
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, dict):
                for key, inner in item.items():
                    if self._is_mentioned(key):
                        yield from self._values_below((*path, key), inner)

    def _is_mentioned(self, name: str) -> bool:
        """Whether a predicate has a word of this name."""
        if name not in self._mentions:
            word = rf"(?<!\w){re.escape(name.casefold())}(?!\w)"
            self._mentions[name] = bool(name) and re.search(word, self._written.casefold()) is not None
        return self._mentions[name]

    def _names(self, record: Record) -> list[str]:
        """The columns that a predicate mentions; of those whose names differ in case alone, the one written so."""
        chosen: dict[str, str] = {}
        for name in record:
            if self._is_mentioned(name):
                known = chosen.get(name.casefold())
                if known is None or (name in self._written and known not in self._written):
                    chosen[name.casefold()] = name
        return list(chosen.values())

    def _learn(self, batches: Iterable[Sequence[Record]]) -> Any:
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
        return _as_columns(json.loads(structure)) if has_columns else {f"{_ROW}_": "NULL"}

    def _structure_for(self, fractions: frozenset[_Path]) -> str:
        """The type of records whose numbers are fractions in these places and whole in the others."""
        if fractions not in self._structures:
            structure = self._structure
            for path, (least, greatest) in self._whole.items():
                fitting = [kind for kind, (low, high) in _WHOLE.items() if low <= least and greatest < high]
                if path not in fractions and fitting:
                    structure = _with_whole_numbers(structure, path, fitting[0])
            self._structures[fractions] = json.dumps(structure)
        return self._structures[fractions]

    def _evaluate(self, predicate: str, records: Sequence[Record]) -> list[bool]:
        mixed = self._fractions & self._whole.keys()
        alike: dict[frozenset[_Path], list[int]] = {} if records else {frozenset(): []}
        for row, record in enumerate(records):
            values = ((path, value) for path, value in self._values_in(record) if path in mixed) if mixed else ()
            fractions = frozenset(path for path, value in values if float in map(type, _numbers_in(value)))
            alike.setdefault(fractions, []).append(row)
        true: set[int] = set()
        for fractions, rows in alike.items():
            texts = self._texts([records[row] for row in rows])
            self._connection.register("batch", pa.table({_ROW: pa.array(rows, pa.int64()), _RECORD: texts}))
            columns = f"SELECT {_ROW}, unnest(from_json({_RECORD}::JSON, $1)) FROM batch"
            query = f"SELECT {_ROW} FROM ({columns}) WHERE ({predicate}\n)"
            true |= {row for (row,) in self._connection.execute(query, [self._structure_for(fractions)]).fetchall()}
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


def _numbers_in(value: Any) -> Iterator[int | float]:
    """The number that a value is, or those of a list."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers_in(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _kind(value: Any) -> str:
    if isinstance(value, int) and not -(2**127) <= value < 2**127:
        return "a whole number of more than 128 bits"
    return kind_of(value)


def _usual_kind(counts: Counter[str]) -> str | None:
    """The kind that most values are of; None where none is."""
    kind, count = counts.most_common(1)[0]
    return kind if count >= _MOST * counts.total() else None


def _with_whole_numbers(structure: Any, path: _Path, kind: str) -> Any:
    """The structure with this type where it has floating point in a place."""
    if isinstance(structure, list):
        return [_with_whole_numbers(item, path, kind) for item in structure]
    if isinstance(structure, dict) and path and path[0] in structure:
        return {**structure, path[0]: _with_whole_numbers(structure[path[0]], path[1:], kind)}
    return kind if structure == "DOUBLE" and not path else structure


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
