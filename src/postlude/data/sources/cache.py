"""What is made from raw files once and used by every later process: indexes, decompressed and converted copies.

These files are memory-mapped, so they lie on the machine: a remote cache folder stands for one under the user's
own cache directory. Where that is encrypted, what is mapped is a copy in memory, which goes with the process. A name
holds the identity of all that the file is made from, so nothing is ever out of date, and the digest of what is in it:
what does not match, or has none, is made anew. A file appears whole, and of several processes that want it one makes it
while the others wait.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from functools import cache

from postlude import storage
from postlude.data.records import digest
from postlude.errors import DataError
from postlude.storage.errors import writing

_POLL_SECONDS, _SAY_AFTER_SECONDS, _DEADLINE_SECONDS = 0.1, 5.0, 4 * 3600.0

_log = logging.getLogger(__name__)


def find_made(cache: str, name: str) -> str | None:
    """The local path of the file ``name`` of an earlier version, which cannot be made as it was; it has its digest from
    now on. None if there is none, DataError if it is damaged."""
    folder = _machine_folder(cache)
    named = _named(folder, name)

    def adopt(path: str) -> None:
        if name not in named:
            raise DataError(
                f"'{os.path.join(folder, named[0])}', which an earlier version made, is damaged. Put it back, "
                "or remove it: then it is made as this version does."
            )
        os.link(os.path.join(folder, name), path)

    return make_once(cache, name, adopt) if named else None


def make_once(cache: str, name: str, make: Callable[[str], None]) -> str:
    """The local path of the file that ``make(path)`` writes if it is not there yet, whole. It is called ``name`` with
    the digest of the content."""
    folder = _machine_folder(cache)
    if path := _whole(folder, name):
        return storage.clear_path(path)
    with _wait_for_lock(os.path.join(folder, f"{name}.lock"), name):
        path = _whole(folder, name)
        if path is None:
            path = (_make if storage.has_path(folder) else _make_encrypted)(folder, name, make)
    return storage.clear_path(path)


def _make(folder: str, name: str, make: Callable[[str], None]) -> str:
    unfinished = os.path.join(folder, f"{name}.{secrets.token_hex(4)}.unfinished")
    try:
        with writing(os.path.join(folder, name)):
            make(unfinished)
            path = os.path.join(folder, storage.name_with_digest(name, _settle(unfinished)))
            _make_way(folder, name)
            os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)
    return path


def _make_encrypted(folder: str, name: str, make: Callable[[str], None]) -> str:
    with storage.folder_for_copy(folder, "cache") as work:
        clear = os.path.join(work, "content")
        make(clear)
        path = os.path.join(folder, storage.name_with_digest(name, storage.sha256_of(clear)))
        _make_way(folder, name)
        storage.copy_file(clear, path)
    return path


def _make_way(folder: str, name: str) -> None:
    storage.make_folders(folder)  # which may not be ours any more
    for damaged in _named(folder, name):
        os.remove(os.path.join(folder, damaged))


def _named(folder: str, name: str) -> list[str]:
    """The files of that name, with a digest or, of an earlier version, without."""
    return [entry for entry in os.listdir(folder) if storage.plain_name(entry) == name]


def _whole(folder: str, name: str) -> str | None:
    paths = (os.path.join(folder, entry) for entry in _named(folder, name) if entry != name)
    return next((path for path in paths if _is_as_named(path, _stamp(path))), None)


def _stamp(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except FileNotFoundError:  # made anew since it was listed
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@cache
def _is_as_named(path: str, stamp: tuple[int, ...]) -> bool:
    """Read once in this process, while the file has this stamp."""
    return storage.is_as_named(path)


def _settle(path: str) -> str:
    """Make a file durable. Its digest."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return storage.sha256_of(path)


def _machine_folder(cache: str) -> str:
    if storage.is_local(cache):
        folder = os.path.abspath(storage.local_path(cache))
    else:
        own = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        folder = os.path.join(own, "postlude", digest(cache))
    with writing(folder):
        storage.make_folders(folder)
    return folder


def _wait_for_lock(path: str, name: str) -> storage.Lock:
    began = last_told = time.monotonic()
    while True:
        try:
            return storage.lock(path, what=f"cache file {name}")
        except storage.LockedError as error:
            now = time.monotonic()
            if now - began > _DEADLINE_SECONDS:
                raise DataError(f"Gave up waiting for '{name}' after four hours: {error}") from error
            if now - last_told > _SAY_AFTER_SECONDS:
                last_told = now
                _log.warning("Waiting for '%s', made by %s.", name, storage.holder(path))
            time.sleep(_POLL_SECONDS)
