"""Journals: JSON lines to which one line after another is added, and of which a reader always sees a prefix.

A local journal is one file. A line is added by a single write under an advisory lock, so several processes may
add; what a killed or full disk leaves of a line is never read, and is taken away by the next line.

A remote journal is a folder of numbered segments (``metrics.jsonl/00000001.jsonl``), since an object cannot be
appended to. A writer puts its last segment again, longer, until it has :data:`SEGMENT_BYTES`.

Where a journal is encrypted, a local one is line by line, and a remote one segment by segment.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, Any

from postlude.storage import conditional, encryption, exact_json, files, guards
from postlude.storage.commits import checksum
from postlude.storage.errors import CorruptError, NotFound, NotWritable, StorageFull, writing
from postlude.storage.locks import NoFlock, flock
from postlude.storage.schema import Line

if TYPE_CHECKING:
    from postlude.storage.envelope import FileCipher

SEGMENT_BYTES = 2**18
"""A remote segment that has grown to this size is left alone."""

PUT_SECONDS = 5.0
"""Remote lines are held back so long, unless they must be durable at once."""

_TAIL_BYTES = 2**16
_KEY = "sha256"


class Journal:
    """JSON objects in the order in which they were added, behind a local or a remote URI.

    ``schema`` is that of its lines, whose version is not told; ``remedy`` ends the error of a damaged line. In a
    ``sealed`` journal each line has a digest of its own, under the key ``sha256``, which is not told.

    Whatever reads entries raises CorruptError, which names the line at fault, and NewerSchema.
    """

    def __init__(self, uri: str, schema: type[Line] = Line, remedy: str = "", sealed: bool = False) -> None:
        self.uri, self.schema, self.remedy, self._sealed = uri, schema, remedy, sealed
        self._storage: _LocalLines | _RemoteLines = _LocalLines(uri) if files.is_local(uri) else _RemoteLines(uri)

    def append(self, entry: Mapping[str, Any], *, sync: bool = False) -> None:
        """Add an entry. With ``sync`` it is on the disk, or in the bucket, when the call returns."""
        stamped = self.schema.stamp(entry)
        sealed = {**stamped, _KEY: checksum(stamped)} if self._sealed else stamped
        self._storage.append(exact_json.dump(sealed).encode() + b"\n", sync)

    def flush(self) -> None:
        """Return when all that was added is on the disk, or in the bucket."""
        self._storage.flush()

    def size_bytes(self) -> int:
        """How much there is to read: grows with every entry that readers can see."""
        return self._storage.size_bytes()

    def read(self) -> list[dict[str, Any]]:
        """All entries that arrived whole; none if there is no journal."""
        return list(self)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The same, one after another."""
        return (entry for _, entry in self._entries())

    def last(self) -> dict[str, Any] | None:
        """The last entry that arrived whole, read from the end, however long the journal is; None if there is none."""
        for place in reversed(self._storage.stamps()):
            size, count = 0, _TAIL_BYTES
            with suppress(NotFound):  # an encrypted one that was torn in its first line
                size = files.size_bytes(place)
            start = size
            while start > 0:
                start = max(0, size - count)
                first, *lines = files.read_range(place, start, size - start).split(b"\n")
                whole = [first, *lines][:-1] if start == 0 else lines[:-1]
                if whole:
                    return self._entry(place, None, whole[-1])
                count *= 4
        return None

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

    # --- for a reader that goes on (storage/reader.py) ------------------------------------------------------

    def stamps(self) -> dict[str, str]:
        """The files of the journal, in order, each with a text that changes with what it holds."""
        return self._storage.stamps()

    def entries(self, place: str, number: int, content: bytes) -> list[dict[str, Any]]:
        """The entries of whole lines, the first of which is the line ``number``, from 1, of the file ``place``."""
        return [self._entry(*line) for line in _number_lines(place, content, number)]

    # --- lines as they stand --------------------------------------------------------------------------------

    def lines(self) -> Iterator[bytes]:
        """The lines as they stand, whether they can be read or not."""
        return (line for _, _, line in self._storage.lines())

    def rewrite(self, lines: Sequence[bytes]) -> None:
        """Hold these lines; what stood there is kept beside. For the only writer."""
        before = list(self.lines())
        if before:
            files.write_bytes(files.free_place(self.uri), b"".join(before))
        if files.is_local(self.uri):
            files.write_bytes(self.uri, b"".join(lines), lines=True)
            return
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, lines, strict=False)))
        self._storage.replace(before[:shared])
        for line in lines[shared:]:
            self._storage.append(line, False)
        self.flush()

    def drop_damaged(self, is_known: Callable[[dict[str, Any]], bool] = lambda entry: True) -> str | None:
        """Drop the lines that cannot be read, or hold what is not known; what stood there is kept beside. What was
        wrong, or None. For the only writer."""
        sound, damages = [], []
        for place, number, line in self._storage.lines():
            try:
                if not is_known(self._entry(place, number, line)):
                    raise self._damage(place, number, "nothing like it is known")
            except CorruptError as error:
                damages.append(str(error))
            else:
                sound.append(line)
        if damages:
            self.rewrite(sound)
        return damages[0] if damages else None

    def _entries(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        for place, number, line in self._storage.lines():
            yield line, self._entry(place, number, line)

    def _entry(self, place: str, number: int | None, line: bytes) -> dict[str, Any]:
        try:
            entry = exact_json.load(line)
        except (ValueError, RecursionError) as error:
            raise self._damage(place, number, f"it is not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise self._damage(place, number, "it is not a JSON object")
        digest = entry.pop(_KEY, None) if self._sealed else None
        if digest is not None and digest != checksum(entry):
            raise self._damage(place, number, "its digest does not fit its content")
        if (wrong := self.schema.read(entry, _where(place, number))) is not None:
            raise self._damage(place, number, wrong)
        return entry

    def _damage(self, place: str, number: int | None, why: str) -> CorruptError:
        return CorruptError(f"{_where(place, number)} is damaged: {why}. {self.remedy}".rstrip())


def _where(place: str, number: int | None) -> str:
    return f"The last line of '{place}'" if number is None else f"'{place}', line {number},"


def is_entry(line: bytes) -> bool:
    """Whether a line can be read at all."""
    try:
        return isinstance(exact_json.load(line), dict)
    except (ValueError, RecursionError):
        return False


def _number_lines(place: str, content: bytes, first: int = 1) -> Iterator[tuple[str, int, bytes]]:
    """Place, line number and text of every line that ended."""
    *whole, _torn = content.split(b"\n")
    for number, line in enumerate(whole, first):
        yield place, number, line + b"\n"


class _LocalLines:
    """The file is opened for each line: it may have been replaced by a cut, and nothing must be closed."""

    def __init__(self, uri: str) -> None:
        self.uri, self.path = uri, files.local_path(uri)
        self._cipher: tuple[bytes, FileCipher] | None = None
        """Of the file that begins so."""

    def append(self, line: bytes, sync: bool) -> None:
        guards.check(self.uri)  # before the file is made
        is_encrypted = encryption.is_encrypted(self.uri)
        if is_encrypted:
            self._prepare_for_lines()
        with writing(self.uri), self._lock_file() as descriptor:
            guards.check(self.uri)  # now that nobody else writes it
            end = _end_of_last_line(descriptor)
            os.ftruncate(descriptor, end)
            if is_encrypted:
                line = self._sealed(descriptor, end, line)
            written = 0
            while written < len(line):
                written += os.write(descriptor, line[written:])
            if sync:
                os.fsync(descriptor)

    def _prepare_for_lines(self) -> None:
        """A copy of a journal has come as a file to which nothing can be added."""
        begin = b""
        with suppress(FileNotFoundError), open(self.path, "rb") as file:
            begin = file.read(encryption.LINES_BEGIN_BYTES)
        if not encryption.begins_lines(begin):
            files.write_bytes(self.uri, files.read_bytes(self.uri), lines=True)

    def _sealed(self, descriptor: int, end: int, line: bytes) -> bytes:
        """A line as it is added to what ends there: in an empty file it follows the header."""
        if end == 0:
            return encryption.seal(self.uri, line, lines=True)
        begin = os.pread(descriptor, encryption.LINES_BEGIN_BYTES, 0)
        if self._cipher is None or self._cipher[0] != begin:
            self._cipher = begin, encryption.cipher_of(self.uri, begin)
        return self._cipher[1].seal_line(end, line)

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

    def stamps(self) -> dict[str, str]:
        try:
            return {self.uri: files.modified_fingerprint(self.uri)}
        except NotFound:
            return {}

    def lines(self) -> Iterator[tuple[str, int, bytes]]:
        with suppress(NotFound), files.open_file(self.uri) as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):  # the end, though a writer may have added the rest of it meanwhile
                    break
                yield self.uri, number, line

    def replace(self, lines: list[bytes]) -> None:
        content = b"".join(lines)
        try:
            files.write_bytes(self.uri, content, lines=True)
        except StorageFull:
            # Needs no room, but may surprise a reader that is in the middle of the file.
            size = len(content)
            os.truncate(self.path, files.place_of_line(self.uri, size) if encryption.is_encrypted(self.uri) else size)


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
        self._tried = b""
        """What it put last, whether that arrived or not."""
        self._tag: str | None = None
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
            self._number, self._tag = number, conditional.tag_of(self._segment(number))
            self._tried = self._content
        else:
            self._put_again(self._segment(self._number))
        self._held_back, self._put_at = False, time.monotonic()

    def _put_again(self, segment: str) -> None:
        """Replace a segment by a longer one, unless a process that has the journal now has cut it."""
        tried, self._tried = self._tried, self._content
        tag = conditional.swap(segment, self._content, self._tag)
        if tag is None:
            self._tag = conditional.tag_of(segment)
            if files.read_bytes(segment) == tried:  # by a try whose answer got lost
                tag = conditional.swap(segment, self._content, self._tag)
        if tag is None:
            guards.check(self.uri, now=True)
            raise NotWritable(f"'{segment}' was changed by another process. See that nothing else writes there.")
        self._tag = tag

    def size_bytes(self) -> int:
        return sum(map(files.size_bytes, self._files()))

    def stamps(self) -> dict[str, str]:
        self.flush()
        return self._files()

    def _files(self) -> dict[str, str]:
        found = files.modified_fingerprints(self.uri)
        if (name := files.name(self.uri)) in found:  # one object: a local journal that was copied here
            return {self.uri: found[name]}
        return {self._segment(number): found[name] for number, name in sorted((_number(name), name) for name in found)}

    def lines(self) -> Iterator[tuple[str, int, bytes]]:
        for place in self.stamps():
            yield from _number_lines(place, files.read_bytes(place))

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
        return sorted(map(_number, files.list_directory(self.uri)))


def _number(segment: str) -> int:
    return int(segment.partition(".")[0])
