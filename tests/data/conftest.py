"""A source for the loader whose rows are made up, and which remembers what was read of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from postlude.data.document import Document, Unit
from postlude.data.statistics import SourceStatistics


class MadeUpSource:
    """``lengths[group][row]`` holds the tokens of the row's units: none for a row that is dropped."""

    def __init__(
        self,
        name: str,
        lengths: Sequence[Sequence[Sequence[int]]],
        files: Sequence[Sequence[int]] | None = None,
        seekable: bool = True,
        before_read: Callable[[int, Sequence[int]], Any] = lambda group, positions: None,
    ) -> None:
        self.name, self.lengths, self.seekable = name, lengths, seekable
        self.groups = [len(rows) for rows in lengths]
        self.files = [list(range(len(lengths)))] if files is None else files
        self.statistics = SourceStatistics(name, sum(self.groups))
        self.before_read = before_read
        self.reads: list[tuple[int, int]] = []
        """(group, position) in the order read."""

    def units(self, group: int, positions: Sequence[int]) -> list[tuple[Unit, ...]]:
        self.before_read(group, positions)
        self.reads += [(group, position) for position in positions]
        self.statistics.read += len(positions)
        drawn = []
        for position in positions:
            row = f"{self.name}:{group}-{position}"
            units = [self._unit(f"{row}-{i}", length) for i, length in enumerate(self.lengths[group][position])]
            self.statistics.add(units)
            if not units:
                self.statistics.drop("made up to be dropped", row)
            drawn.append(tuple(units))
        return drawn

    def ids(self) -> list[str]:
        """The example ids of every unit."""
        return [
            f"{self.name}:{group}-{position}-{i}"
            for group, rows in enumerate(self.lengths)
            for position, lengths in enumerate(rows)
            for i in range(len(lengths))
        ]

    def _unit(self, example_id: str, length: int) -> Unit:
        weight = (np.arange(length) % 2).astype(np.float32)
        return Unit((Document(example_id, self.name, np.arange(length), {"weight": weight}),))


@pytest.fixture(scope="session")
def made_up_source() -> type[MadeUpSource]:
    return MadeUpSource
