"""Measure the data before anything is trained: read every source once, or a sample of it, then pack what was found.

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
    sample: int | None = None,
) -> Statistics:
    """Read each source in the order of its first epoch, to its end or only ``sample`` records of it, and pack.

    What the sources have counted before is counted with it. DataError where there is nothing to train on.
    """
    reader = WindowReader(sources, weights, seed=seed, block=block, window=window)
    known = {name: _Measured(source, _lengths(reader, name, sample)) for name, source in sources.items()}
    if not any(source.statistics.units for source in sources.values()):
        raise reader.nothing_to_train_on()
    sampled = sample is not None and any(rows > sample for rows in reader.rows.values())
    tokens = blocks = draws = 0
    for packed in WindowReader(known, weights, seed=seed, block=block, window=window).windows(reader.start, 1):
        tokens += sum(len(unit) for filled in packed.blocks for unit in filled)
        blocks, draws = blocks + len(packed.blocks), packed.end.draws
        if sampled and packed.end.window == _ENOUGH_WINDOWS:
            break
    per_epoch = reader.mixture.epoch_end(0)
    return Statistics(
        sources={name: sources[name].statistics for name in sorted(sources)},
        repeats=reader.mixture.repeats(),
        block=block,
        records_per_epoch=per_epoch,
        tokens_per_epoch=round(tokens * per_epoch / draws),
        blocks_per_epoch=round(blocks * per_epoch / draws),
        fill=tokens / (blocks * block),
        sampled=sampled,
    )


def _lengths(reader: WindowReader, name: str, sample: int | None) -> list[tuple[int, ...]]:
    """The lengths of the units of each row that was read, in the order of the rows."""
    rows = reader.rows[name]
    asked = rows if sample is None else min(sample, rows)
    found: list[tuple[int, int, tuple[int, ...]]] = []
    seen: dict[tuple[int, ...], tuple[int, ...]] = {}
    for start in range(0, asked, _CHUNK):
        for group, positions, units in reader.read(name, start, min(_CHUNK, asked - start)):
            for position, several in zip(positions, units, strict=True):
                lengths = tuple(len(unit) for unit in several)
                found.append((group, position, seen.setdefault(lengths, lengths)))
    return [lengths for _, _, lengths in sorted(found)]


@dataclass(frozen=True)
class _Length(Unit):
    """A unit of which only the length is known."""

    tokens: int = 0

    def __len__(self) -> int:
        return self.tokens


class _Measured:
    """A source that gives back the lengths measured in another: of every row, or of a sample over and over."""

    def __init__(self, source: UnitSource, lengths: Sequence[tuple[int, ...]]) -> None:
        self.groups, self.files, self.seekable = source.groups, source.files, source.seekable
        self.statistics = source.statistics
        self._lengths = lengths
        self._starts = [0, *accumulate(source.groups)]

    def units(self, group: int, positions: Sequence[int]) -> list[tuple[Unit, ...]]:
        rows = (self._starts[group] + position for position in positions)
        return [tuple(_Length((), tokens=n) for n in self._lengths[row % len(self._lengths)]) for row in rows]
