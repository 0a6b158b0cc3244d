"""What is made from raw files once and used by every later process: indexes, decompressed and converted copies.

These files are memory-mapped, so they lie on the machine: a remote cache folder stands for one under the user's
own cache directory. A name holds the identity of all that the file is made from, so nothing is ever out of date;
a file appears whole, and of several processes that want it one makes it while the others wait.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable

from postlude import storage
from postlude.data.records import digest
from postlude.errors import DataError
from postlude.storage.errors import writing

_POLL_SECONDS, _SAY_AFTER_SECONDS, _DEADLINE_SECONDS = 0.1, 5.0, 4 * 3600.0

_log = logging.getLogger(__name__)


def find_made(cache: str, name: str) -> str | None:
    """The local path of the file ``name``, if it was made."""
    path = os.path.join(_machine_folder(cache), name)
    return path if os.path.exists(path) else None


def make_once(cache: str, name: str, make: Callable[[str], None]) -> str:
    """The local path of the file ``name``, which ``make(path)`` writes if it is not there yet."""
    folder = _machine_folder(cache)
    path = os.path.join(folder, name)
    if os.path.exists(path):
        return path
    unfinished = f"{path}.{secrets.token_hex(4)}.unfinished"
    with _wait_for_lock(f"{path}.lock", name):
        if not os.path.exists(path):
            try:
                with writing(path):
                    make(unfinished)
                    storage.make_folders(folder)  # which may not be ours any more
                    os.replace(unfinished, path)
            finally:
                if os.path.exists(unfinished):
                    os.remove(unfinished)
    return path


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
