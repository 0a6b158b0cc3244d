"""Folders that become real all at once: one marker object, written last, holds the digest of every file.

    begin(uri)                                       # one process
    with open_hashed(join(uri, "part-0")) as file:   # any number of processes
        ...
    commit(uri, {"part-0": file.digest, ...})        # one process, with everybody's digests

A folder without its marker does not exist for :func:`is_committed`, whatever is in it; :func:`discard` takes
the marker away first. The marker carries a checksum of itself, so :func:`verify` covers all that was written.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from postlude.storage import conditional, encryption, exact_json, files, guards
from postlude.storage.errors import CorruptError, NotFound, writing

MARKER = "COMMITTED"

_READERS = min(8, os.cpu_count() or 1)
"""So many files of a folder are read at a time."""


@dataclass(frozen=True)
class Digest:
    """What a file must be."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Marker:
    """What was committed."""

    files: Mapping[str, Digest]
    """By path below the folder."""
    extra: Mapping[str, Any]
    """What the writer wanted to be committed together with the files."""
    number: int = field(default=0, compare=False)
    """The fencing number of the lease under which it was written; 0 where the kernel held the lock, or nobody."""


class HashedFile(io.BufferedIOBase):
    """A file written from its start to its end, digested on the way; durable once it is closed."""

    def __init__(self, uri: str, file: IO[bytes]) -> None:
        self._uri, self._file = uri, file
        self._sha256, self._size = hashlib.sha256(), 0

    @property
    def digest(self) -> Digest:
        """The digest of what was written. ValueError before the file is closed: it may not have arrived yet."""
        if not self.closed:
            raise ValueError(f"'{self._uri}' is still being written.")
        return Digest(self._size, self._sha256.hexdigest())

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._sha256.update(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def fileno(self) -> int:
        return self._file.fileno()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        if self.closed:
            return
        try:
            with self._file:
                encryption.finish(self._file)
                self._file.flush()
                if files.is_local(self._uri):
                    with writing(self._uri):
                        os.fsync(self._file.fileno())
        finally:
            super().close()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
        elif not self.closed:  # an object would appear whole
            try:
                self._file.__exit__(kind, error, trace)
            finally:
                super().close()

    def __del__(self) -> None:
        self.__exit__(GeneratorExit, None, None)


def open_hashed(uri: str) -> HashedFile:
    """Open a file for writing, whose ``digest`` is known when it is closed."""
    return HashedFile(uri, files.open_file(uri, "wb"))


def begin(uri: str, named: str | None = None) -> None:
    """Make room for a folder that will be committed, under the name ``named`` if it gets another: whatever stood there
    is gone."""
    discard(uri)
    if files.is_local(uri):
        with writing(uri):
            guards.make_folders(files.local_path(uri))
    if encryption.is_encrypted(uri):
        encryption.new_key(uri, named or files.name(uri))


def commit(uri: str, digests: Mapping[str, Digest], extra: Mapping[str, Any] | None = None) -> None:
    """Make the folder real. ``digests`` is by path below ``uri``; ``extra`` is anything that JSON can hold.

    ValueError if a file is not there in its size: then a writer has not finished, and nothing is committed. LockedError
    if the folder is not this process's to write any more, or one that had the lock later has committed it.
    """
    guards.check(uri, now=True)
    for path, digest in digests.items():
        size = files.size_bytes(files.join(uri, path))
        if size != digest.size_bytes:
            raise ValueError(f"'{path}' in '{uri}' has {size} bytes where {digest.size_bytes} were written.")
    if files.is_local(uri):
        folder = files.local_path(uri)
        with writing(uri):
            for held in {os.path.dirname(path) for path in digests} | {""}:
                files.sync_folder(os.path.join(folder, held))
            files.sync_folder(os.path.dirname(os.path.abspath(folder)))
    sizes = {path: asdict(digest) for path, digest in sorted(digests.items())}
    body: dict[str, Any] = {"files": sizes, "extra": dict(extra or {})}
    guard = guards.guard_of(uri)
    if guard is not None and guard.number is not None:
        body["number"] = guard.number
    _put_marker(uri, exact_json.dump({**body, "sha256": checksum(body)}).encode(), guard)


def _put_marker(uri: str, content: bytes, guard: guards.Guard | None) -> None:
    """Where a lease is the lock its holder may be held up between a look at it and this write: then the marker of a
    later holder stays."""
    place = files.join(uri, MARKER)
    if guard is not None:
        guard.check(now=True)
        if guard.number is not None:
            if files.create(place, content):
                return
            tag = conditional.tag_of(place)
            if _read_marker(uri).number > guard.number or conditional.swap(place, content, tag) is None:
                raise guard.lost(f"a process that had it later has committed '{uri}'")
            return
    files.write_bytes(place, content)


def discard(uri: str) -> None:
    """Remove a folder, its marker first: at no moment is half of it committed."""
    files.remove(files.join(uri, MARKER))
    files.remove(uri)


def is_committed(uri: str) -> bool:
    """Whether the folder is real."""
    guard = guards.guard_of(uri)
    if guard is None or guard.number is None:
        return files.exists(files.join(uri, MARKER))
    with suppress(CorruptError):  # which is told when it is read
        try:
            read_marker(uri)
        except NotFound:
            return False
    return True


def read_marker(uri: str) -> Marker:
    """What was committed, the files themselves unread. NotFound if nothing was, CorruptError if it is damaged.

    What a process committed that had lost the lock by then was not.
    """
    marker, guard = _read_marker(uri), guards.guard_of(uri)
    if guard is not None and not guard.believes(uri, marker.number):
        raise NotFound(
            f"'{uri}' was never committed: a process that had lost the {guard.what} by then wrote its {MARKER}."
        )
    return marker


def _read_marker(uri: str) -> Marker:
    place = files.join(uri, MARKER)
    try:
        text = files.read_bytes(place)
    except NotFound as error:
        raise NotFound(f"'{uri}' was never committed: it has no file {MARKER}.") from error
    try:
        body = exact_json.load(text)
        digest = body.pop("sha256")
        sound = digest == checksum(body)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CorruptError(f"'{place}' is damaged: it is not what was written ({error}).") from error
    if not sound:
        raise CorruptError(f"'{place}' is damaged: its checksum does not fit its content.")
    return Marker(
        {path: Digest(**digest) for path, digest in body["files"].items()}, body["extra"], body.get("number", 0)
    )


def verify(uri: str, endings: tuple[str, ...] = ("",)) -> Marker:
    """Read every file with one of these endings again. CorruptError, naming the file, if one is missing or is not what
    was written."""
    marker = read_marker(uri)
    check(uri, marker, endings)
    return marker


def check(uri: str, marker: Marker, endings: tuple[str, ...] = ("",)) -> None:
    """Read every such file that ``marker`` speaks of below ``uri``. CorruptError as for :func:`verify`."""
    wanted = {files.join(uri, path): digest for path, digest in marker.files.items() if path.endswith(endings)}
    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(_check, wanted, wanted.values()))


def _check(place: str, digest: Digest) -> None:
    try:
        size = files.size_bytes(place)
    except NotFound as error:
        raise CorruptError(f"'{place}' is missing, but was committed with {digest.size_bytes} bytes.") from error
    if size != digest.size_bytes:
        raise CorruptError(f"'{place}' is damaged: it has {size} bytes, but {digest.size_bytes} were committed.")
    if sha256_of(place) != digest.sha256:
        raise CorruptError(f"'{place}' is damaged: its content is not what was committed.")


def sha256_of(uri: str) -> str:
    """The SHA-256 of a file, hexadecimal, read piece by piece."""
    with files.open_file(uri) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def checksum(body: Mapping[str, Any]) -> str:
    """SHA-256 of what JSON can hold, as it is written, hexadecimal."""
    return hashlib.sha256(exact_json.dump(body).encode()).hexdigest()
