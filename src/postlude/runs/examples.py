"""Per-example losses as Parquet parts, each written whole: ``examples/part-FIRSTSTEP-RANK.parquet``.

A part ends with a step, so that its name tells where it begins and a cut keeps whole steps. Ranks write their own
parts, one at each checkpoint, and merge small ones as they add up: ``part-FIRSTSTEP-RANK-LASTSTEP.parquet`` stands for
all that begin within its steps, which are removed when it is there. A part has the digest of its rows among its
metadata; one that is damaged is set aside. pyarrow is imported when the first part is written or read.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from typing import TYPE_CHECKING

from postlude import storage
from postlude.runs.arrays import joined_texts, numbers
from postlude.runs.schemas import ExampleRow

if TYPE_CHECKING:
    import pyarrow

ROWS_OF_A_PART = 2**16

MOST_SMALL_PARTS = 16
"""So many of a rank are merged, with the merged one before them, until that has as many rows as a part may have."""
MOST_AT_ONCE = 64
"""Of a run with many, as an earlier version left it, so many are merged at a time."""
_ATTEMPTS = 10

_DIGEST, _VERSION = b"postlude.sha256", b"postlude.schema"
_SET_ASIDE = "A run that goes on keeps it beside, and tells what is missing."

_PART = re.compile(r"part-(\d+)-(\d+)(?:-(\d+))?\.parquet")


@dataclass(frozen=True, order=True)
class _Part:
    """A part by its name, in the order of ranks and steps; of two that begin alike the one that holds more is first."""

    rank: int
    first_step: int
    fewer: int
    """Minus the last step of a merged part; 0 for one that was not merged."""
    name: str

    @property
    def last_step(self) -> int | None:
        """Of a merged part; of another it is not known."""
        return -self.fewer if self.fewer else None

    @staticmethod
    def called(rank: int, first_step: int, last_step: int | None = None) -> _Part:
        last = "" if last_step is None else f"-{last_step:08d}"
        return _Part(rank, first_step, -(last_step or 0), f"part-{first_step:08d}-{rank:04d}{last}.parquet")


class ExamplesWriter:
    """Collects the losses that one rank measures, and writes them in parts."""

    def __init__(self, uri: str, rank: int = 0) -> None:
        self._uri, self._rank = uri, rank
        self._steps: list[tuple[int, int, Sequence[tuple[str, str, float, int]]]] = []
        self._rows = 0
        self.told = 0
        """Rows in this life."""
        self._whole: set[str] = set()
        """Names of parts that are as large as one may be, and of such as are damaged, which a resume looks after."""

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
        _write(self._uri, _Part.called(self._rank, self._steps[0][0]), table)
        self._steps, self._rows = [], 0
        self._merge()

    def _merge(self) -> None:
        """Make one part of many small ones that follow one another."""
        own = [part for part in _parts(self._uri)[0] if part.rank == self._rank]
        small = list(takewhile(self._is_small, dropwhile(lambda part: not self._is_small(part), own)))
        if len(small) < MOST_SMALL_PARTS:
            return
        merged: list[_Part] = []
        tables: list[pyarrow.Table] = []
        for part in [*own[: own.index(small[0])][-1:], *small[:MOST_AT_ONCE]]:
            table = None if part.name in self._whole else _read_or_none(self._uri, part)
            if table is None or len(table) >= ROWS_OF_A_PART:
                self._whole.add(part.name)
                if merged:
                    break
                continue
            merged.append(part)
            tables.append(table)
            if sum(map(len, tables)) >= ROWS_OF_A_PART:
                break
        if len(merged) > 1:
            _replace(self._uri, merged, tables)

    def _is_small(self, part: _Part) -> bool:
        return part.last_step is None and part.name not in self._whole


def read_examples(uri: str) -> pyarrow.Table:
    """All parts as one table, ordered by step and then by rank; empty if there are none. CorruptError names a part that
    is damaged."""
    import pyarrow as pa

    for attempt in range(_ATTEMPTS):
        parts, _ = _parts(uri)
        try:
            tables = [_read(uri, part) for part in parts]
        except storage.NotFound:  # merged, or cut away, since it was listed
            if attempt + 1 == _ATTEMPTS:
                raise
            continue
        break
    return pa.concat_tables([_schema().empty_table(), *tables]).sort_by("step")  # a stable sort


def standing(uri: str) -> dict[str, str]:
    """The parts that stand, rank by rank in the order of steps, each with a text that changes with what it holds."""
    names = [part.name for part in _parts(uri)[0]]
    if storage.is_local(uri):
        return {name: stamp for name in names if (stamp := _stamp(storage.join(uri, name)))}
    stamps = storage.modified_fingerprints(uri)
    return {name: stamps[name] for name in names if name in stamps}


def _stamp(place: str) -> str | None:
    try:
        return storage.modified_fingerprint(place)
    except storage.NotFound:  # merged, or cut away, since it was listed
        return None


def read_part(uri: str, name: str) -> pyarrow.Table:
    """The losses of one part. CorruptError if it is damaged, NotFound if it was merged or cut away."""
    match = _PART.fullmatch(name)
    if match is None:
        raise ValueError(f"'{name}' is no name of a part.")
    return _read(uri, _Part(int(match[2]), int(match[1]), -int(match[3] or 0), name))


def cut_back(uri: str, step: int) -> tuple[int, list[str]]:
    """Remove the rows of later steps, the last part first. How many rows are left, and what of them was damaged."""
    import pyarrow.compute as pc

    left, damages = 0, []
    parts, superseded = _parts(uri)
    for part in [*superseded, *[part for part in reversed(parts) if part.first_step > step]]:
        storage.remove(storage.join(uri, part.name))
    for part in [part for part in reversed(parts) if part.first_step <= step]:
        try:
            table = _read(uri, part)
        except storage.CorruptError as error:
            storage.set_aside(storage.join(uri, part.name))
            damages.append(str(error))
            continue
        kept = table.filter(pc.less_equal(table["step"], step))
        if len(kept) < len(table):
            _replace(uri, [part], [kept])
        left += len(kept)
    return left, damages


def count(uri: str, deep: bool = False) -> tuple[int, list[str]]:
    """How many rows there are in the parts that can be read, and what is wrong with the others. ``deep``: all of each
    part is read, not only what it says of itself."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, damages = 0, []
    for part in _parts(uri)[0]:
        try:
            if deep:
                rows += len(_read(uri, part))
            else:
                with storage.open_file(storage.join(uri, part.name)) as file:
                    rows += pq.read_metadata(file).num_rows
        except (storage.CorruptError, pa.ArrowException, OSError) as error:
            damages.append(str(error))
    return rows, damages


def _parts(uri: str) -> tuple[list[_Part], list[_Part]]:
    """The parts, rank by rank, each in the order of steps; and those that a merged one stands for."""
    matches = filter(None, map(_PART.fullmatch, storage.list_directory(uri)))
    parts, kept, superseded = list[_Part](), list[_Part](), list[_Part]()
    reached: dict[int, int] = {}
    for match in matches:
        parts.append(_Part(int(match[2]), int(match[1]), -int(match[3] or 0), match[0]))
    for part in sorted(parts):
        is_held = part.first_step <= reached.get(part.rank, 0)
        (superseded if is_held else kept).append(part)
        reached[part.rank] = max(reached.get(part.rank, 0), part.last_step or part.first_step)
    return kept, superseded


def _replace(uri: str, parts: Sequence[_Part], tables: Sequence[pyarrow.Table]) -> None:
    """Have one part with these rows, which are those of several parts that follow one another, or some of them."""
    import pyarrow as pa

    table = pa.concat_tables(tables)
    merged = len(parts) > 1 or parts[0].last_step is not None
    new = _Part.called(parts[0].rank, parts[0].first_step, table["step"][-1].as_py() if merged else None)
    _write(uri, new, table)
    for part in parts:
        if part.name != new.name:
            storage.remove(storage.join(uri, part.name))


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


def _write(uri: str, part: _Part, table: pyarrow.Table) -> None:
    import pyarrow.parquet as pq

    content = io.BytesIO()
    metadata = {_DIGEST: _digest(table)} | ({_VERSION: str(ExampleRow.version)} if ExampleRow.version > 1 else {})
    pq.write_table(table.replace_schema_metadata(metadata), content, compression="zstd")
    storage.write_bytes(storage.join(uri, part.name), content.getvalue())


def _read_or_none(uri: str, part: _Part) -> pyarrow.Table | None:
    """A part; None for one that is damaged."""
    try:
        return _read(uri, part)
    except storage.CorruptError:
        return None


def _read(uri: str, part: _Part) -> pyarrow.Table:
    """A part. CorruptError if it is not what was written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = storage.join(uri, part.name)
    content = storage.read_bytes(place)
    try:
        # Not as a data set: that has threads, and a process may fork after it has read this.
        table = pq.ParquetFile(io.BytesIO(content)).read(use_threads=False)
        metadata = table.schema.metadata or {}
        ExampleRow.check_version(int(metadata.get(_VERSION, 1)), f"'{place}'")
        digest = metadata.get(_DIGEST)
        table = table.select(_schema().names).cast(_schema())
        if digest is not None and digest != _digest(table):
            raise storage.damaged(place, "its digest does not fit its content", _SET_ASIDE)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise storage.damaged(place, f"it cannot be read ({error})", _SET_ASIDE) from error
    return table


def _digest(table: pyarrow.Table) -> bytes:
    """SHA-256 of the rows, hexadecimal, whichever way they are laid out."""
    import pyarrow.compute as pc

    sha256 = hashlib.sha256()
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name in ("example_id", "source"):
            sha256.update(numbers(pc.binary_length(column)).tobytes())
            sha256.update(joined_texts(column))
        else:
            sha256.update(numbers(column).tobytes())
    return sha256.hexdigest().encode()
