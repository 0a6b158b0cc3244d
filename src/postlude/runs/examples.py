"""Per-example losses as Parquet parts, each written whole: ``examples/part-FIRSTSTEP-RANK.parquet``.

A part ends with a step, so that its name tells where it begins and a cut keeps whole steps. Ranks write their own
parts. pyarrow is imported when the first part is written or read.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from postlude import storage

if TYPE_CHECKING:
    import pyarrow

ROWS_OF_A_PART = 2**16

_PART = re.compile(r"part-(\d+)-(\d+)\.parquet")


class ExamplesWriter:
    """Collects the losses that one rank measures, and writes them in parts."""

    def __init__(self, uri: str, rank: int = 0) -> None:
        self._uri, self._rank = uri, rank
        self._steps: list[tuple[int, int, Sequence[tuple[str, str, float, int]]]] = []
        self._rows = 0

    def write(self, step: int, epoch: int, rows: Sequence[tuple[str, str, float, int]]) -> None:
        """Add the examples of one step: (example id, source, summed loss, tokens it runs over) each."""
        if self._rows >= ROWS_OF_A_PART and step != self._steps[-1][0]:
            self.flush()
        if rows:
            self._steps.append((step, epoch, rows))
            self._rows += len(rows)

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
    """All parts as one table, ordered by step and then by rank; empty if there are none."""
    import pyarrow as pa

    tables = []
    for name in _parts(uri):
        try:
            tables.append(_read(storage.join(uri, name)))
        except storage.NotFound:  # cut away since it was listed
            continue
    return pa.concat_tables([_schema().empty_table(), *tables]).sort_by("step")  # a stable sort


def cut_back(uri: str, step: int) -> None:
    """Remove the rows of later steps, the last part first."""
    import pyarrow.compute as pc

    for name, first_step in reversed(_parts(uri).items()):
        part = storage.join(uri, name)
        if first_step > step:
            storage.remove(part)
            continue
        table = _read(part)
        kept = table.filter(pc.less_equal(table["step"], step))
        if len(kept) < len(table):
            _write(part, kept)


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
    pq.write_table(table, part, compression="zstd")
    storage.write_bytes(uri, part.getvalue())


def _read(uri: str) -> pyarrow.Table:
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(storage.read_bytes(uri)), schema=_schema())
