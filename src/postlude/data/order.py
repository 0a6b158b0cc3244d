"""The order in which records are drawn: a pure function of (seed, source, epoch, position).

Notable:

- Nothing is buffered and nothing depends on how many processes read: the k-th draw from a source is known from k.
- A source is files of groups of rows. Files are permuted, groups within a file where it can be entered anywhere
  (else they come as they stand), rows within a group. A source with random access is one group, so it gets one
  full permutation; a stream never has more than one group open.
- Random bits are the raw output of a counter-based generator (Philox, Salmon et al. 2011) under a key hashed from
  what they are for. NumPy keeps that output the same between its versions, which it does not promise of its
  shuffles; so a run is continued in the same order after an upgrade.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np


def random_bits(start: int, count: int, *what: str | int) -> np.ndarray:
    """[count] uint64: the random words at positions ``start`` and on of the sequence that ``what`` names."""
    key = int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=16).digest(), "little")
    words = 4  # the generator makes four at a time
    skipped = start % words
    return np.random.Philox(key=key, counter=start // words).random_raw(count + skipped)[skipped:]


def permutation(length: int, *what: str | int) -> np.ndarray:
    """[length] the numbers 0 to length - 1 in the random order that ``what`` names."""
    shuffled = np.argsort(random_bits(0, length, *what), kind="stable")
    return shuffled.astype(np.uint32) if length < 2**32 else shuffled


class SourceOrder:
    """The endless sequence of draws from one source: epoch after epoch, each of them every row once.

    ``groups`` holds the rows of each group, ``files`` the groups of each file, in the order they stand there.
    """

    def __init__(
        self, seed: int, name: str, groups: Sequence[int], files: Sequence[Sequence[int]], seekable: bool
    ) -> None:
        if sorted(group for file in files for group in file) != list(range(len(groups))):
            raise ValueError(f"The files of '{name}' do not hold each of its {len(groups)} groups once.")
        self._what = (seed, name)
        self._sizes = np.asarray(groups, dtype=np.int64)
        self._files = files
        self._seekable = seekable
        self.rows = int(self._sizes.sum())
        """Rows in an epoch."""
        self._epoch = -1
        self._layout = np.empty(0, np.int64)
        """The groups in this epoch's order."""
        self._ends = np.empty(0, np.int64)
        """How many rows have been drawn once each of them is done."""
        self._open: tuple[int, int] | None = None
        """The epoch and group of ``_shuffled``."""
        self._shuffled = np.empty(0, np.uint32)

    def draws(self, start: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """Draws ``start`` to ``start + count`` as (group, positions in it), one item for each group that they touch.

        A start that continues the last call costs nothing; any other shuffles one group again.
        """
        if count and not self.rows:
            raise ValueError(f"There is nothing to draw from '{self._what[1]}': it has no rows.")
        while count > 0:
            epoch, at = divmod(start, self.rows)
            self._lay_out(epoch)
            place = int(np.searchsorted(self._ends, at, side="right"))
            group, end = int(self._layout[place]), int(self._ends[place])
            size = int(self._sizes[group])
            taken = min(count, end - at)
            first = at - (end - size)
            yield group, self._rows(epoch, group)[first : first + taken]
            start, count = start + taken, count - taken

    def _lay_out(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        layout: list[int] = []
        for file in permutation(len(self._files), *self._what, epoch, "files"):
            groups = self._files[file]
            if self._seekable:
                layout += [groups[i] for i in permutation(len(groups), *self._what, epoch, "groups", int(file))]
            else:
                layout += groups
        self._layout = np.asarray(layout, dtype=np.int64)
        self._ends = np.cumsum(self._sizes[self._layout])
        self._epoch = epoch

    def _rows(self, epoch: int, group: int) -> np.ndarray:
        if self._open != (epoch, group):
            self._shuffled = permutation(int(self._sizes[group]), *self._what, epoch, "rows", group)
            self._open = (epoch, group)
        return self._shuffled
