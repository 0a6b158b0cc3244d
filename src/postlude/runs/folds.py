"""What many losses by example come to, in arrays: of each example a few numbers, of each source a curve. What parts
come to can be put together, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from postlude.runs.arrays import numbers

if TYPE_CHECKING:
    import pyarrow

SOURCE_BITS = 40
"""A key of a curve by source is the source above so many bits, in which the interval of steps stands."""
CURVE_POINTS = 2**12
"""Of the curves by source, at most: the intervals that they tell of are doubled until there are no more."""

NUMBERS = {
    "first_step": np.int32,
    "first": np.float32,
    "best_step": np.int32,
    "best": np.float32,
    "last_step": np.int32,
    "last": np.float32,
    "times": np.int32,
}
EXAMPLE = np.dtype([*NUMBERS.items(), ("source", np.int32)])


@dataclass(frozen=True)
class Sums:
    """Losses of sources over intervals of ``2**shift`` steps."""

    shift: int
    keys: np.ndarray
    """Rising, int64."""
    sums: np.ndarray
    """[keys, 4]: loss, tokens, rows, rows that are not finite."""

    @staticmethod
    def of(shift: int, keys: np.ndarray, rows: np.ndarray) -> Sums:
        unique, places = np.unique(keys, return_inverse=True)
        sums = np.stack([np.bincount(places, column, len(unique)) for column in rows.T], 1)
        return Sums(shift, unique, sums)

    def widened(self, shift: int) -> Sums:
        source, interval = self.keys >> SOURCE_BITS, self.keys & (2**SOURCE_BITS - 1)
        keys = (source << SOURCE_BITS) | (interval >> (shift - self.shift))
        return Sums.of(shift, keys, self.sums)

    @staticmethod
    def total(parts: Sequence[Sums]) -> Sums:
        shift = max((part.shift for part in parts), default=0)
        parts = [part if part.shift == shift else part.widened(shift) for part in parts]
        keys = np.concatenate([np.zeros(0, np.int64), *(part.keys for part in parts)])
        total = Sums.of(shift, keys, np.concatenate([np.zeros((0, 4)), *(part.sums for part in parts)]))
        while len(total.keys) > CURVE_POINTS * len(np.unique(total.keys >> SOURCE_BITS)):
            total = total.widened(total.shift + 1)
        return total


@dataclass(frozen=True)
class Fold:
    """What some rows come to."""

    codes: np.ndarray
    """The examples, rising, int64."""
    examples: np.ndarray
    """[codes], of the type :data:`EXAMPLE`."""
    sums: Sums

    @staticmethod
    def of(codes: np.ndarray, sources: np.ndarray, table: pyarrow.Table, shift: int) -> Fold:
        steps, tokens = numbers(table["step"]), numbers(table["tokens"])
        losses = numbers(table["loss"])
        finite = np.isfinite(losses)
        columns = [np.where(finite, losses, 0.0), np.where(finite, tokens, 0), np.ones(len(steps)), ~finite]
        keys = (sources << SOURCE_BITS) | (steps >> shift)
        sums = Sums.total([Sums.of(shift, keys, np.stack(columns, 1).astype(np.float64))])
        measured = np.flatnonzero(tokens > 0)
        codes, sources, steps = codes[measured], sources[measured], steps[measured]
        by_token = (losses[measured] / tokens[measured]).astype(np.float32)
        order = np.lexsort((steps, codes))
        codes, sources, steps, by_token = codes[order], sources[order], steps[order], by_token[order]
        starts = np.flatnonzero(np.diff(codes, prepend=-1))
        ends = np.append(starts[1:], len(codes)) - 1
        told = np.zeros(len(starts), EXAMPLE)
        if len(starts):
            told["first_step"], told["first"] = steps[starts], by_token[starts]
            told["last_step"], told["last"] = steps[ends], by_token[ends]
            told["best"] = np.fmin.reduceat(by_token, starts)
            told["times"], told["source"] = ends - starts + 1, sources[starts]
            best = np.repeat(told["best"], told["times"])
            places = np.flatnonzero((by_token == best) | np.isnan(best))
            told["best_step"] = steps[places[np.searchsorted(places, starts)]]
        return Fold(codes[starts], told, sums)

    @staticmethod
    def total(parts: Sequence[Fold], count: int) -> Fold:
        """All of them together, where there are ``count`` examples."""
        whole = np.zeros(count, EXAMPLE)
        for part in parts[:1]:
            whole[part.codes] = part.examples  # often most of them, so not as below, which copies
        for part in parts[1:]:
            before, new = whole[part.codes], part.examples
            unseen = before["times"] == 0
            for step, value, is_newer in (
                ("first_step", "first", new["first_step"] < before["first_step"]),
                ("last_step", "last", new["last_step"] >= before["last_step"]),
                ("best_step", "best", _is_better(new, before)),
            ):
                taken = unseen | is_newer
                before[step][taken], before[value][taken] = new[step][taken], new[value][taken]
            before["times"] += new["times"]
            before["source"] = new["source"]
            whole[part.codes] = before
        codes = np.flatnonzero(whole["times"])
        held = whole if len(codes) == count else whole[codes]
        return Fold(codes, held, Sums.total([part.sums for part in parts]))


def _is_better(new: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Where the best of one is less than that of another, or as little and earlier, or was never finite before."""
    is_less = (new["best"] < before["best"]) | (np.isnan(before["best"]) & ~np.isnan(new["best"]))
    return is_less | ((new["best"] == before["best"]) & (new["best_step"] < before["best_step"]))
