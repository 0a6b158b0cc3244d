"""MinHash signatures with banded look-up (Broder 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3).

The minimum of a random hash function over two sets is equal with a probability that is their Jaccard similarity, so
the share of equal minima estimates it. Records that agree on a whole band of minima are candidates; what is a
duplicate is decided on the whole signature, so a chance meeting in the table costs time and changes no result.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

MINIMA = 120
"""Length of a signature; the estimate is off by 0.037 at similarity 0.8 (one standard deviation)."""
_SURE = 0.99
"""The chance that a pair right at the threshold becomes a candidate is at least this."""
_CHUNK = 4096
"""Shingles that are hashed at a time."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

_bits = np.random.Philox(key=20240817).random_raw(2 * MINIMA)
_MULTIPLIERS, _SHIFTS = _bits[:MINIMA] | np.uint64(1), _bits[MINIMA:]


def shingles(words: Sequence[str], length: int) -> np.ndarray:
    """[shingles] uint64: a hash of each different run of ``length`` words; of all the words where they are fewer."""
    hashed = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], np.uint64)
    length = min(length, len(words))
    runs = len(words) - length + 1
    combined = np.zeros(runs, np.uint64)
    for place in range(length):
        combined = _mix(combined + hashed[place : place + runs])
    return np.unique(combined)


class MinHashIndex:
    """Sets, none of which is similar to another."""

    def __init__(self, threshold: float) -> None:
        self._needed = int(np.ceil(threshold * MINIMA - 1e-9))
        self._rows = _rows_of_band(threshold)
        self._bands = MINIMA // self._rows
        self._signatures = np.empty((64, MINIMA), np.uint32)
        self._sets = 0
        # A slot is a band of a set. Slots in one bucket form a chain: the bucket's head, then each one's predecessor.
        self._previous = np.empty(64 * self._bands, np.int64)
        self._heads = np.full(self._buckets(), -1, np.int64)

    def add(self, hashes: np.ndarray) -> bool:
        """Add a set of [n] uint64 hashes, unless one that is similar is there already."""
        signature = _signature(hashes)
        candidates = self._candidates(signature)
        if candidates:
            equal = (self._signatures[candidates] == signature).sum(axis=1)
            if int(equal.max()) >= self._needed:
                return False
        if self._sets == len(self._signatures):
            self._grow()
        self._signatures[self._sets] = signature
        self._link(self._sets)
        self._sets += 1
        return True

    def _candidates(self, signature: np.ndarray) -> list[int]:
        numbers = set()
        for slot in self._heads[self._buckets_of(signature)].tolist():
            while slot >= 0:
                numbers.add(slot // self._bands)
                slot = int(self._previous[slot])
        return sorted(numbers)

    def _link(self, number: int) -> None:
        first = number * self._bands
        for slot, bucket in enumerate(self._buckets_of(self._signatures[number]).tolist(), first):
            self._previous[slot] = self._heads[bucket]
            self._heads[bucket] = slot

    def _buckets_of(self, signature: np.ndarray) -> np.ndarray:
        bands = signature.reshape(self._bands, self._rows).astype(np.uint64)
        keys = np.arange(1, self._bands + 1, dtype=np.uint64)
        for row in range(self._rows):
            keys = _mix(keys + bands[:, row])
        return (keys & np.uint64(len(self._heads) - 1)).astype(np.int64)

    def _grow(self) -> None:
        self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._previous = np.empty(len(self._signatures) * self._bands, np.int64)
        self._heads = np.full(self._buckets(), -1, np.int64)
        for number in range(self._sets):
            self._link(number)

    def _buckets(self) -> int:
        """A power of two, twice as many as there can be slots before the next growth."""
        return 1 << (2 * len(self._signatures) * self._bands - 1).bit_length()


def _rows_of_band(threshold: float) -> int:
    """The longest bands that still let hardly a pair at the threshold escape."""
    lengths = [rows for rows in range(1, MINIMA + 1) if MINIMA % rows == 0]
    return max(rows for rows in lengths if rows == 1 or 1 - (1 - threshold**rows) ** (MINIMA // rows) >= _SURE)


def _signature(hashes: np.ndarray) -> np.ndarray:
    """[MINIMA] uint32: the minimum of each hash function over the set."""
    minima = np.full(MINIMA, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(hashes), _CHUNK):
        chunk = hashes[start : start + _CHUNK, None]
        hashed = _mix(chunk * _MULTIPLIERS + _SHIFTS) >> np.uint64(32)
        minima = np.minimum(minima, hashed.min(axis=0).astype(np.uint32))
    return minima


def _mix(values: np.ndarray) -> np.ndarray:
    """Each bit of the result depends on each bit of the value (the finaliser of SplitMix64)."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
