"""How far a journal goes at a moment that something else stands for, such as a checkpoint: how many lines, their
digest, and the last of them, from which they can be written again.

Of a local journal alone. Behind a remote URI a journal is of objects, which are there whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from postlude.storage import files
from postlude.storage.errors import NotFound
from postlude.storage.journal import Journal, is_entry

TAIL_BYTES = 2**20
"""Of more new lines than so many bytes none are kept."""
_PIECE_BYTES = 2**20


@dataclass(frozen=True)
class Extent:
    """So many first lines of a journal."""

    lines: int
    sha256: str
    tail: str = ""
    """The last lines, as they stand in the file."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def holds(self, lines: Iterable[bytes]) -> bool:
        """Whether the lines begin with these."""
        count, sha256 = 0, hashlib.sha256()
        for line in islice(lines, self.lines):
            sha256.update(line)
            count += 1
        return count == self.lines and sha256.hexdigest() == self.sha256


class Follower:
    """Digests a local journal as it grows."""

    def __init__(self, journal: Journal) -> None:
        self._uri = journal.uri
        self._bytes, self._lines, self._sha256 = 0, 0, hashlib.sha256()

    def pass_over_long(self) -> None:
        """Leave what stands there now out of the next tail, where that is much."""
        with suppress(NotFound):
            if files.size_bytes(self._uri) > TAIL_BYTES // 4:
                self.extent()

    def extent(self) -> Extent:
        """How far it goes now, the tail being what was added since this was asked before."""
        begin, tail = self._bytes, b""
        with suppress(NotFound), files.open_file(self._uri) as file:
            file.seek(begin)
            while piece := file.read(_PIECE_BYTES):
                piece += file.readline()
                whole = piece[: piece.rfind(b"\n") + 1]
                self._bytes += len(whole)
                self._lines += whole.count(b"\n")
                self._sha256.update(whole)
                tail = whole if self._bytes - begin == len(whole) <= TAIL_BYTES else b""
        return Extent(self._lines, self._sha256.hexdigest(), tail.decode(errors="replace"))


def extent_of(journal: Journal, after: int | None = None) -> Extent | None:
    """How far a journal goes, the tail being what stands after so many lines, if all of it is short; None of a remote
    one."""
    if not files.is_local(journal.uri):
        return None
    extent = Follower(journal).extent()
    tail = [] if after is None else extent.tail.splitlines(keepends=True)[after:]
    return replace(extent, tail="".join(tail))


def read_extent(body: Mapping[str, Any] | None) -> Extent | None:
    """What :meth:`Extent.to_json` gave."""
    return Extent(**body) if body else None


def restore(journal: Journal, extents: Sequence[Extent]) -> bool:
    """Bring a journal to begin with the lines of the first extent, with the help of the tails of all, newest first.
    False, with nothing changed, where that cannot be. What stood there is kept beside."""
    newest, lines = extents[0], list(journal.lines())
    known: list[bytes] = []
    for extent in extents:
        if extent.lines != newest.lines - len(known):
            continue
        known = extent.tail.encode().splitlines(keepends=True) + known
        wanted = lines[: newest.lines - len(known)] + known
        if newest.holds(wanted):
            journal.rewrite([*wanted, *_later(lines, wanted)])
            return True
    return False


def _later(lines: Sequence[bytes], wanted: Sequence[bytes]) -> list[bytes]:
    """What stands behind the wanted lines: behind the last of them that is there, without those that still have the
    length and the place of one that was changed."""
    there = set(wanted)
    last = max((number for number, line in enumerate(lines) if line in there), default=-1)
    gap = wanted[len(wanted) - wanted[::-1].index(lines[last]) :] if last >= 0 else wanted
    behind = lines[last + 1 :]
    changed = {number for number, (line, was) in enumerate(zip(behind, gap, strict=False)) if len(line) == len(was)}
    return [line for number, line in enumerate(behind) if number not in changed and is_entry(line)]
