"""Measure the data before anything is trained: read every source once, then pack what was found.

The lengths that were read are packed by the loader's own windows, so the fill is that of the run, and an epoch that
takes a small source several times is counted in full while each record is read once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from postlude.data.document import Unit
from postlude.data.statistics import Statistics
from postlude.data.windows import UnitSource, WindowReader

_CHUNK = 256
"""Draws that are read together."""
_ENOUGH_WINDOWS = 8
"""So many windows are packed to estimate the fill from a sample."""


def measure(
    sources: Mapping[str, UnitSource],
    weights: Mapping[str, float],
    *,
    seed: int,
    block: int,
    window: int,
    rows: Mapping[str, int] | None = None,
) -> Statistics:
    """Read each source in the order of its first epoch, and pack an epoch.

    ``rows`` says how many rows a source has where what is first_reader here is a sample of them. What the sources have
    counted before is counted with it. DataError where there is nothing to train on.
    """
    first_reader = WindowReader(sources, weights, seed=seed, block=block, window=window)
    in_all = {**first_reader.rows, **(rows or {})}
    sampled = in_all != first_reader.rows
    known = {
        name: _KnownLengths(source, _lengths(first_reader, name), in_all[name]) for name, source in sources.items()
    }
    if not any(source.statistics.units for source in sources.values()):
        raise first_reader.nothing_to_train_on()
    reader = WindowReader(known, weights, seed=seed, block=block, window=window)
    tokens = blocks = draws = 0
    for packed in reader.windows(reader.start, 1):
        tokens += sum(len(unit) for filled in packed.blocks for unit in filled)
        blocks, draws = blocks + len(packed.blocks), packed.end.draws
        if sampled and packed.end.window == _ENOUGH_WINDOWS:
            break
    per_epoch, fill = reader.mixture.epoch_end(0), tokens / (blocks * block)
    if draws < per_epoch:
        drawn = reader.mixture.counts(0, per_epoch)
        tokens = round(sum(count * known[name].mean_tokens for name, count in drawn.items()))
        blocks = round(tokens / (fill * block))
    return Statistics(
        sources={name: sources[name].statistics for name in sorted(sources)},
        repeats=reader.mixture.repeats(),
        block=block,
        records_per_epoch=per_epoch,
        tokens_per_epoch=tokens,
        blocks_per_epoch=blocks,
        fill=fill,
        sampled=sampled,
    )


def _lengths(reader: WindowReader, name: str) -> list[tuple[int, ...]]:
    """The lengths of the units of each row, in the order of the rows."""
    rows = reader.rows[name]
    in_order: list[tuple[int, int, tuple[int, ...]]] = []
    seen: dict[tuple[int, ...], tuple[int, ...]] = {}
    for start in range(0, rows, _CHUNK):
        for group, positions, units in reader.read(name, start, min(_CHUNK, rows - start)):
            for position, several in zip(positions, units, strict=True):
                lengths = tuple(len(unit) for unit in several)
                in_order.append((group, position, seen.setdefault(lengths, lengths)))
    return [lengths for _, _, lengths in sorted(in_order)]


@dataclass(frozen=True)
class _Length(Unit):
    """A unit of which only the length is known."""

    tokens: int = 0

    def __len__(self) -> int:
        return self.tokens


class _KnownLengths:
    """A source of so many rows that gives back the lengths measured in another, over and over where that has fewer."""

    groups: Sequence[int]
    files: Sequence[Sequence[int]]

    def __init__(self, source: UnitSource, lengths: Sequence[tuple[int, ...]], rows: int) -> None:
        is_whole = rows == len(lengths)
        self.groups, self.files = (source.groups, source.files) if is_whole else ([rows], [[0]])
        self.seekable = source.seekable or not is_whole
        self.statistics = source.statistics
        self._lengths = lengths
        self._starts = [0, *accumulate(self.groups)]
        self.mean_tokens: float = sum(map(sum, lengths)) / len(lengths)
        """Of a row."""

    def units(self, group: int, positions: Sequence[int]) -> list[tuple[Unit, ...]]:
        rows = (self._starts[group] + position for position in positions)
        return [tuple(_Length((), tokens=n) for n in self._lengths[row % len(self._lengths)]) for row in rows]
