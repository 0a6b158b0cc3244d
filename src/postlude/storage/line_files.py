"""Encrypted files to which lines are added, read by any range of what they hold, as if they were in clear.

How long a line is can be told from its base64, so that a range is found without decrypting what is before it. What this
process knows of a file from the time before holds while the line before it stands where it was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from postlude.storage.envelope import HEADER_LINE_BYTES, FileCipher
from postlude.storage.errors import CorruptError
from postlude.storage.positioned import Positioned

_PIECE_BYTES = 2**18
_MARK_BYTES = 2**16
_ADDED_BYTES = 27
"""What a line has more in base64 than in clear: nonce and tag, without its line feed."""

Fetch = Callable[[int, int], bytes]


@dataclass
class _Known:
    """How far a file was read, and where some of its lines begin: as it stands, and in clear."""

    marks: list[tuple[int, int]] = field(default_factory=lambda: [(HEADER_LINE_BYTES, 0)])
    end: tuple[int, int] = (HEADER_LINE_BYTES, 0)
    last: bytes = b""
    """The last line before the end, as it stands."""

    def follow(self, size: int, fetch: Fetch) -> None:
        for at, line in _lines(self.end[0], size, fetch):
            begin = self.end[1]
            if at - self.marks[-1][0] >= _MARK_BYTES:
                self.marks.append((at, begin))
            self.end, self.last = (at + len(line), begin + _clear_bytes(line)), line


_known: dict[bytes, _Known] = {}
"""By the header of the file, which no other has."""


def _lines(start: int, size: int, fetch: Fetch) -> Iterator[tuple[int, bytes]]:
    """Where each whole line begins, and the line, as they stand, from ``start`` on."""
    rest = b""
    while start + len(rest) < size:
        piece = fetch(start + len(rest), min(_PIECE_BYTES, size - start - len(rest)))
        if not piece:
            return
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield start, line + b"\n"
            start += len(line) + 1


def _clear_bytes(line: bytes) -> int:
    text = line[:-1]
    return max(1, len(text) // 4 * 3 - text[-2:].count(b"=") - _ADDED_BYTES)


def _follow(cipher: FileCipher, size: int, fetch: Fetch) -> _Known:
    known = _known.get(cipher.header)
    if known is None or (known.last and fetch(known.end[0] - len(known.last), len(known.last)) != known.last):
        known = _Known()
    known = replace(known, marks=[*known.marks])  # another thread may be at it
    known.follow(size, fetch)
    _known[cipher.header] = known
    return known


class LineReader(Positioned):
    """The whole lines of a file. ``fetch(start, count)`` gives bytes of it as it stands; ``size_bytes`` is that of the
    whole file. A line that is not what was written there is one of zeros, which is no entry of any journal: so that one
    which is damaged can be told, dropped and mended like a clear one."""

    def __init__(self, uri: str, cipher: FileCipher, size_bytes: int, fetch: Fetch, close: Callable[[], None]) -> None:
        self._cipher, self._fetch, self._close = cipher, fetch, close
        known = _follow(cipher, size_bytes, fetch)
        self._marks, (self._end, self.size) = known.marks, known.end

    def place(self, clear: int) -> int:
        """Where the line begins, in the file as it stands, before which there is so much content."""
        mark, begin = self._mark(clear)
        for at, line in _lines(mark, self._end, self._fetch):
            if begin >= clear:
                return at
            begin += _clear_bytes(line)
        return self._end

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        wanted, done = min(len(view), self.size - self._at), 0
        if wanted <= 0:
            return 0
        mark, begin = self._mark(self._at)
        for at, line in _lines(mark, self._end, self._fetch):
            length = _clear_bytes(line)
            if begin + length > self._at:
                piece = self._open(at, line, length)[self._at - begin :][: wanted - done]
                view[done : done + len(piece)] = piece
                done, self._at = done + len(piece), self._at + len(piece)
                if done == wanted:
                    break
            begin += length
        return done

    def _open(self, at: int, line: bytes, length: int) -> bytes:
        try:
            content = self._cipher.open_line(at, line)
        except CorruptError:
            content = b""
        return content if len(content) == length else bytes(length - 1) + b"\n"

    def readall(self) -> bytes:
        content = bytearray(max(0, self.size - self._at))
        self.readinto(content)
        return bytes(content)

    def _mark(self, clear: int) -> tuple[int, int]:
        return self._marks[max(0, bisect_right(self._marks, clear, key=lambda mark: mark[1]) - 1)]

    def close(self) -> None:
        if not self.closed:
            try:
                self._close()
            finally:
                super().close()
