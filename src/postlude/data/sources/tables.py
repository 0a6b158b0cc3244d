"""Arrow tables as records: Parquet files by row group, and memory-mapped Arrow files by single rows.

A Parquet file is cheap to read a row group at a time and dear to read row by row. Where single rows are wanted its
rows are written once, uncompressed, into an Arrow file in the cache; the operating system holds as much of that in
memory as there is room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from postlude import storage
from postlude.data.example import Record
from postlude.data.formats.columns import read_json
from postlude.data.records import LastRead, Records, Unreadable, digest
from postlude.data.sources.cache import make_once
from postlude.errors import DataError

BATCH_ROWS = 1024
"""Rows of a batch in the Arrow files that are written here."""
_JSON = "arrow.json"


class RowGroups(Records):
    """One Parquet file; each of its row groups is a group."""

    def __init__(self, uri: str, fingerprint: str) -> None:
        with parquet_file(uri) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        super().__init__(groups, fingerprint)
        self._uri, self._starts = uri, [0, *accumulate(groups)]
        self._table = LastRead(self._read_group)

    def read(self, group: int, rows: Sequence[int] | None = None) -> list[Record | Unreadable]:
        table = self._table(group)
        return rows_of(table if rows is None else table.take(pa.array(rows, pa.int64())))

    def where(self, group: int, row: int) -> str:
        return f"{self._uri}, row {self._starts[group] + row + 1}"

    def _read_group(self, group: int) -> pa.Table:
        with parquet_file(self._uri) as file:
            table = file.read_row_group(group)
            return _as(_plain_schema(table.schema), table)


class ArrowRows(Records):
    """One Arrow file that :func:`write_arrow` wrote, as one group. ``name`` is what the user knows the rows by."""

    def __init__(self, path: str, name: str, fingerprint: str) -> None:
        self._path, self._name = path, name
        self._open()
        super().__init__([sum(batch.num_rows for batch in self._batches)], fingerprint)

    def read(self, group: int, rows: Sequence[int] | None = None) -> list[Record | Unreadable]:
        wanted = range(self.groups[0]) if rows is None else rows
        records: list[Record | Unreadable] = []
        for batch, run in groupby(wanted, key=lambda row: row // BATCH_ROWS):
            places = pa.array([row % BATCH_ROWS for row in run], pa.int64())
            records += rows_of(self._batches[batch].take(places))
        return records

    def where(self, group: int, row: int) -> str:
        return f"{self._name}, row {row + 1}"

    def _open(self) -> None:
        with pa.memory_map(self._path) as file:
            try:
                self._batches = pa.ipc.open_file(file).read_all().to_batches()
            except pa.ArrowInvalid as error:  # of an earlier version, before it had a digest
                raise DataError(f"'{self._path}' is damaged: {error}. Remove it, and it is made anew.") from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_batches"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def parquet_rows(uri: str, fingerprint: str, cache: str) -> ArrowRows:
    """A Parquet file for reading single rows."""

    def convert(path: str) -> None:
        with parquet_file(uri) as file:
            write_arrow(path, file.schema_arrow, file.iter_batches(BATCH_ROWS))

    return ArrowRows(make_once(cache, f"rows-{digest(uri, fingerprint)}.arrow", convert), uri, fingerprint)


def write_arrow(path: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write batches of whatever size as an Arrow file whose batches have :data:`BATCH_ROWS` rows, but for the last."""
    # A dictionary may not change within an Arrow file, as it does between row groups: write its values instead.
    plain = _plain_schema(schema)
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, plain) as writer:
        waiting: list[pa.RecordBatch] = []
        for batch in batches:
            waiting.append(_as(plain, batch))
            if sum(part.num_rows for part in waiting) >= BATCH_ROWS:
                table = pa.Table.from_batches(waiting).combine_chunks()
                whole = table.num_rows - table.num_rows % BATCH_ROWS
                writer.write_table(table.slice(0, whole), max_chunksize=BATCH_ROWS)
                waiting = table.slice(whole).to_batches()
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting).combine_chunks(), max_chunksize=BATCH_ROWS)


def rows_of(table: pa.Table | pa.RecordBatch) -> list[Record | Unreadable]:
    """The rows as JSON has them: what a column or a field says where it is of Arrow's type for JSON, a mapping for a
    map, a number for a decimal."""
    rows = table.to_pylist()
    readers = {field.name: reader for field in table.schema if (reader := _reader(field.type)) is not None}
    return [_read_row(row, readers) for row in rows] if readers else rows


def _read_row(row: dict[str, Any], readers: dict[str, Callable[[Any], Any]]) -> Record | Unreadable:
    for name, read in readers.items():
        try:
            row[name] = read(row[name])
        except ValueError as error:
            return Unreadable(f"the JSON of its '{name}' cannot be read: {error}")
    return row


def _reader(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What makes a value that Arrow gives one as JSON has it; None where it is that already."""
    read: Callable[[Any], Any]
    if getattr(kind, "extension_name", None) == _JSON:
        read = read_json
    elif pa.types.is_decimal(kind):
        read = float if kind.scale > 0 else int
    elif pa.types.is_map(kind):
        key, item = _reader(kind.key_type) or _same, _reader(kind.item_type) or _same

        def read(pairs: Any) -> Any:
            return {str(key(name)): item(value) for name, value in pairs}

    elif pa.types.is_struct(kind):
        fields = {field.name: reader for field in kind if (reader := _reader(field.type)) is not None}

        def read(struct: Any) -> Any:
            return {name: fields.get(name, _same)(value) for name, value in struct.items()}

        if not fields:
            return None
    elif _is_list(kind):
        each = _reader(kind.value_type)
        if each is None:
            return None

        def read(values: Any) -> Any:
            return list(map(each, values))

    else:
        return None
    return lambda value: None if value is None else read(value)


def _same(value: Any) -> Any:
    return value


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in tests)


def _as(schema: pa.Schema, rows: Any) -> Any:
    """A table or a batch with the columns of a schema."""
    columns = zip(rows.columns, schema, strict=True)
    # Arrow's cast of views of lists fails for some of them, so those are made anew of their values.
    arrays = [pa.array(c.to_pylist(), f.type) if _holds_list_view(c.type) else c.cast(f.type) for c, f in columns]
    return type(rows).from_arrays(arrays, schema=schema)


def _holds_list_view(kind: pa.DataType) -> bool:
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return True
    return any(_holds_list_view(kind.field(i).type) for i in range(kind.num_fields))


def _plain_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_type(_plain(field.type)) for field in schema])


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries and views, whose rows Arrow cannot take one by one."""
    types = pa.types
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_string_view(kind):
        return pa.large_string()
    if types.is_binary_view(kind):
        return pa.large_binary()
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    if types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if types.is_map(kind):
        return pa.map_(_plain(kind.key_type), kind.item_field.with_type(_plain(kind.item_type)))
    if types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)), kind.list_size)
    if types.is_list(kind) or types.is_large_list(kind):
        make = pa.list_ if types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_plain(kind.value_type)))
    return pa.json_() if getattr(kind, "extension_name", None) == _JSON else kind


@contextmanager
def parquet_file(uri: str) -> Iterator[pq.ParquetFile]:
    """The Parquet file behind a URI, open. DataError if it is damaged or none."""
    with storage.open_file(uri, "rb") as stream:
        try:
            yield pq.ParquetFile(stream)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            # Arrow tells damage as an error without a number; one with a number comes from the system.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(
                f"'{uri}' cannot be read as Parquet: {error}. Write it again, or check its name."
            ) from error
