"""Reading a file as if it were not compressed, and never taking a part of it for the whole."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import IO

import zstandard

from postlude import storage
from postlude.errors import DataError

SUFFIXES = (".gz", ".zst")


def is_compressed(uri: str) -> bool:
    """Whether the name says so."""
    return uri.lower().endswith(SUFFIXES)


def open_plain(uri: str) -> IO[bytes]:
    """The decompressed content of a file. DataError, on reading, if it is damaged or ends too early."""
    file = storage.open_file(uri, "rb")
    if uri.lower().endswith(".gz"):
        return io.BufferedReader(_Decompressed(uri, file, gzip.GzipFile(fileobj=file)), buffer_size=2**20)
    if uri.lower().endswith(".zst"):
        return io.BufferedReader(_Decompressed(uri, file, _ZstandardFrames(file)), buffer_size=2**20)
    return file


class _Decompressed(io.RawIOBase):
    """Closes the file beneath, and tells damage as a DataError."""

    def __init__(self, uri: str, file: IO[bytes], content: io.BufferedIOBase | io.RawIOBase) -> None:
        self._uri, self._file, self._content = uri, file, content

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        try:
            return self._content.readinto(target) or 0
        except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
            raise DataError(
                f"'{self._uri}' cannot be decompressed: {error}. It is damaged or was not written to its end; fetch "
                "or write it again."
            ) from error

    def close(self) -> None:
        self._file.close()
        super().close()


class _ZstandardFrames(io.RawIOBase):
    """The frames of a file, one after another. The library's own reader takes a truncated frame for the end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._has_begun = False
        self._unread = b""
        self._ready = memoryview(b"")

    def readinto(self, target) -> int:
        while not self._ready:
            if self._frame.eof:
                self._unread = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._has_begun = False
            compressed = self._unread or self._file.read(2**15)
            self._unread = b""
            if not compressed:
                if self._has_begun:
                    raise EOFError("its last frame has no end")
                return 0
            self._has_begun = True
            self._ready = memoryview(self._frame.decompress(compressed))
        taken = min(len(target), len(self._ready))
        target[:taken] = self._ready[:taken]
        self._ready = self._ready[taken:]
        return taken
