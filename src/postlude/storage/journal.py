"""Journals: JSON lines to which one line after another is added, and of which a reader always sees a prefix.

A local journal is one file. A line is added by a single write under an advisory lock, so several processes may
add; what a killed or full disk leaves of a line is never read, and is taken away by the next line.

A remote journal is a folder of numbered segments (``metrics.jsonl/00000001.jsonl``), since an object cannot be
appended to. A writer puts its last segment again, longer, until it has :data:`SEGMENT_BYTES`.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import accumulate
from typing import Any

from postlude.storage import exact_json, files, guards
from postlude.storage.errors import CorruptError, NotFound, StorageFull, writing
from postlude.storage.locks import NoFlock, flock

SEGMENT_BYTES = 2**18
"""A remote segment that has grown to this size is left alone."""

PUT_SECONDS = 5.0
"""Remote lines are held back so long, unless they must be durable at once."""

_TAIL_BYTES = 2**16


class Journal:
    """JSON objects in the order in which they were added, behind a local or a remote URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._storage: _LocalLines | _RemoteLines = _LocalLines(uri) if files.is_local(uri) else _RemoteLines(uri)

    def append(self, entry: Mapping[str, Any], *, sync: bool = False) -> None:
        """Add an entry. With ``sync`` it is on the disk, or in the bucket, when the call returns."""
        self._storage.append(exact_json.dump(dict(entry)).encode() + b"\n", sync)

    def flush(self) -> None:
        """Return when all that was added is on the disk, or in the bucket."""
        self._storage.flush()

    def size_bytes(self) -> int:
        """How much there is to read: grows with every entry that readers can see."""
        return self._storage.size_bytes()

    def read(self) -> list[dict[str, Any]]:
        """All entries that arrived whole; none if there is no journal. CorruptError names the line at fault."""
        return [entry for _, entry in self._entries()]

    def cut(self, keep: Callable[[dict[str, Any]], bool]) -> int:
        """Drop the first entry that ``keep`` refuses and all that follow. Returns how many entries are left.

        Only the process that holds the run's lock may cut: it must be the only writer.
        """
        guards.check(self.uri, now=True)
        kept: list[bytes] = []
        for line, entry in self._entries():
            if not keep(entry):
                self._storage.replace(kept)
                break
            kept.append(line)
        return len(kept)

    def _entries(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        for place, number, line in self._storage.lines():
            try:
                entry = exact_json.load(line)
            except ValueError as error:
                raise CorruptError(f"'{place}', line {number}, is damaged: it is not JSON ({error}).") from error
            if not isinstance(entry, dict):
                raise CorruptError(f"'{place}', line {number}, is damaged: it is not a JSON object.")
            yield line, entry


def _number_lines(place: str, content: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Place, line number and text of every line that ended."""
    *whole, _torn = content.split(b"\n")
    for number, line in enumerate(whole, start=1):
        yield place, number, line + b"\n"


class _LocalLines:
    """The file is opened for each line: it may have been replaced by a cut, and nothing must be closed."""

    def __init__(self, uri: str) -> None:
        self.uri, self.path = uri, files.local_path(uri)

    def append(self, line: bytes, sync: bool) -> None:
        guards.check(self.uri)  # before the file is made
        with writing(self.uri), self._lock_file() as descriptor:
            guards.check(self.uri)  # now that nobody else writes it
            os.ftruncate(descriptor, _end_of_last_line(descriptor))
            written = 0
            while written < len(line):
                written += os.write(descriptor, line[written:])
            if sync:
                os.fsync(descriptor)

    @contextmanager
    def _lock_file(self) -> Iterator[int]:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        try:
            descriptor = os.open(self.path, flags, 0o666)
        except FileNotFoundError:
            guards.make_folders(os.path.dirname(self.path))
            descriptor = os.open(self.path, flags, 0o666)
        try:
            with suppress(NoFlock):  # there a line is still one write
                flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def flush(self) -> None:
        guards.check(self.uri, now=True)
        if os.path.exists(self.path):
            with writing(self.uri), self._lock_file() as descriptor:
                os.fsync(descriptor)

    def size_bytes(self) -> int:
        try:
            return files.size_bytes(self.uri)
        except NotFound:
            return 0

    def lines(self) -> Iterator[tuple[str, int, bytes]]:
        with suppress(NotFound):
            yield from _number_lines(self.uri, files.read_bytes(self.uri))

    def replace(self, lines: list[bytes]) -> None:
        content = b"".join(lines)
        try:
            files.write_bytes(self.uri, content)
        except StorageFull:
            # Needs no room, but may surprise a reader that is in the middle of the file.
            os.truncate(self.path, len(content))


def _end_of_last_line(descriptor: int) -> int:
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


class _RemoteLines:
    """A writer only ever puts segments that it made itself, so several never undo each other's lines."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._number: int | None = None
        """The segment that this writer puts again; None until it has made one."""
        self._content = b""
        self._held_back = False
        self._put_at = -PUT_SECONDS

    def append(self, line: bytes, sync: bool) -> None:
        if len(self._content) >= SEGMENT_BYTES:
            self.flush()
            self._number, self._content = None, b""
        self._content += line
        self._held_back = True
        if sync or time.monotonic() - self._put_at >= PUT_SECONDS:
            self.flush()

    def flush(self) -> None:
        if not self._held_back:
            return
        guards.check(self.uri, now=True)
        if self._number is None:
            number = max(self._numbers(), default=0) + 1
            while not files.create(self._segment(number), self._content):
                number += 1
            self._number = number
        else:
            files.write_bytes(self._segment(self._number), self._content)
        self._held_back, self._put_at = False, time.monotonic()

    def size_bytes(self) -> int:
        return sum(files.size_bytes(self._segment(number)) for number in self._numbers())

    def lines(self) -> Iterator[tuple[str, int, bytes]]:
        self.flush()
        for number in self._numbers():
            segment = self._segment(number)
            yield from _number_lines(segment, files.read_bytes(segment))

    def replace(self, lines: list[bytes]) -> None:
        """Take away segments from the last one on, then shorten the one at the border: always a prefix."""
        left = sum(map(len, lines))
        numbers = self._numbers()
        starts = list(accumulate((files.size_bytes(self._segment(number)) for number in numbers), initial=0))
        for number, start in reversed(list(zip(numbers, starts[:-1], strict=True))):
            segment = self._segment(number)
            if start < left:
                files.write_bytes(segment, files.read_bytes(segment)[: left - start])
                break
            files.remove(segment)
        self._number, self._content, self._held_back = None, b"", False

    def _segment(self, number: int) -> str:
        return files.join(self.uri, f"{number:08d}.jsonl")

    def _numbers(self) -> list[int]:
        return sorted(int(entry.partition(".")[0]) for entry in files.list_directory(self.uri))
