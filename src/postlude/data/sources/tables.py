"""Arrow tables as records: Parquet files by row group, and memory-mapped Arrow files by single rows.

A Parquet file is cheap to read a row group at a time and dear to read row by row. Where single rows are wanted its
rows are written once, uncompressed, into an Arrow file in the cache; the operating system holds as much of that in
memory as there is room for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from postlude import storage
from postlude.data.example import Record
from postlude.data.records import LastRead, Records, Unreadable, digest
from postlude.data.sources.cache import make_once
from postlude.errors import DataError

BATCH_ROWS = 1024
"""Rows of a batch in the Arrow files that are written here."""


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
        return (table if rows is None else table.take(pa.array(rows, pa.int64()))).to_pylist()

    def where(self, group: int, row: int) -> str:
        return f"{self._uri}, row {self._starts[group] + row + 1}"

    def _read_group(self, group: int) -> pa.Table:
        with parquet_file(self._uri) as file:
            return file.read_row_group(group)


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
            records += self._batches[batch].take(places).to_pylist()
        return records

    def where(self, group: int, row: int) -> str:
        return f"{self._name}, row {row + 1}"

    def _open(self) -> None:
        with pa.memory_map(self._path) as file:
            self._batches = pa.ipc.open_file(file).read_all().to_batches()

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
    plain = pa.schema([field.with_type(_without_dictionary(field.type)) for field in schema])
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, plain) as writer:
        waiting: list[pa.RecordBatch] = []
        for batch in batches:
            waiting.append(batch.cast(plain))
            if sum(part.num_rows for part in waiting) >= BATCH_ROWS:
                table = pa.Table.from_batches(waiting).combine_chunks()
                whole = table.num_rows - table.num_rows % BATCH_ROWS
                writer.write_table(table.slice(0, whole), max_chunksize=BATCH_ROWS)
                waiting = table.slice(whole).to_batches()
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting).combine_chunks(), max_chunksize=BATCH_ROWS)


def _without_dictionary(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


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
