"""Closed windows of the data order: draws become units, units become packed blocks.

A window is a pure function of where it begins, so it can be made again by any process at any time. Windows never
cross the end of an epoch, nor a draw at which the weights of the mixture change, and none is empty: draws that yield
nothing belong to the window before them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from postlude.data.document import Block, Unit
from postlude.data.mixture import Mixture
from postlude.data.order import SourceOrder, permutation
from postlude.data.packing import close_window
from postlude.data.statistics import SourceStatistics
from postlude.errors import DataError

_CHUNK = range(16, 1025)
"""How many draws are asked for together, at least and at most."""


class UnitSource(Protocol):
    """What the loader draws from: rows in groups in files, each of which yields the units of one record."""

    @property
    def groups(self) -> Sequence[int]:
        """The rows of each group."""

    @property
    def files(self) -> Sequence[Sequence[int]]:
        """The groups of each file."""

    @property
    def seekable(self) -> bool:
        """Whether the groups of a file can be taken in any order."""

    @property
    def statistics(self) -> SourceStatistics:
        """What the source has yielded so far, and what it dropped for which reason."""

    def units(self, group: int, positions: Sequence[int]) -> list[tuple[Unit, ...]]:
        """The units of these rows of a group: one tuple for each position, empty where the record was dropped."""


@dataclass(frozen=True)
class Cursor:
    """A place in the data order where a window begins."""

    sources: Mapping[str, int]
    """Draws made from each source."""
    draws: int = 0
    epoch: int = 0
    window: int = 0


@dataclass(frozen=True)
class Window:
    """Packed blocks, from one place in the data order to another."""

    start: Cursor
    end: Cursor
    blocks: list[Block]


class WindowReader:
    """Reads the windows of a mixture of sources, of ``window`` blocks of ``block`` tokens each.

    DataError for a source without rows.
    """

    def __init__(
        self,
        sources: Mapping[str, UnitSource],
        weights: Mapping[str, float],
        *,
        seed: int,
        block: int,
        window: int,
    ) -> None:
        self.rows = {name: sum(source.groups) for name, source in sources.items()}
        for name, rows in self.rows.items():
            if not rows:
                raise DataError(f"The data set '{name}' has no records to train on. Look at its source and filters.")
        self._sources, self._seed, self._block, self._window = sources, seed, block, window
        self.mixture = Mixture(seed, self.rows, weights)
        self.orders = {
            name: SourceOrder(seed, name, source.groups, source.files, source.seekable)
            for name, source in sources.items()
        }
        self.start = Cursor(dict.fromkeys(self.mixture.names, 0))
        self.stopped = threading.Event()
        """Set by another thread to end the reading at the next chance."""
        self._draws_read, self._tokens_read = 0, 0

    def windows(self, cursor: Cursor, epochs: int | None = None) -> Iterator[Window]:
        """The windows from a place on, until so many epochs are over, or for ever.

        DataError if an epoch yields no unit. ValueError if a unit does not fit into a block.
        """
        while cursor.epoch != epochs:
            end = self.mixture.epoch_end(cursor.epoch, cursor.draws, cursor.sources[self.mixture.leader])
            change = self.mixture.next_change(cursor.draws)
            for window in self._until(end if change is None else min(end, change), cursor, end):
                cursor = window.end
                yield window
            if self.stopped.is_set():
                return

    def _until(self, end: int, cursor: Cursor, epoch_end: int) -> Iterator[Window]:
        """The windows up to a draw, at which the epoch may end."""
        room = self._window * self._block
        read, cursors = cursor.draws, dict(cursor.sources)
        drawn: list[tuple[int, tuple[Unit, ...]]] = []
        """Draws that are read and not in a window yet: those that yielded units, under their number."""
        tokens = 0
        while cursor.draws < end:
            # One draw more than fits has to be known, to tell which one the next window begins with.
            while read < end and (tokens <= room or len(drawn) < 2):
                if self.stopped.is_set():
                    return
                count = min(self._chunk(room - tokens), end - read)
                new = [(read + i, units) for i, units in enumerate(self._draw(read, count, cursors)) if units]
                size = sum(len(unit) for _, units in new for unit in units)
                drawn += new
                tokens, read = tokens + size, read + count
                self._draws_read, self._tokens_read = self._draws_read + count, self._tokens_read + size
            if not drawn:
                raise self.nothing_to_train_on()
            lengths = [[len(unit) for unit in units] for _, units in drawn]
            taken, packed = close_window(lengths, self._block, self._window)
            units = [unit for _, several in drawn[:taken] for unit in several]
            tokens -= sum(len(unit) for unit in units)
            after = drawn[taken][0] if taken < len(drawn) else end
            drawn = drawn[taken:]
            window = self._close(
                cursor, after, after == epoch_end, [tuple(units[i] for i in block) for block in packed]
            )
            cursor = window.end
            yield window

    def _close(self, start: Cursor, draws: int, ends_epoch: bool, blocks: list[Block]) -> Window:
        """The window of these blocks, shuffled: packing leaves the longest units in the first."""
        order = permutation(len(blocks), self._seed, "blocks", start.draws)
        counts = self.mixture.counts(start.draws, draws - start.draws)
        end = Cursor(
            sources={name: start.sources[name] + counts[name] for name in counts},
            draws=draws,
            epoch=start.epoch + ends_epoch,
            window=start.window + 1,
        )
        return Window(start, end, [blocks[i] for i in order])

    def _draw(self, start: int, count: int, cursors: dict[str, int]) -> list[tuple[Unit, ...]]:
        """The units of ``count`` draws. Moves ``cursors``, the draws from each source before them, past them."""
        drawn: list[tuple[Unit, ...]] = [()] * count
        choices = self.mixture.choices(start, count)
        for index, name in enumerate(self.mixture.names):
            places = (choices == index).nonzero()[0].tolist()
            put = iter(places)
            for _, _, units in self.read(name, cursors[name], len(places)):
                for several in units:
                    drawn[next(put)] = several
            cursors[name] += len(places)
        return drawn

    def read(self, name: str, start: int, count: int) -> Iterator[tuple[int, list[int], list[tuple[Unit, ...]]]]:
        """Draws from one source, as (group, positions in it, the units of each). ValueError as for :meth:`windows`."""
        for group, rows in self.orders[name].draws(start, count):
            positions = rows.tolist()
            units = self._sources[name].units(group, positions)
            if len(units) != len(positions):
                raise ValueError(f"The source '{name}' gave {len(units)} rows when asked for {len(positions)}.")
            for unit in (unit for several in units for unit in several):
                if not 0 < len(unit) <= self._block:
                    ids = ", ".join(dict.fromkeys(document.example_id for document in unit.documents))
                    raise ValueError(
                        f"{ids}: {len(unit)} tokens do not fit into a block of {self._block}; "
                        "whatever makes the units has to truncate them."
                    )
            yield group, positions, units

    def _chunk(self, room: int) -> int:
        """How many draws to read together: about as many as fill the room, were they like those before."""
        estimate = room * self._draws_read // self._tokens_read if self._tokens_read else 4 * self._draws_read
        return min(max(estimate, _CHUNK[0]), _CHUNK[-1])

    def nothing_to_train_on(self) -> DataError:
        """The error that tells why a whole pass has come to nothing."""
        read = []
        for name in self.mixture.names:
            statistics = self._sources[name].statistics
            dropped = {**statistics.filtered, **statistics.dropped}
            reasons = "; ".join(f"{reason} ({examples})" for reason, examples in dropped.items())
            read.append(f"'{name}' ({self.rows[name]} records){': dropped as ' + reasons if reasons else ''}")
        return DataError(
            f"There is nothing to train on: no example came through that fits into a block of {self._block} tokens. "
            f"Read were {', and '.join(read)}. Raise batch.block, choose another way to truncate, or look at the "
            "format and at the turns that are trained."
        )
