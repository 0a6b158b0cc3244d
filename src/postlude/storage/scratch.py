"""Folders for temporary files that go with their process: at once where it ends by itself, else with the next such
folder that anybody of this user makes beside it.

A folder is held by a lock on a file in it, which the kernel lets go when the process dies, however it dies, and which
means the same in every container that shares the disk. It has its final name once it is locked.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from postlude.storage.errors import StorageError, writing

BEGINNING = "postlude-"
"""Of the names of all these folders."""
SHARED_MEMORY = "/dev/shm"
_NEW = ".new-"
"""Before the name of one that is not locked yet, of which nothing is ever older than a moment."""
_MOMENT_SECONDS = 3600.0
_HELD = ".held"


class Scratch:
    """A folder named after what it is ``for_what``, below ``above`` (by default the place for temporary files)."""

    def __init__(self, for_what: str, above: str | None = None) -> None:
        above = above or tempfile.gettempdir()
        sweep(above)
        with writing(above):
            new = Path(tempfile.mkdtemp(prefix=f"{_NEW}{BEGINNING}{for_what}-", dir=above))
            self._held = os.open(new / _HELD, os.O_RDWR | os.O_CREAT, 0o600)
            with suppress(OSError):  # a disk without locks: then nobody can take it for abandoned either
                fcntl.flock(self._held, fcntl.LOCK_EX)
            self.path = new.rename(new.with_name(new.name.removeprefix(_NEW)))

    def close(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._held)


@contextmanager
def scratch_folder(for_what: str, above: str | None = None) -> Iterator[str]:
    """The path of a :class:`Scratch`, for as long as the context lasts."""
    scratch = Scratch(for_what, above)
    try:
        yield str(scratch.path)
    finally:
        scratch.close()


def memory_folder(for_what: str) -> AbstractContextManager[str]:
    """The same in memory, for what may not touch a disk. StorageError where this machine has no shared memory."""
    if not os.path.isdir(SHARED_MEMORY):
        raise StorageError(
            f"This machine has no '{SHARED_MEMORY}', in which other libraries could read and write what is encrypted. "
            "Use one that has it, or a place without 'encrypt'."
        )
    return scratch_folder(for_what, SHARED_MEMORY)


def sweep(above: str) -> None:
    """Remove what killed processes of this user have left there."""
    with suppress(OSError), os.scandir(above) as entries:
        for entry in entries:
            if entry.name.startswith((BEGINNING, _NEW + BEGINNING)):
                with suppress(OSError):
                    _remove_if_abandoned(entry)


def _remove_if_abandoned(entry: os.DirEntry[str]) -> None:
    status = entry.stat(follow_symlinks=False)
    if status.st_uid != os.getuid() or not entry.is_dir(follow_symlinks=False):
        return
    if entry.name.startswith(_NEW) and time.time() - status.st_mtime < _MOMENT_SECONDS:
        return
    held = os.open(os.path.join(entry.path, _HELD), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(entry.path, ignore_errors=True)
    finally:
        os.close(held)
