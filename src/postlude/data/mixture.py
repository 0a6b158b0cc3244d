"""Which source each draw of a mixture comes from: a seeded choice that is a pure function of (seed, position).

A weight is a share of the draws, and a draw is one record. An epoch of the mixture is one pass over its largest
source by weight (of equal weights, the one with more rows); the others are begun anew as often as it takes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from postlude.data.order import random_bits

_CHUNK = 1 << 18
"""Draws that are looked at together, at most."""


class Mixture:
    """``rows`` and ``weights`` are by source. The order in which a mapping names its sources does not matter."""

    def __init__(self, seed: int, rows: Mapping[str, int], weights: Mapping[str, float]) -> None:
        if rows.keys() != weights.keys() or not rows:
            raise ValueError(f"Sources {sorted(rows)} need a weight each, found weights for {sorted(weights)}.")
        for name in rows:
            if not (weights[name] > 0 and rows[name] > 0):
                raise ValueError(f"'{name}' needs a weight and rows above zero: {weights[name]}, {rows[name]}.")
        self.names = tuple(sorted(rows))
        self._seed = seed
        self._rows = rows
        self._borders = np.cumsum([weights[name] for name in self.names])
        self._borders /= self._borders[-1]
        self.shares = {name: weights[name] / sum(weights.values()) for name in self.names}
        self.leader = max(self.names, key=lambda name: (weights[name], rows[name]))
        """The source whose passes are the mixture's epochs."""

    def choices(self, start: int, count: int) -> np.ndarray:
        """[count] the index into ``names`` of the source of each draw from ``start`` on."""
        if len(self.names) == 1:
            return np.zeros(count, dtype=np.int64)
        uniform = (random_bits(start, count, self._seed, "mixture") >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(self._borders[:-1], uniform, side="right")

    def counts(self, start: int, count: int) -> dict[str, int]:
        """How many of the draws from ``start`` on come from each source."""
        drawn = np.zeros(len(self.names), dtype=np.int64)
        for first in range(start, start + count, _CHUNK):
            part = self.choices(first, min(_CHUNK, start + count - first))
            drawn += np.bincount(part, minlength=len(self.names))
        return dict(zip(self.names, drawn.tolist(), strict=True))

    def epoch_end(self, epoch: int, draws: int = 0, cursor: int = 0) -> int:
        """The number of draws after which the epoch (from 0) is over.

        The search starts after ``draws`` draws, of which ``cursor`` were from the leader.
        """
        missing = (epoch + 1) * self._rows[self.leader] - cursor
        if len(self.names) == 1:
            return draws + missing
        leader = self.names.index(self.leader)
        while True:
            count = min(int(missing / self.shares[self.leader]) + 64, _CHUNK)
            drawn = np.flatnonzero(self.choices(draws, count) == leader)
            if len(drawn) >= missing:
                return draws + int(drawn[missing - 1]) + 1
            missing -= len(drawn)
            draws += count

    def repeats(self) -> dict[str, float]:
        """How often each source is passed over in one epoch, on average: 1 for the leader, 0.5 for half a pass."""
        draws = self._rows[self.leader] / self.shares[self.leader]
        return {name: draws * self.shares[name] / self._rows[name] for name in self.names}
