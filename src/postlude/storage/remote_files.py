"""Open files behind remote URIs, whose faults are told as those of a local one are.

What is written appears whole when the file is closed; after an exception in its block, or when it is let go unclosed,
nothing does, and what was there before stays. What is read is one version of the object, to the end.
"""

from __future__ import annotations

import errno
import io
from contextlib import suppress
from typing import Any

from postlude.storage.errors import NotReadable, reading, writing
from postlude.storage.positioned import Positioned
from postlude.storage.refusals import code_of

_LEAST_AHEAD_BYTES, _MOST_AHEAD_BYTES = 2**13, 2**24
"""What is read ahead of a reader that goes from one end to the other: the more the longer it has."""


class RemoteWriter(io.BufferedIOBase):
    """Writes one object."""

    def __init__(self, uri: str, file: Any) -> None:
        self._uri, self._file = uri, file

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        with writing(self._uri):
            return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if self.closed:
            return
        try:
            with writing(self._uri):
                self._file.close()
        except BaseException:
            self._discard()
            raise
        finally:
            super().close()

    def abort(self) -> None:
        """Close, and leave nothing of what was written."""
        if not self.closed:
            self._discard()
            super().close()

    def _discard(self) -> None:
        with suppress(Exception):  # of a store that is not there: what was sent is an upload that nobody completes
            self._file.discard()
        with suppress(AttributeError):
            self._file.closed = True

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        self.abort()


class TextWriter(io.TextIOWrapper):
    """Text for such a file."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
        elif not self.closed:
            self.buffer.__exit__(kind, error, trace)  # type: ignore[attr-defined]

    def __del__(self) -> None:
        self.__exit__(GeneratorExit, None, None)


class RemoteReader(Positioned):
    """Reads one object of an :class:`~postlude.storage.object_store.ObjectStore` by ranges."""

    def __init__(self, uri: str, store: Any, path: str) -> None:
        info = store.info(path)
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "It is a folder", uri)
        self._uri, self._store, self._path = uri, store, path
        self.size = info["size"]
        self._tag = info.get("ETag")
        self._held, self._held_from, self._ahead = b"", 0, 0

    def readall(self) -> bytes:
        return self._take(self.size)

    def readinto(self, target: Any, /) -> int:
        view = memoryview(target).cast("B")
        content = self._take(self._at + len(view))
        view[: len(content)] = content
        return len(content)

    def _take(self, end: int) -> bytes:
        start, end = self._at, min(end, self.size)
        if start >= end:
            return b""
        held_to = self._held_from + len(self._held)
        if not self._held_from <= start <= end <= held_to:
            goes_on = bool(self._held) and self._held_from <= start <= held_to
            self._ahead = min(max(2 * self._ahead, _LEAST_AHEAD_BYTES), _MOST_AHEAD_BYTES) if goes_on else 0
            kept = self._held[start - self._held_from :] if goes_on else b""
            self._held = kept + self._fetch(start + len(kept), min(end + self._ahead, self.size))
            self._held_from = start
        self._at = end
        return self._held[start - self._held_from : end - self._held_from]

    def _fetch(self, start: int, end: int) -> bytes:
        with reading(self._uri):
            try:
                content = self._store.get_range(self._path, start, end, self._tag)
            except OSError as error:
                if code_of(error) in ("PreconditionFailed", "412"):
                    raise NotReadable(f"'{self._uri}' was replaced while it was read. Read it again.") from error
                raise
        if len(content) != end - start:
            raise NotReadable(f"'{self._uri}' gave {len(content)} of {end - start} bytes. Read it again.")
        return content
