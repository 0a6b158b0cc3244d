"""The metrics of a stage as numpy columns, kept up while it runs, and curves of them for so many pixels.

A line of metrics is a row; a column holds what is told of one name, at whichever steps it is. Where a resume has gone
back and a step is told twice, the newer line stands, and of the older ones none that is at its step or behind it. Many
lines at once are read by pyarrow. It takes no text among numbers: such a block, and few lines, are read as any journal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from postlude.runs.arrays import numbers
from postlude.storage import Journal, Part, Reader, exact_json
from postlude.storage.schema import KEY

if TYPE_CHECKING:
    import pyarrow

BLOCK_ROWS = 2**16
"""Blocks are merged until they have so many rows."""
_FEW_BYTES = 2**16
"""So little is not worth the import of pyarrow."""


@dataclass(frozen=True)
class Curve:
    """What is drawn of a metric: of each pixel column the least and the greatest value, each at its own step."""

    steps: np.ndarray
    """Rising, int64."""
    values: np.ndarray
    """Finite, float64: exactly what was told."""
    not_finite: np.ndarray
    """The first step of each pixel column whose value is not finite."""


def thin(steps: np.ndarray, values: np.ndarray, width: int, first: int, last: int) -> Curve:
    """A curve in ``width`` pixel columns, from the step ``first`` to ``last``. ``steps`` rise. ValueError where there
    is no column."""
    if width < 1:
        raise ValueError(f"A curve needs a column to stand in, not {width}.")
    shown = slice(*np.searchsorted(steps, [first, last + 1]))
    steps, values = steps[shown], values[shown]
    edges = first - (-np.arange(width, dtype=np.int64) * (last + 1 - first) // width)
    begins = np.searchsorted(steps, edges)  # of each column, where it has a step
    finite = np.isfinite(values)
    odd = np.flatnonzero(~finite)
    found, told = (np.flatnonzero(finite), values[finite]) if len(odd) else (None, values)
    starts = _firsts(found, begins, len(told))
    chosen = [
        start + getattr(told[start:end], extreme)()
        for start, end in zip(starts, [*starts[1:], len(told)], strict=False)
        for extreme in ("argmin", "argmax")
    ]
    kept = np.unique(np.array(chosen, np.int64))
    kept = kept if found is None else found[kept]
    return Curve(steps[kept], values[kept], steps[odd[_firsts(odd, begins, len(odd))]])


def _firsts(places: np.ndarray | None, begins: np.ndarray, count: int) -> list[int]:
    """Which of ``count`` places, None for all, are the first of their column."""
    firsts = np.unique(begins if places is None else np.searchsorted(places, begins))
    return firsts[firsts < count].tolist()


@dataclass(frozen=True)
class _Column:
    """The values of one name in some rows."""

    values: np.ndarray
    """float32 where that is exact, else float64; anything where nothing is told."""
    told: np.ndarray | None
    """In which rows it is; None for all."""

    @classmethod
    def of(cls, values: np.ndarray, told: np.ndarray | None) -> _Column:
        with np.errstate(over="ignore"):
            short = values.astype(np.float32)
        exact = np.array_equal(short, values, equal_nan=True)
        return cls(short if exact else values, None if told is None or told.all() else told)

    def cut(self, rows: int) -> _Column:
        return _Column(self.values[:rows], None if self.told is None else self.told[:rows])


@dataclass(frozen=True)
class _Block:
    """Some lines that follow one another."""

    steps: np.ndarray
    columns: Mapping[str, _Column]

    def cut(self, rows: int) -> _Block:
        return _Block(self.steps[:rows], {name: column.cut(rows) for name, column in self.columns.items()})

    def joined(self, later: _Block) -> _Block:
        blocks = (self, later)
        columns = {}
        for name in dict.fromkeys([*self.columns, *later.columns]):
            parts, told = [], []
            for block in blocks:
                rows = len(block.steps)
                column = block.columns.get(name) or _Column(np.zeros(rows, np.float32), np.zeros(rows, bool))
                parts.append(column.values)
                told.append(np.ones(rows, bool) if column.told is None else column.told)
            columns[name] = _Column.of(np.concatenate(parts), np.concatenate(told))
        return _Block(np.concatenate([block.steps for block in blocks]), columns)


class Columns:
    """The metrics of a stage. Errors of reading are those of :class:`~postlude.storage.Journal`."""

    def __init__(self, metrics: Journal) -> None:
        self._reader = Reader(metrics)
        self._blocks: list[_Block] = []
        self._stands: np.ndarray | None = None
        """Which rows stand; None for all."""

    def update(self) -> bool:
        """Read what came since the last call. Whether anything did. An error leaves what stands before the fault."""
        changed = False
        try:
            for part in self._reader.parts():
                changed = True
                self._cut(part.first)
                if part.content:
                    self._blocks.append(_read(self._reader.journal, part))
                    self._merge()
        finally:
            if changed:
                self._stands = _standing(self._all_steps())
        return changed

    @property
    def names(self) -> list[str]:
        """The metrics that are told, in the order of their coming."""
        return list(dict.fromkeys(name for block in self._blocks for name in block.columns))

    @property
    def steps(self) -> np.ndarray:
        """The steps, rising, int64."""
        steps = self._all_steps()
        return steps if self._stands is None else steps[self._stands]

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps at which a metric is told, and its values, float64. Truth is 1, untruth 0."""
        steps, values, row = [np.zeros(0, np.int64)], [np.zeros(0)], 0
        for block in self._blocks:
            end = row + len(block.steps)
            if (column := block.columns.get(name)) is not None:
                stands = None if self._stands is None else self._stands[row:end]
                told = column.told if stands is None else stands if column.told is None else column.told & stands
                steps.append(block.steps if told is None else block.steps[told])
                values.append(column.values if told is None else column.values[told])
            row = end
        return np.concatenate(steps), np.concatenate(values, dtype=np.float64)

    def curve(self, name: str, width: int, first: int | None = None, last: int | None = None) -> Curve:
        """A metric in so many pixel columns, of all steps that there are or from ``first`` to ``last``."""
        steps, values = self.column(name)
        every = self.steps if first is None or last is None else steps
        ends = every[[0, -1]].tolist() if len(every) else [0, 0]
        return thin(steps, values, width, ends[0] if first is None else first, ends[1] if last is None else last)

    def _all_steps(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(block.steps for block in self._blocks)])

    def _cut(self, rows: int) -> None:
        """Drop what stands behind so many rows."""
        left = sum(len(block.steps) for block in self._blocks)
        while self._blocks and left > rows:
            block = self._blocks.pop()
            left -= len(block.steps)
            if left < rows:
                self._blocks.append(block.cut(rows - left))
                return

    def _merge(self) -> None:
        """Join the last blocks while they are alike in size, so that a row is moved but a few times."""
        while len(self._blocks) > 1:
            *_, before, last = self._blocks
            rows = len(last.steps)
            if len(before.steps) > 2 * rows or len(before.steps) + rows > BLOCK_ROWS:
                return
            self._blocks[-2:] = [before.joined(last)]


def _standing(steps: np.ndarray) -> np.ndarray | None:
    """Which rows have no later one of the same or an earlier step; None where all are so."""
    if np.all(np.diff(steps) > 0):
        return None
    least_behind = np.minimum.accumulate(steps[:0:-1])[::-1]
    return np.append(steps[:-1] < least_behind, True)


# --- reading ------------------------------------------------------------------------------------------------


def _read(journal: Journal, part: Part) -> _Block:
    """Lines of metrics as columns."""
    table = _table(journal, part.content) if len(part.content) > _FEW_BYTES else None
    if table is not None:
        columns = {name: _from_arrow(table[name]) for name in table.column_names if name not in ("step", KEY)}
        return _Block(numbers(table["step"]), {name: column for name, column in columns.items() if column})
    lines = journal.entries(part.place, part.number, part.content)
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    columns = {name: _from_values([line.get(name) for line in lines]) for name in names}
    steps = np.array([line["step"] for line in lines], np.int64)
    return _Block(steps, {name: column for name, column in columns.items() if column})


def _table(journal: Journal, content: bytes) -> pyarrow.Table | None:
    """Lines as a table; None where they are not of one form, or not what they must be: then it is found out line by
    line what they are."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.json as pj

    try:
        table = pj.read_json(pa.BufferReader(content), pj.ReadOptions(use_threads=False, block_size=len(content) + 1))
    except pa.ArrowInvalid:
        return None
    if table.num_rows != content.count(b"\n") or "step" not in table.column_names:
        return None
    if table.schema.field("step").type != pa.int64() or table["step"].null_count:
        return None
    if KEY in table.column_names:
        versions = table[KEY]
        if versions.type != pa.int64() or pc.max(versions).as_py() > journal.schema.version:
            return None
    return table


def _from_arrow(column: pyarrow.ChunkedArray) -> _Column | None:
    """A column of a table; None for one without a number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(column.type):  # a text, or in no line a finite number
        return _from_values([exact_json.special(value) for value in column.to_pylist()])
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)):
        return None
    told = None if column.null_count == 0 else numbers(pc.is_valid(column)).astype(bool)
    return _Column.of(numbers(column).astype(np.float64), told)


def _from_values(values: Sequence[Any]) -> _Column | None:
    """What lines tell of one name; None if that is no number in any."""
    told = np.array([isinstance(value, int | float) for value in values], bool)
    numbers = [float(value) if is_told else 0.0 for value, is_told in zip(values, told, strict=True)]
    return _Column.of(np.array(numbers), told) if told.any() else None
