"""Readers that go on where they were: a journal is followed by ranges of bytes, behind a local or a remote URI.

What a reader has read is a row of marks, each with the bytes before it. A mark holds while those bytes stand there and
the files before its own are what they were; as long as the last one does, only what is new is read. Else a resume has
cut the journal back, or something has replaced it: the last mark that holds is found by halving, and the reader goes on
from there. A line that has not ended is not read.

Of a local journal a look costs one call of the system, of a remote one a listing; what changed is read with one range.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from postlude.storage import files
from postlude.storage.errors import NotFound
from postlude.storage.journal import Journal

BLOCK_BYTES = 2**22
"""How much is read at a time, where a line is not longer."""
MARK_BYTES = 2**20
"""Between two marks that are kept, at least."""
_BEFORE_BYTES = 512
"""Of a line of metrics its times alone, which no other has, are more than half of that."""


@dataclass(frozen=True)
class Part:
    """Whole lines of a journal, or none. Whatever was read at their place before, and behind it, stands no more."""

    first: int
    """How many lines of the journal are before them."""
    place: str
    """The file that they are in."""
    number: int
    """Of the first of them in that file, from 1."""
    content: bytes
    start: int = 0
    """Bytes of that file before them."""


@dataclass(frozen=True)
class _Mark:
    """A place in a journal."""

    place: str = ""
    end: int = 0
    """Bytes of the file before it."""
    number: int = 0
    """Lines of the file before it."""
    lines: int = 0
    """Lines of the journal before it."""
    before: bytes = b""
    """The last bytes before it."""

    def after(self, whole: bytes) -> _Mark:
        """The place behind some lines that begin here."""
        count = whole.count(b"\n")
        before = (self.before + whole[-_BEFORE_BYTES:])[-_BEFORE_BYTES:]
        return _Mark(self.place, self.end + len(whole), self.number + count, self.lines + count, before)


class Reader:
    """Reads the lines of a journal once, as they come, by any process that writes them."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._marks = [_Mark()]
        """The first is the begin; the last is how far was read."""
        self._stamps: dict[str, str] = {}
        """Of the files that were read to their end."""

    def parts(self) -> Iterator[Part]:
        """What came since, in order. What is not taken, or raises an error where it is taken, comes again."""
        stamps = self.journal.stamps()
        if stamps == self._stamps:
            return
        if self._after(self._marks[-1], stamps, 0) is None:
            del self._marks[bisect_left(self._marks, True, key=lambda mark: self._after(mark, stamps, 0) is None) :]
            self._stamps = {place: self._stamps[place] for place in self._stamps if place < self._marks[-1].place}
            yield Part(self._marks[-1].lines, self._marks[-1].place, self._marks[-1].number + 1, b"")
        for place in stamps:
            if place < self._marks[-1].place:
                continue
            if place != self._marks[-1].place:
                self._marks.append(_Mark(place, lines=self._marks[-1].lines))
            while content := self._whole_lines(self._marks[-1], stamps):
                mark = self._marks[-1]
                yield Part(mark.lines, place, mark.number + 1, content, mark.end)
                self._advance(mark.after(content))
            if content is None:  # it has changed since the look
                return
            self._stamps[place] = stamps[place]

    def _whole_lines(self, mark: _Mark, stamps: dict[str, str]) -> bytes | None:
        """Some lines behind a mark; empty where none has ended, None where the mark holds no more."""
        size = BLOCK_BYTES
        while True:
            content = self._after(mark, stamps, size)
            if content is None or (end := content.rfind(b"\n") + 1) or len(content) < size:
                return content if content is None else content[:end]
            size *= 2

    def _after(self, mark: _Mark, stamps: dict[str, str], count: int) -> bytes | None:
        """So many bytes behind a mark, at most; None where it holds no more."""
        if not mark.place:
            return b""
        earlier, known = ({place: of[place] for place in of if place < mark.place} for of in (stamps, self._stamps))
        if mark.place not in stamps or earlier != known:
            return None
        if not mark.before and not count:
            return b""
        try:
            content = files.read_range(mark.place, mark.end - len(mark.before), len(mark.before) + count)
        except NotFound:
            return None
        return content[len(mark.before) :] if content.startswith(mark.before) else None

    def _advance(self, mark: _Mark) -> None:
        """Note how far was read; of the marks that are close to each other the last is kept."""
        first = self._marks[-2].end if self._marks[-2].place == mark.place else 0
        if self._marks[-1].end and mark.end - first < MARK_BYTES:
            self._marks[-1] = mark
        else:
            self._marks.append(mark)


class Entries:
    """The entries of a journal, kept up with."""

    def __init__(self, journal: Journal) -> None:
        self.entries: list[dict[str, Any]] = []
        self._reader = Reader(journal)

    def update(self) -> int:
        """Read what came. How many of the entries are what they were: those behind them are new."""
        kept = len(self.entries)
        for part in self._reader.parts():
            new = self._reader.journal.entries(part.place, part.number, part.content)
            kept = min(kept, part.first)
            self.entries[part.first :] = new
        return kept
