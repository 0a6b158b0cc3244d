"""What is encrypted, and how: for :mod:`postlude.storage.files`, so that nobody above it knows.

Everything is that stands where a rule says ``encrypt``, but for the records of the keys and for locks, which hold who
works on a run and no content: they are read before there is a key, and by who may not have one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

from postlude.storage import uris
from postlude.storage.errors import NotReadable
from postlude.storage.keys import RECORD, rule_for

if TYPE_CHECKING:
    from postlude.storage.envelope import FileCipher

_CLEAR = re.compile(rf"{RECORD}|.*\.lock(\.[0-9a-f]{{8}}(\.unfinished)?)?")

LINES_BEGIN_BYTES = 89
"""Of the header of a file to which lines are added."""

_read: Callable[[str], bytes]
_create: Callable[[str, bytes], bool]


def connect(read: Callable[[str], bytes], create: Callable[[str, bytes], bool]) -> None:
    """Have records read and made with these."""
    global _read, _create
    _read, _create = read, create


_BEGINNINGS = (b"\x89PLENC\r\n", b"iVBMRU5DDQo")
"""Of encrypted files, of frames and of lines."""


def in_clear(uri: str, content: bytes) -> bytes:
    """What was read where nothing says that it is encrypted. NotReadable if it is."""
    if content.startswith(_BEGINNINGS):
        raise NotReadable(
            f"'{uri}' is encrypted, and no rule says with which key. Name the manifest that does: --storage MANIFEST."
        )
    return content


def is_encrypted(uri: str) -> bool:
    """Whether what stands there is encrypted, or must be."""
    return rule_for(uri).encrypt is not None and not _CLEAR.fullmatch(uris.name(uri))


def hides(uri: str, name: str) -> bool:
    """Whether a listing of the folder leaves out a name."""
    return name == RECORD and rule_for(uri).encrypt is not None


def new_key(folder: str, named: str) -> None:
    """Give a folder that is going to be committed, under that name, a data key of its own."""
    from postlude.storage import data_keys

    data_keys.new_key(folder, named, _read, _create)


def new_cipher(uri: str, lines: bool = False) -> FileCipher:
    """What encrypts a file that is about to be written anew."""
    from postlude.storage import data_keys, envelope

    key, path = data_keys.key_to_write(uri, _read, _create)
    return envelope.FileCipher(key, uri, path, envelope.new_header(key, lines))


def cipher_of(uri: str, begin: bytes) -> FileCipher:
    """What decrypts a file that begins so. CorruptError, also where it is not encrypted."""
    from postlude.storage import data_keys, envelope

    header = envelope.read_header(uri, begin)
    key, path = data_keys.key_to_read(uri, envelope.key_id(header), _read)
    return envelope.FileCipher(key, uri, path, header)


def writer(file: IO[bytes], cipher: FileCipher) -> IO[bytes]:
    """Encrypts what is written into a file, which is open."""
    from postlude.storage.envelope import Writer

    return Writer(file, cipher)  # type: ignore[return-value]


def seal(uri: str, content: bytes, lines: bool = False) -> bytes:
    """A file with this content, as it stands; of ``lines`` if some are going to be added."""
    from postlude.storage import envelope

    cipher = new_cipher(uri, lines)
    if lines:
        return envelope.seal_lines(cipher, content.splitlines(keepends=True))
    sealed = io.BytesIO()
    with writer(_Kept(sealed), cipher) as file:  # type: ignore[arg-type]
        file.write(content)
    return sealed.getvalue()


class _Kept(io.BufferedIOBase):
    """Writes into what stays open when this is closed."""

    def __init__(self, file: io.BytesIO) -> None:
        self._file = file

    def write(self, data: Any, /) -> int:
        return self._file.write(data)


def reader(uri: str, file: Any) -> io.RawIOBase:
    """The content of a file that is open, as it stands, which is closed with it. CorruptError."""
    from postlude.storage import envelope
    from postlude.storage.line_files import LineReader

    try:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        begin = file.read(envelope.HEADER_LINE_BYTES)
        cipher = cipher_of(uri, begin)
    except BaseException:
        file.close()
        raise

    def fetch(start: int, count: int) -> bytes:
        file.seek(start)
        return file.read(count)

    if envelope.is_of_lines(begin):
        return LineReader(uri, cipher, size, fetch, file.close)
    return envelope.Reader(uri, cipher, size, fetch, file.close)


def begins_lines(begin: bytes) -> bool:
    """Whether what a file begins with, though it may be torn, or empty, is of one to which lines are added."""
    from postlude.storage import envelope

    return envelope.begins_lines(begin)


def content_bytes(uri: str, size_bytes: int) -> int:
    """How much a file of frames holds that has so many bytes."""
    from postlude.storage import envelope

    return envelope.content_bytes(uri, size_bytes)


def finish(file: Any) -> None:
    """Have all of an open file written that is being encrypted: nothing comes behind it."""
    if hasattr(file, "finish"):
        file.finish()
