"""How an encrypted file stands on a disk or in a bucket: AES-256-GCM in frames, each of which is checked before a byte
of it is released, so that any range can be read alone.

    header   64 bytes:  0 magic, 8 version, 9 kind, 10 six zeros, 16 id of the data key, 32 salt
    frame    up to 65,536 bytes of content, encrypted, and 16 of its tag; only the last may be shorter, or empty

- The file's own key is HKDF-SHA-256 of the data key, with the salt and the id.
- The nonce of a frame is its number (11 bytes) and whether it is the last (1 byte): under one key, which is new with
  each time that a file is written, no nonce comes twice.
- Its additional data are those twelve bytes and the SHA-256 of the header, the name of the folder that the data key is
  for, and the path below it.

So a frame fits its number in its file at its place and nothing else, and a file that was cut has no last frame. A frame
is small, so that a tensor of a few megabytes takes little more than itself, and yet large enough for the cipher: ones
of a megabyte are not a tenth quicker.

A file to which lines are added is of the second kind: each line is base64 and ends with a line feed. The first holds
the header; each other a nonce (12 random bytes, since a line that was torn or cut is written again), the encrypted
line and its tag. Its additional data are that SHA-256 and where the line begins in the file (8 bytes).
Numbers are big-endian.
"""

from __future__ import annotations

import binascii
import hashlib
import io
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import IO, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from postlude.storage.errors import CorruptError, NotFound
from postlude.storage.positioned import Positioned

FRAME_BYTES = 2**16
"""Of content in a frame."""
TAG_BYTES = 16
HEADER_BYTES = 64
BATCH_FRAMES = 16
"""So many frames are encrypted, and read, at a time."""

_MAGIC, _VERSION = b"\x89PLENC\r\n", 1
_FRAMES, _LINES = 1, 2
_LINES_BEGIN = binascii.b2a_base64(_MAGIC + bytes([_VERSION]), newline=False)
_NONCE_BYTES = 12
_THREADS, _BATCHES_AHEAD = 2, 4


class NotEncrypted(CorruptError):
    """A clear file stands where an encrypted one belongs."""


@dataclass(frozen=True)
class DataKey:
    """What the files of one artifact, checkpoint or stage are encrypted with."""

    id: bytes
    """16 random bytes."""
    secret: bytes = field(repr=False)
    """32 bytes."""
    folder: str
    """The name of the folder that it is for."""


def changed(uri: str, why: str) -> CorruptError:
    """The error of an encrypted file that is not what was written at its place."""
    return CorruptError(
        f"'{uri}' is damaged: it was changed, or is not the file that was written there ({why}). Nothing of it was "
        "used. Put back what was there, or remove it."
    )


class FileCipher:
    """Encrypts and decrypts one file, ``path`` below the folder of its key."""

    def __init__(self, key: DataKey, uri: str, path: str, header: bytes) -> None:
        self._uri, self.header = uri, header
        secret = HKDF(SHA256(), 32, header[32:], b"postlude file" + key.id).derive(key.secret)
        self._cipher = AESGCM(secret)
        self._bound = hashlib.sha256(header + key.folder.encode() + b"\0" + path.encode()).digest()

    def seal_frame(self, number: int, is_last: bool, content: Any, sealed: Any) -> None:
        """Encrypt a frame into the buffer ``sealed``, which has room for its tag as well."""
        place = _place(number, is_last)
        self._cipher.encrypt_into(place, content, place + self._bound, sealed)

    def open_frame(self, number: int, is_last: bool, sealed: Any) -> bytes:
        """The content of a frame. CorruptError."""
        place = _place(number, is_last)
        try:
            return self._cipher.decrypt(place, sealed, place + self._bound)
        except (InvalidTag, ValueError) as error:
            raise changed(self._uri, f"its frame {number} is not authentic") from error

    def open_frame_into(self, number: int, is_last: bool, sealed: Any, content: Any) -> None:
        """The same, into a buffer of its size. CorruptError, which leaves there what nobody may use."""
        place = _place(number, is_last)
        try:
            self._cipher.decrypt_into(place, sealed, place + self._bound, content)
        except (InvalidTag, ValueError) as error:
            raise changed(self._uri, f"its frame {number} is not authentic") from error

    def seal_line(self, start: int, line: bytes) -> bytes:
        """A line that begins so many bytes from the begin of the file, as it stands there, with its line feed."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._cipher.encrypt(nonce, line.removesuffix(b"\n"), self._bound + start.to_bytes(8))
        return binascii.b2a_base64(nonce + sealed)

    def open_line(self, start: int, line: bytes) -> bytes:
        """The line behind :meth:`seal_line`. CorruptError."""
        try:
            sealed = _from_base64(line.removesuffix(b"\n"))
            content = self._cipher.decrypt(
                sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], self._bound + start.to_bytes(8)
            )
        except (InvalidTag, ValueError) as error:
            raise changed(self._uri, f"its line at byte {start} is not authentic") from error
        return content + b"\n"


def _from_base64(text: bytes) -> bytes:
    content = binascii.a2b_base64(text, strict_mode=True)
    if binascii.b2a_base64(content, newline=False) != text:
        raise ValueError("its last bits say nothing")
    return content


def _place(number: int, is_last: bool) -> bytes:
    return number.to_bytes(11) + bytes([is_last])


# --- headers --------------------------------------------------------------------------------------------------


def new_header(key: DataKey, lines: bool = False) -> bytes:
    """The header of a file that is about to be written."""
    return _MAGIC + bytes([_VERSION, _LINES if lines else _FRAMES]) + bytes(6) + key.id + os.urandom(32)


def header_line(header: bytes) -> bytes:
    """The first line of a file of lines."""
    return binascii.b2a_base64(header)


HEADER_LINE_BYTES = len(header_line(bytes(HEADER_BYTES)))


def is_of_lines(begin: bytes) -> bool:
    """Whether a file that begins so is one to which lines are added."""
    return begin.startswith(_LINES_BEGIN)


def begins_lines(begin: bytes) -> bool:
    """Whether what a file begins with, though it may be torn, or empty, is of one to which lines are added."""
    return is_of_lines(begin) or _LINES_BEGIN.startswith(begin)


def read_header(uri: str, begin: bytes) -> bytes:
    """The header that a file begins with. :class:`NotEncrypted`, CorruptError; NotFound for a file in which there is
    not even a header yet."""
    lines = is_of_lines(begin)
    if begins_lines(begin) and b"\n" not in begin:
        raise NotFound(f"There is nothing at '{uri}': its first line was never written whole. Check the path.")
    if not lines and not begin.startswith(_MAGIC):
        raise NotEncrypted(
            f"'{uri}' is not encrypted, and what stands there must be: its place has a key. Nothing of it was used. "
            "Remove it, or take 'encrypt' from its place under 'storage' if it was written before that."
        )
    try:
        header = _from_base64(begin[: HEADER_LINE_BYTES - 1]) if lines else begin[:HEADER_BYTES]
    except ValueError as error:
        raise changed(uri, "its header is damaged") from error
    if len(header) < HEADER_BYTES:
        raise changed(uri, "its header is cut")
    if header[8] != _VERSION or header[9] != (_LINES if lines else _FRAMES) or any(header[10:16]):
        raise changed(uri, f"its header says version {header[8]}, kind {header[9]}, which this postlude does not know")
    return header


def key_id(header: bytes) -> bytes:
    """The id of the data key that a file names."""
    return header[16:32]


def content_bytes(uri: str, size_bytes: int) -> int:
    """How much a file of frames holds that has so many bytes. CorruptError."""
    body = size_bytes - HEADER_BYTES
    frames = -(-body // (FRAME_BYTES + TAG_BYTES))
    if body < TAG_BYTES or body - (frames - 1) * (FRAME_BYTES + TAG_BYTES) < TAG_BYTES:
        raise changed(uri, f"it was cut to {size_bytes} bytes")
    return body - frames * TAG_BYTES


# --- files of frames ------------------------------------------------------------------------------------------


class Writer(io.BufferedIOBase):
    """Encrypts what is written, from start to end, into a file, which is closed with it. Frames are encrypted by two
    threads while those before are written. After an error in its ``with`` block the file stays without an end."""

    def __init__(self, file: IO[bytes], cipher: FileCipher) -> None:
        self._file, self._cipher = file, cipher
        self._waiting, self._number, self._size = bytearray(), 0, 0
        self._pool: ThreadPoolExecutor | None = None
        self._sealed: deque[Future[bytearray]] = deque()
        self._finished = False
        file.write(cipher.header)

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        size, room = len(view), BATCH_FRAMES * FRAME_BYTES
        while view:
            if len(self._waiting) == room:  # and more comes, so that its last frame is not the file's
                self._send()
            piece = view[: room - len(self._waiting)]
            self._waiting += piece
            view = view[len(piece) :]
        self._size += size
        return size

    def _send(self) -> None:
        self._pool = self._pool or ThreadPoolExecutor(_THREADS, thread_name_prefix="encryption")
        self._sealed.append(self._pool.submit(_seal, self._cipher, self._number, self._waiting, False))
        self._waiting, self._number = bytearray(), self._number + BATCH_FRAMES
        while len(self._sealed) > _BATCHES_AHEAD:
            self._file.write(self._sealed.popleft().result())

    def finish(self) -> None:
        """Write the end: nothing comes behind it."""
        if self._finished:
            return
        self._finished = True
        while self._sealed:
            self._file.write(self._sealed.popleft().result())
        self._file.write(_seal(self._cipher, self._number, self._waiting, True))

    def tell(self) -> int:
        return self._size

    def fileno(self) -> int:
        return self._file.fileno()

    def flush(self) -> None:
        """What is waiting to be encrypted stays so, until there is enough of it or the file ends."""
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        if self.closed:
            return
        try:
            with self._file:
                self.finish()
        finally:
            self._end()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None or self.closed:
            self.close()
            return
        self._finished = True
        try:
            self._file.__exit__(kind, error, trace)
        finally:
            self._end()

    def __del__(self) -> None:
        self.__exit__(GeneratorExit, None, None)

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        super().close()


def _seal(cipher: FileCipher, first: int, content: bytearray, ends: bool) -> bytearray:
    """The frames of some content, of which the first has this number, one behind the other."""
    starts = range(0, len(content), FRAME_BYTES) or range(1)
    sealed = bytearray(len(content) + TAG_BYTES * len(starts))
    clear, out, at = memoryview(content), memoryview(sealed), 0
    for number, start in enumerate(starts, first):
        piece = clear[start : start + FRAME_BYTES]
        is_last = ends and start == starts[-1]
        cipher.seal_frame(number, is_last, piece, out[at : at + len(piece) + TAG_BYTES])
        at += len(piece) + TAG_BYTES
    return sealed


class Reader(Positioned):
    """The content of a file of frames. ``fetch(start, count)`` gives bytes of it as it stands; ``size_bytes`` is that
    of the whole file. Whatever is read raises CorruptError where it is not what was written."""

    def __init__(
        self, uri: str, cipher: FileCipher, size_bytes: int, fetch: Callable[[int, int], Any], close: Callable[[], None]
    ) -> None:
        self._uri, self._cipher, self._fetch, self._close = uri, cipher, fetch, close
        self.size = content_bytes(uri, size_bytes)
        self._last = max(0, -(-self.size // FRAME_BYTES) - 1)
        self._ended = False
        self._kept: tuple[int, bytes] = (-1, b"")
        self._pool: ThreadPoolExecutor | None = None

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self.size - self._at)
        if wanted <= 0:
            if len(view) and not self._ended:
                self._frame(self._last, self._sealed(self._last, self._last))
            return 0
        first = self._at // FRAME_BYTES
        last = min((self._at + wanted - 1) // FRAME_BYTES, first + BATCH_FRAMES - 1)
        view = view[: min(wanted, (last + 1) * FRAME_BYTES - self._at)]
        try:
            self._read(first, last, view)
        except BaseException:
            view[:] = bytes(len(view))
            raise
        self._at += len(view)
        return len(view)

    def _read(self, first: int, last: int, view: memoryview) -> None:
        """Fill ``view`` from these frames, the first from where the reader is in it."""
        sealed = b"" if first == last == self._kept[0] else self._sealed(first, last)
        skip, done, whole = self._at - first * FRAME_BYTES, 0, []
        for number, start in zip(range(first, last + 1), count(0, FRAME_BYTES + TAG_BYTES)):
            length = min(FRAME_BYTES, self.size - number * FRAME_BYTES)
            piece = sealed[start : start + length + TAG_BYTES]
            if skip == 0 and len(view) - done >= length and number != self._kept[0]:
                whole.append((number, piece, view[done : done + length]))
                done += length
            else:
                part = memoryview(self._frame(number, piece))[skip : skip + len(view) - done]
                view[done : done + len(part)] = part
                done += len(part)
            skip = 0
        if len(whole) < BATCH_FRAMES // 2:
            self._open_into(whole)
            return
        self._pool = self._pool or ThreadPoolExecutor(_THREADS - 1, thread_name_prefix="decryption")
        other = self._pool.submit(self._open_into, whole[::2])
        try:
            self._open_into(whole[1::2])
        finally:
            other.result()

    def _open_into(self, frames: list[tuple[int, Any, memoryview]]) -> None:
        for number, sealed, out in frames:
            self._cipher.open_frame_into(number, number == self._last, sealed, out)
            self._ended = self._ended or number == self._last

    def _sealed(self, first: int, last: int) -> memoryview:
        """Some frames, as they stand."""
        whole = FRAME_BYTES + TAG_BYTES
        return memoryview(self._fetch(HEADER_BYTES + first * whole, (last + 1 - first) * whole))

    def _frame(self, number: int, sealed: Any) -> bytes:
        """One frame, which is kept until another is asked for."""
        if number != self._kept[0]:
            self._kept = number, self._cipher.open_frame(number, number == self._last, sealed)
            self._ended = self._ended or number == self._last
        return self._kept[1]

    def readall(self) -> bytes:
        content = bytearray(max(0, self.size - self._at))
        view, done = memoryview(content), 0
        while count := self.readinto(view[done:]):
            done += count
        if not len(content):
            self.readinto(bytearray(1))
        return bytes(content)

    def close(self) -> None:
        if not self.closed:
            try:
                self._close()
            finally:
                if self._pool is not None:
                    self._pool.shutdown()
                super().close()


# --- files of lines -------------------------------------------------------------------------------------------


def seal_lines(cipher: FileCipher, lines: list[bytes]) -> bytes:
    """A whole file of lines, as it stands."""
    content = [header_line(cipher.header)]
    at = len(content[0])
    for line in lines:
        content.append(cipher.seal_line(at, line))
        at += len(content[-1])
    return b"".join(content)
