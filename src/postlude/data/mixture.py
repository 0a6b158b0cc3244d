"""Which source each draw of a mixture comes from: a seeded choice that is a pure function of (seed, position).

A weight is a share of the draws, and a draw is one record. An epoch of the mixture is one pass over its largest
source by weight (of equal weights, the one with more rows); the others are begun anew as often as it takes. Weights
may change at a draw: the draws before it stay what they were, and epochs stay passes over the same source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
        self._begun = self._stretches = [(0, dict(weights))]
        """The weights from a draw on, in order."""
        self.leader = max(self.names, key=lambda name: (weights[name], rows[name]))
        """The source whose passes are the mixture's epochs."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The newest."""
        return self._stretches[-1][1]

    @property
    def shares(self) -> dict[str, float]:
        """Of the draws, by the newest weights."""
        return {name: self.weights[name] / sum(self.weights.values()) for name in self.names}

    def reweigh(self, draw: int, weights: Mapping[str, float]) -> None:
        """Give the draws from this one on other weights."""
        before = [stretch for stretch in self._stretches if stretch[0] < draw]
        self._stretches = [*before, (draw, {name: weights[name] for name in self.names})]

    def next_change(self, draw: int) -> int | None:
        """The first draw after this one whose weights are others, if there is one."""
        return next((first for first, _ in self._stretches if first > draw), None)

    def state(self) -> list[list[Any]]:
        """All weights with the draws from which they hold, as JSON; nothing where they never changed."""
        return [] if self._stretches == self._begun else [[draw, weights] for draw, weights in self._stretches]

    def load(self, state: Sequence[Sequence[Any]]) -> None:
        """Go on with the weights of a state."""
        self._stretches = [(draw, dict(weights)) for draw, weights in state] or self._begun

    def choices(self, start: int, count: int) -> np.ndarray:
        """[count] the index into ``names`` of the source of each draw from ``start`` on."""
        if len(self.names) == 1:
            return np.zeros(count, dtype=np.int64)
        uniform = (random_bits(start, count, self._seed, "mixture") >> np.uint64(11)) * 2.0**-53
        chosen = np.zeros(count, dtype=np.int64)
        for first, weights in self._stretches:
            borders = np.cumsum([weights[name] for name in self.names])
            borders /= borders[-1]
            place = min(max(first - start, 0), count)
            chosen[place:] = np.searchsorted(borders[:-1], uniform[place:], side="right")
        return chosen

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
