"""Text files that hold records: JSON lines, one JSON array, comma or tab separated values.

A layout does two things: it cuts a stream of bytes into pieces of one record each, and it reads a piece. The
first is what an index is made of; the second can be done for any single piece, in any order. Pieces are cut
without decoding: all that delimits them is ASCII, in UTF-8 as in Latin-1, which maps bytes to characters one to
one. So a record that is not UTF-8 is found where it stands and spoils no other.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import IO, NamedTuple, NoReturn, Protocol

from postlude.data.example import Record
from postlude.data.formats.columns import kind_of, read_json
from postlude.data.records import Unreadable
from postlude.errors import DataError

_BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"
_BLANK = b" \t\r\n"
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
"""What tells where a JSON value ends: its brackets, and texts, in which they do not count. A text that is not whole yet
goes to the end, so that none is looked at twice."""

csv.field_size_limit(2**31 - 1)  # the module's default refuses fields of 128 KiB


class Piece(NamedTuple):
    """The bytes of one record."""

    start: int
    """Offset in the decompressed file."""
    number: int
    """Counted from 1 in the layout's unit."""
    raw: bytes


class Layout(Protocol):
    """How a file holds its records."""

    unit: str
    """What pieces are counted in, for a human: ``line`` or ``record``."""

    def pieces(self, stream: IO[bytes]) -> Iterator[Piece]:
        """The pieces of a file, from its start. DataError where it cannot be cut any further."""

    def decode(self, raw: bytes) -> Record | Unreadable:
        """The record in a piece."""


def layout_of(uri: str, kind: str, stream: IO[bytes]) -> Layout:
    """The layout of the file: by its kind (``jsonl``, ``json``, ``csv``, ``tsv``) and how ``stream`` begins."""
    if kind == "jsonl":
        return JsonLines()
    if kind == "json":
        begin = stream.read(2**16).removeprefix(_BYTE_ORDER_MARK.encode()).lstrip(_BLANK)
        return JsonArray(uri) if begin.startswith(b"[") else JsonLines()
    return Csv(uri, stream, "\t" if kind == "tsv" else ",")


class JsonLines:
    """One object a line; blank lines do not count."""

    unit = "line"

    def pieces(self, stream: IO[bytes]) -> Iterator[Piece]:
        start = 0
        for number, raw in enumerate(stream, 1):
            if not raw.isspace():
                yield Piece(start, number, raw)
            start += len(raw)

    def decode(self, raw: bytes) -> Record | Unreadable:
        try:
            text = raw.decode().removeprefix(_BYTE_ORDER_MARK)
        except UnicodeDecodeError as error:
            return _not_utf8(error)
        try:
            value = read_json(text)
        except json.JSONDecodeError as error:
            return Unreadable(f"it is not JSON: {error.msg} at column {error.colno}")
        except ValueError as error:
            return Unreadable(str(error))
        return value if isinstance(value, dict) else Unreadable(f"expected an object, found {kind_of(value)}")


class JsonArray(JsonLines):
    """One array of objects, read piece by piece."""

    unit = "record"

    def __init__(self, uri: str, chunk_bytes: int = 2**20) -> None:
        self._uri, self._chunk_bytes = uri, chunk_bytes

    def pieces(self, stream: IO[bytes]) -> Iterator[Piece]:
        window = _Window(stream, self._uri, self._chunk_bytes)
        window.skip_blank(_BYTE_ORDER_MARK.encode().decode("latin-1"))
        window.expect("[")
        number = 0
        while not window.next_is("]"):
            if number:
                window.expect(",")
            number += 1
            yield Piece(*window.value(number))
        window.expect("]")
        if not window.next_is(""):
            window.fail("expected nothing after the array")


class _Window:
    """The part of a JSON text that is being looked at."""

    def __init__(self, stream: IO[bytes], uri: str, chunk_bytes: int) -> None:
        self._stream, self._uri, self._chunk_bytes = stream, uri, chunk_bytes
        self._text, self._at, self._base, self._lines = "", 0, 0, 0
        self._is_whole = False
        self._decoder = json.JSONDecoder(parse_int=len)  # cut, not read: a number may have any digits

    def skip_blank(self, also: str = "") -> None:
        blank = _BLANK.decode() + also
        while True:
            while self._at < len(self._text) and self._text[self._at] in blank:
                self._at += 1
            if self._at < len(self._text) or not self._read_on():
                return

    def next_is(self, character: str) -> bool:
        """Whether it comes next; the empty one stands for the end of the file."""
        self.skip_blank()
        return self._text[self._at : self._at + 1] == character

    def expect(self, character: str) -> None:
        if not self.next_is(character):
            self.fail(f"expected '{character}'")
        self._at += 1

    def value(self, number: int) -> tuple[int, int, bytes]:
        """The offset of the value that comes next, its number, and its bytes."""
        self.skip_blank()
        while True:
            try:
                _, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._read_on():
                    self._at = error.pos
                    self.fail(error.msg)
                continue
            except RecursionError:
                nested_end = self._end_of_nested()
                if nested_end is None and self._read_on():
                    continue
                if nested_end is None:
                    self.fail("a value without an end")
                end = nested_end
            # A number that touches the end of what was read may go on.
            if end < len(self._text) or not self._read_on():
                break
        start, raw = self._base + self._at, self._text[self._at : end].encode("latin-1")
        self._at = end
        return start, number, raw

    def _end_of_nested(self) -> int | None:
        """Where the value ends that is nested too deeply to be decoded; None if more has to be read."""
        depth = 0
        for match in _STRUCTURE.finditer(self._text, self._at):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
            if not depth:
                return match.end()
        return None

    def fail(self, what: str) -> NoReturn:
        before = self._text[: self._at]
        line = self._lines + before.count("\n") + 1
        column = self._at - before.rfind("\n")
        raise DataError(
            f"'{self._uri}' holds a JSON array that breaks at line {line}, column {column}: {what}. What follows "
            "cannot be read either; mend the file, or write one object a line, so that one cannot spoil the others."
        )

    def _read_on(self) -> bool:
        if self._is_whole:
            return False
        # Reading twice as much each time keeps the work in proportion where one value is larger than a chunk.
        chunk = self._stream.read(max(self._chunk_bytes, len(self._text) - self._at))
        if not chunk:
            self._is_whole = True
            return False
        self._lines += self._text.count("\n", 0, self._at)
        self._text = self._text[self._at :] + chunk.decode("latin-1")
        self._base += self._at
        self._at = 0
        return True


class Csv:
    """A header and rows of text: values are not guessed to be numbers, dates or missing."""

    unit = "line"

    def __init__(self, uri: str, stream: IO[bytes], delimiter: str) -> None:
        self._uri, self._delimiter = uri, delimiter
        lines = _CountedLines(stream)
        header = next((row for row in csv.reader(lines, delimiter=delimiter) if row), [])
        try:
            names = [name.encode("latin-1").decode().removeprefix(_BYTE_ORDER_MARK) for name in header]
        except UnicodeDecodeError as error:
            raise DataError(f"The header of '{uri}' (line 1) is not UTF-8. Save the file as UTF-8.") from error
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(
                f"The header of '{uri}' (line 1) names the column '{twice}' more than once. Rename one of them."
            )
        self._header = names

    def pieces(self, stream: IO[bytes]) -> Iterator[Piece]:
        lines = _CountedLines(stream)
        rows = csv.reader(lines, delimiter=self._delimiter)
        is_header = True
        while True:
            start, number = lines.offset, lines.count + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise DataError(f"'{self._uri}', line {lines.count}, is not of the format: {error}.") from error
            raw = lines.take()
            if row is None:
                return
            if row and not is_header:
                yield Piece(start, number, raw)
            is_header = is_header and not row

    def decode(self, raw: bytes) -> Record | Unreadable:
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            return _not_utf8(error)
        try:
            row = next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True))
        except csv.Error as error:
            return Unreadable(f"it is not of the format: {error}")
        if len(row) != len(self._header):
            return Unreadable(f"it has {len(row)} values where the header names {len(self._header)} columns")
        return dict(zip(self._header, row, strict=True))


class _CountedLines:
    """Lines as characters that stand for bytes, and how far they have been read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.offset = self.count = 0
        self._taken: list[bytes] = []

    def __iter__(self) -> _CountedLines:
        return self

    def __next__(self) -> str:
        raw = next(self._stream)
        self.offset += len(raw)
        self.count += 1
        self._taken.append(raw)
        return raw.decode("latin-1")

    def take(self) -> bytes:
        """The bytes read since this was asked last."""
        taken, self._taken = b"".join(self._taken), []
        return taken


def _not_utf8(error: UnicodeDecodeError) -> Unreadable:
    byte = error.object[error.start]
    return Unreadable(f"byte {error.start + 1} of it (0x{byte:02x}) is not UTF-8; save the file as UTF-8")
