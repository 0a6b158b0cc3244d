"""Per-example losses as Parquet parts, each written whole: ``examples/part-FIRSTSTEP-RANK.parquet``.

A part ends with a step, so that its name tells where it begins and a cut keeps whole steps. Ranks write their own
parts. A part has the digest of its rows among its metadata; one that is damaged is set aside. pyarrow is imported when
the first part is written or read.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from postlude import storage

if TYPE_CHECKING:
    import pyarrow

ROWS_OF_A_PART = 2**16

_DIGEST = b"postlude.sha256"
_SET_ASIDE = "A run that goes on keeps it beside, and tells what is missing."
_PART = re.compile(r"part-(\d+)-(\d+)\.parquet")


class ExamplesWriter:
    """Collects the losses that one rank measures, and writes them in parts."""

    def __init__(self, uri: str, rank: int = 0) -> None:
        self._uri, self._rank = uri, rank
        self._steps: list[tuple[int, int, Sequence[tuple[str, str, float, int]]]] = []
        self._rows = 0
        self.told = 0
        """Rows in this life."""

    def write(self, step: int, epoch: int, rows: Sequence[tuple[str, str, float, int]]) -> None:
        """Add the examples of one step: (example id, source, summed loss, tokens it runs over) each."""
        if self._rows >= ROWS_OF_A_PART and step != self._steps[-1][0]:
            self.flush()
        if rows:
            self._steps.append((step, epoch, rows))
            self._rows += len(rows)
            self.told += len(rows)

    def flush(self) -> None:
        """Close the part: what was added is durable, and readers see it. Called at each checkpoint."""
        if not self._steps:
            return
        import pyarrow as pa

        rows = [(step, epoch, *row) for step, epoch, step_rows in self._steps for row in step_rows]
        table = pa.table(list(map(list, zip(*rows, strict=True))), schema=_schema())
        name = f"part-{self._steps[0][0]:08d}-{self._rank:04d}.parquet"
        _write(storage.join(self._uri, name), table)
        self._steps, self._rows = [], 0


def read_examples(uri: str) -> pyarrow.Table:
    """All parts as one table, ordered by step and then by rank; empty if there are none. CorruptError names a part that
    is damaged."""
    import pyarrow as pa

    tables = []
    for name in _parts(uri):
        try:
            tables.append(_read(storage.join(uri, name)))
        except storage.NotFound:  # cut away since it was listed
            continue
    return pa.concat_tables([_schema().empty_table(), *tables]).sort_by("step")  # a stable sort


def cut_back(uri: str, step: int) -> tuple[int, list[str]]:
    """Remove the rows of later steps, the last part first. How many rows are left, and what of them was damaged."""
    import pyarrow.compute as pc

    left, damages = 0, []
    for name, first_step in reversed(_parts(uri).items()):
        part = storage.join(uri, name)
        if first_step > step:
            storage.remove(part)
            continue
        try:
            table = _read(part)
        except storage.CorruptError as error:
            storage.set_aside(part)
            damages.append(str(error))
            continue
        kept = table.filter(pc.less_equal(table["step"], step))
        if len(kept) < len(table):
            _write(part, kept)
        left += len(kept)
    return left, damages


def count(uri: str, deep: bool = False) -> tuple[int, list[str]]:
    """How many rows there are in the parts that can be read, and what is wrong with the others. ``deep``: all of each
    part is read, not only what it says of itself."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, damages = 0, []
    for name in _parts(uri):
        try:
            if deep:
                rows += len(_read(storage.join(uri, name)))
            else:
                with storage.open_file(storage.join(uri, name)) as file:
                    rows += pq.read_metadata(file).num_rows
        except (storage.CorruptError, pa.ArrowException, OSError) as error:
            damages.append(str(error))
    return rows, damages


def _parts(uri: str) -> dict[str, int]:
    """The names of the parts with their first steps, rank by rank."""
    matches = filter(None, map(_PART.fullmatch, storage.list_directory(uri)))
    return {match[0]: int(match[1]) for match in sorted(matches, key=lambda match: (match[2], match[1]))}


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    return pa.schema(
        {
            "step": pa.int64(),
            "epoch": pa.int64(),
            "example_id": pa.string(),
            "source": pa.string(),
            "loss": pa.float64(),
            "tokens": pa.int64(),
        }
    )


def _write(uri: str, table: pyarrow.Table) -> None:
    import pyarrow.parquet as pq

    part = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_DIGEST: _digest(table)}), part, compression="zstd")
    storage.write_bytes(uri, part.getvalue())


def _read(uri: str) -> pyarrow.Table:
    """A part. CorruptError if it is not what was written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = storage.read_bytes(uri)
    try:
        table = pq.read_table(io.BytesIO(content))
        digest = (table.schema.metadata or {}).get(_DIGEST)
        table = table.select(_schema().names).cast(_schema())
        if digest is not None and digest != _digest(table):
            raise storage.damaged(uri, "its digest does not fit its content", _SET_ASIDE)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise storage.damaged(uri, f"it cannot be read ({error})", _SET_ASIDE) from error
    return table


def _digest(table: pyarrow.Table) -> bytes:
    """SHA-256 of the rows, hexadecimal, whichever way they are laid out."""
    import pyarrow.compute as pc

    sha256 = hashlib.sha256()
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name in ("example_id", "source"):
            sha256.update(pc.binary_length(column).to_numpy(zero_copy_only=False).tobytes())
            sha256.update("".join(column.to_pylist()).encode())
        else:
            sha256.update(column.to_numpy(zero_copy_only=False).tobytes())
    return sha256.hexdigest().encode()
