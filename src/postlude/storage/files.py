"""Files and folders behind URIs: local paths, and everything that fsspec knows (``s3://``, ``memory://``, ...).

Local files are handled by the operating system directly; fsspec is imported when the first remote URI is met.

- Writing creates the folders above.
- :func:`write_bytes` and :func:`write_text` are atomic and durable: a reader sees the old content or the new,
  whenever the writer is killed. A remote object appears whole by its nature.
- What prevents a read or a write is raised as a :class:`~postlude.storage.errors.StorageError`, also in the
  middle of a file.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import IO, Any

from postlude.manifest.storage import S3
from postlude.nearest import nearest
from postlude.storage import encryption, guards, remote_files
from postlude.storage.credentials import Connection, connection_of, options
from postlude.storage.errors import NotReadable, StorageError, reading, writing
from postlude.storage.rules import rule_of
from postlude.storage.uris import is_local, local_path, name
from postlude.storage.uris import join as join  # names of files are files' as well
from postlude.storage.uris import parent as parent

UNFINISHED = ".unfinished"
"""How the name of a local file or folder ends while it is being written: no listing shows it."""

NO_LINKS = (errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
"""What a file system says that gives no file a second name, or not this one."""

_LONGEST_NAME_BYTES = 255
"""What file systems take."""
_BUFFER_BYTES = 2**16
"""Of a file that is decrypted: a frame."""


def unfinished_name(base: str, mark: str) -> str:
    """The name under which ``base`` is written beside its place."""
    name = f".{base}.{mark}{UNFINISHED}"
    if len(os.fsencode(name)) > _LONGEST_NAME_BYTES:
        name = f".{hashlib.sha256(os.fsencode(base)).hexdigest()}.{mark}{UNFINISHED}"
    return name


def open_file(uri: str, mode: str = "rb") -> IO[Any]:
    """Open ``r``, ``w``, ``rb`` or ``wb``; text is UTF-8 with its line ends left as they are.

    A file being written is not atomic: it belongs into a folder that is committed as a whole.
    """
    if mode not in ("r", "w", "rb", "wb"):
        raise ValueError(f"A file is opened with one of r, w, rb, wb, not '{mode}'.")
    writes, is_encrypted = mode[0] == "w", encryption.is_encrypted(uri)
    if writes:
        guards.check(uri)
    cipher = encryption.new_cipher(uri) if writes and is_encrypted else None
    with writing(uri) if writes else reading(uri):
        if is_local(uri):
            path = local_path(uri)
            binary = _open_for_writing(uri, path) if writes else io.BufferedReader(io.FileIO(path))
        else:
            binary = _open_object(uri, writes)
    if cipher is not None:
        binary = encryption.writer(binary, cipher)
    elif is_encrypted:
        binary = io.BufferedReader(encryption.reader(uri, binary), _BUFFER_BYTES)
    if mode.endswith("b"):
        return binary
    kind = io.TextIOWrapper if is_local(uri) or not writes else remote_files.TextWriter
    return kind(binary, encoding="utf-8", newline="\n")


def read_bytes(uri: str) -> bytes:
    """The content of a file. :class:`~postlude.storage.errors.NotFound` if there is none."""
    if not is_local(uri) and not encryption.is_encrypted(uri):
        filesystem, path = remote(uri)
        with reading(uri):
            return encryption.in_clear(uri, filesystem.cat_file(path))
    with open_file(uri, "rb") as file:
        content = file.read()
    return content if encryption.is_encrypted(uri) else encryption.in_clear(uri, content)


def read_range(uri: str, start: int, count: int) -> bytes:
    """At most ``count`` bytes of a file from ``start`` on; none behind its end. NotFound if there is no file."""
    if encryption.is_encrypted(uri):
        return _read_encrypted_range(uri, start, count)
    if is_local(uri):
        with reading(uri), io.FileIO(local_path(uri)) as file:
            return os.pread(file.fileno(), count, start)  # a short count is as good as any
    filesystem, path = remote(uri)
    with reading(uri):
        try:
            return filesystem.cat_file(path, start=start, end=start + count)
        except FileNotFoundError:
            raise
        except OSError:  # what S3 says of a range behind the end
            if start < filesystem.info(path)["size"]:
                raise
            return b""


def place_of_line(uri: str, start: int) -> int:
    """Where a line begins in an encrypted local file of lines, as it stands, before which there are so many bytes of
    content."""
    with encryption.reader(uri, io.FileIO(local_path(uri))) as content:
        return content.place(start)  # type: ignore[attr-defined]


def _read_encrypted_range(uri: str, start: int, count: int) -> bytes:
    with reading(uri):
        if is_local(uri):
            file: Any = io.FileIO(local_path(uri))
        else:
            file = _open_object(uri, writes=False)
        with encryption.reader(uri, file) as content:
            content.seek(start)
            pieces = []
            while count > 0 and (piece := content.read(count)):
                pieces.append(piece)
                count -= len(piece)
            return b"".join(pieces)


def read_text(uri: str) -> str:
    """The content of a file, as UTF-8. :class:`~postlude.storage.errors.NotReadable` if it is none."""
    try:
        return read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise NotReadable(f"'{uri}' is not text in UTF-8 ({error}). Write it anew, or check the path.") from error


def write_text(uri: str, text: str) -> None:
    """Replace the content of a file, atomically."""
    write_bytes(uri, text.encode())


def write_bytes(uri: str, content: bytes, lines: bool = False) -> None:
    """Replace the content of a file, atomically. ``lines``: others are going to be added, by a journal."""
    guards.check(uri)
    if encryption.is_encrypted(uri):
        content = encryption.seal(uri, content, lines)
    if is_local(uri):
        with writing(uri), _durable_file(uri, content) as unnamed:
            guards.check(uri)  # again: the disk may have taken its time
            os.replace(unnamed, local_path(uri))
    else:
        filesystem, path = remote(uri)
        with writing(uri):
            filesystem.pipe_file(path, content)


def create(uri: str, content: bytes) -> bool:
    """Make a file with this content, atomically, unless there is one: then nothing happens and False comes back."""
    guards.check(uri)
    if encryption.is_encrypted(uri):
        content = encryption.seal(uri, content)
    with writing(uri):
        try:
            if is_local(uri):
                with _durable_file(uri, content) as unnamed:
                    guards.check(uri)
                    _give_name(unnamed, local_path(uri))
            else:
                filesystem, path = remote(uri)
                if is_object_store(filesystem):
                    filesystem.put_if(path, content, IfNoneMatch="*")
                else:
                    filesystem.pipe_file(path, content, mode="create")
        except FileExistsError:
            return False
    return True


def sync_folder(path: str) -> None:
    """Make the names in a local folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exists(uri: str) -> bool:
    """Whether there is a file or a folder."""
    if is_local(uri):
        return os.path.exists(local_path(uri))
    filesystem, path = remote(uri)
    with reading(uri):
        return filesystem.exists(path)


def is_directory(uri: str) -> bool:
    """Whether there is a folder: for remote URIs, whether anything stands below."""
    if is_local(uri):
        return os.path.isdir(local_path(uri))
    filesystem, path = remote(uri)
    with reading(uri):
        return filesystem.isdir(path)


def list_directory(uri: str) -> list[str]:
    """The names in a folder, sorted, without files that are being written. Empty if there is no such folder."""
    try:
        with reading(uri):
            if is_local(uri):
                names = os.listdir(local_path(uri))
            else:
                filesystem, path = remote(uri)
                entries = filesystem.ls(path, detail=False)
                names = [name(entry) for entry in entries if entry.strip("/") != path.strip("/")]
    except FileNotFoundError:
        return []
    return sorted(
        entry for entry in names if entry and not entry.endswith(UNFINISHED) and not encryption.hides(uri, entry)
    )


def files_below(uri: str, with_keys: bool = False) -> list[str]:
    """The paths of all files in a folder and its folders, relative to it, sorted. Records of data keys are among them
    ``with_keys``."""
    if is_local(uri):
        folder = local_path(uri)
        held = (os.path.join(above, name) for above, _, names in os.walk(folder) for name in names)
        below = [os.path.relpath(path, folder) for path in held]
    else:
        filesystem, path = remote(uri)
        with reading(uri):
            below = [entry.removeprefix(path).lstrip("/") for entry in filesystem.find(path)]
    return sorted(path for path in below if with_keys or not encryption.hides(uri, name(path)))


def remove(uri: str) -> None:
    """Remove a file, or a folder with all that is in it; nothing happens if there is none."""
    guards.check(uri, now=True)
    if is_local(uri):
        path = local_path(uri)
        with writing(uri), suppress(FileNotFoundError):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.remove(path)
        return
    filesystem, path = remote(uri)
    with writing(uri):
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)


def free_place(uri: str) -> str:
    """A URI beside a damaged file, for keeping it under a name that nothing reads."""
    base = f"{name(uri)}.damaged-"
    number = 1 + sum(entry.startswith(base) for entry in list_directory(parent(uri)))
    return join(parent(uri), f"{base}{number}")


def size_bytes(uri: str) -> int:
    """The size of a file's content."""
    if encryption.is_encrypted(uri):
        if is_local(uri):
            with open_file(uri) as file:
                return file.seek(0, io.SEEK_END)
        return encryption.content_bytes(uri, info(uri)["size"])
    if is_local(uri):
        with reading(uri):
            return os.stat(local_path(uri)).st_size
    return info(uri)["size"]


def modified_fingerprint(uri: str) -> str:
    """A text that changes when a file is replaced: its size with its time stamp or its entity tag."""
    if is_local(uri):
        with reading(uri):
            status = os.stat(local_path(uri))
        return f"{status.st_size}-{status.st_mtime_ns}"
    return _fingerprint(info(uri))


def modified_fingerprints(uri: str) -> dict[str, str]:
    """:func:`modified_fingerprint` of every file in a remote folder that is not empty, by name, with one request for
    all; none if there is no such folder."""
    filesystem, path = remote(uri)
    try:
        with reading(uri):
            entries = filesystem.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    found = {name(entry["name"]): entry for entry in entries if entry["type"] == "file" and entry["size"]}
    return {entry: _fingerprint(info) for entry, info in found.items() if not encryption.hides(uri, entry)}


def _fingerprint(info: dict[str, Any]) -> str:
    stamps = (info[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created") if info.get(key))
    return f"{info['size']}-{next(stamps, 'unstamped')}"


def expand(pattern: str) -> list[str]:
    """The URIs that a pattern (``*``, ``?``, ``[...]``, ``**``) matches, sorted. A name that exists is itself."""
    if exists(pattern):
        return [pattern]
    if is_local(pattern):
        return sorted(glob.glob(local_path(pattern), recursive=True))
    filesystem, path = remote(pattern)
    with reading(pattern):
        matches = filesystem.glob(path)
    protocol = pattern.partition("://")[0]
    return sorted(entry if "://" in entry else f"{protocol}://{entry.lstrip('/')}" for entry in matches)


# --- local ----------------------------------------------------------------------------------------------------


@contextmanager
def _durable_file(uri: str, content: bytes) -> Iterator[str]:
    """The path of a durable file with this content, beside the place where it is going to be put in the block."""
    folder, base = os.path.split(os.path.abspath(local_path(uri)))
    path = os.path.join(folder, unfinished_name(base, secrets.token_hex(4)))
    try:
        with _open_for_writing(uri, path) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield path
        sync_folder(folder)
    finally:
        if os.path.exists(path):
            os.remove(path)


def _give_name(unnamed: str, path: str) -> None:
    """Have a finished file appear under a name that nothing has. FileExistsError."""
    try:
        os.link(unnamed, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with open(unnamed, "rb") as source, open(path, "xb") as file:
            shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())


class _LocalFile(io.FileIO):
    """A file being written, which says what is wrong in the middle of it as clearly as at the start."""

    def __init__(self, path: str, uri: str) -> None:
        self._uri = uri
        super().__init__(path, "w")

    def write(self, data: Any, /) -> int:
        with writing(self._uri):
            return super().write(data)

    def close(self) -> None:
        with writing(self._uri):
            super().close()


def _open_for_writing(uri: str, path: str) -> IO[bytes]:
    guards.make_folders(os.path.dirname(path))
    return io.BufferedWriter(_LocalFile(path, uri), buffer_size=2**17)


# --- remote ---------------------------------------------------------------------------------------------------


def _open_object(uri: str, writes: bool) -> Any:
    filesystem, path = remote(uri)
    if writes:
        return remote_files.RemoteWriter(uri, filesystem.open(path, "wb"))
    if is_object_store(filesystem):
        return io.BufferedReader(remote_files.RemoteReader(uri, filesystem, path), buffer_size=2**13)
    return filesystem.open(path, "rb")


def is_object_store(filesystem: Any) -> bool:
    """Whether it writes under conditions."""
    return hasattr(filesystem, "put_if")


def remote(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI and the path in it. StorageError if the protocol cannot be used here."""
    filesystem = _filesystem(uri.partition("://")[0], connection_of(rule_of(uri)), os.getpid())
    return filesystem, filesystem._strip_protocol(uri)


@lru_cache
def _filesystem(protocol: str, connection: Connection, pid: int) -> Any:
    """The file system of a process for a kind of storage, with the credentials that a rule gives it."""
    import fsspec

    try:
        if protocol in S3:
            from postlude.storage.object_store import ObjectStore

            return ObjectStore(**options(protocol, connection))
        # A listing that is cached hides what another process writes.
        return fsspec.filesystem(protocol, use_listings_cache=False, **options(protocol, connection))
    except ImportError as error:
        remedy = "Install it with: pip install 'postlude[s3]'." if protocol in S3 else f"{error}."
        raise StorageError(f"'{protocol}://' needs a package that is not installed here. {remedy}") from error
    except ValueError as error:
        if protocol in fsspec.available_protocols():
            raise
        near = nearest(protocol, fsspec.available_protocols())
        hint = f" Did you mean '{near}://'?" if near else ""
        raise StorageError(f"'{protocol}://' is not a kind of storage that is known here.{hint}") from error


os.register_at_fork(after_in_child=_filesystem.cache_clear)  # what it holds serves one process


def info(uri: str) -> dict[str, Any]:
    """What the store says of a remote file."""
    filesystem, path = remote(uri)
    with reading(uri):
        return filesystem.info(path)


encryption.connect(read_bytes, create)
