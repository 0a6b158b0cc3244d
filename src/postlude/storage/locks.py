"""One process at a time: a lock whose holder can be named, and which a killed holder does not keep.

Locally the kernel holds it (``flock``) on the very file, by whatever name that is reached, and lets it go with the
process. The path may come to lead elsewhere, though: the holder looks again before whatever it writes below the folder
(:mod:`postlude.storage.guards`). Where the lock file alone was removed or replaced, and nobody else has been there, the
holder puts it back, to leave with a checkpoint; in all other cases it writes nothing more.

Behind a remote URI, and where the file system has no ``flock``, the lock is a lease (:mod:`postlude.storage.leases`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from postlude.storage import exact_json, files, guards, leases, uris
from postlude.storage.errors import NotFound, StorageError, writing
from postlude.storage.guards import Guard, Identity, Lock, identity
from postlude.storage.holders import Holder, this_machine

SETTLE_SECONDS = 1.0
"""Who removes a whole folder begins with some file: a lock file that is gone is put back after so long, if by then
nothing else is gone."""

PUT_BACK_SECONDS = 10.0
"""How long those that work for the holder wait for it to put the lock file back."""

_ATTEMPTS, _PAUSE_SECONDS = 10, 0.05
"""A process that only asks who holds a local lock takes it for an instant, so the first refusal is not final."""

_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def lock(uri: str, what: str = "run", guarded_folder: str | None = None) -> Lock:
    """Take the lock behind ``uri``, a file that is nothing else. LockedError, naming the holder, if it is taken.

    ``what`` is the thing that the lock guards, for the error. In ``guarded_folder`` nothing is written from now on
    unless the lock is still held. A lease whose holder may be alive is watched for
    :data:`postlude.storage.leases.LEASE_SECONDS`.
    """
    taken: Lock
    try:
        taken = _KernelLock(uri, what) if uris.is_local(uri) else leases.Lease(uri, what)
    except NoFlock:
        taken = leases.Lease(uri, what)
    if guarded_folder is not None:
        guards.set_guard(guarded_folder, taken)
    return taken


def holder(uri: str) -> Holder | None:
    """Who holds the lock; None if nobody does. That of a lease counts until it is known to be gone: it has let go, it
    was a process of this machine, or this process has seen the lease unchanged for too long."""
    try:
        return _kernel_holder(uri) if uris.is_local(uri) else leases.holder(uri)
    except NoFlock:
        return leases.holder(uri)


class NoFlock(Exception):
    """The file system has no locks of the kernel."""


def flock(descriptor: int, operation: int) -> None:
    """Lock an open file. BlockingIOError if it should not wait and another has it; :class:`NoFlock`."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno in _NO_FLOCK:
            raise NoFlock from error
        raise


# --- the holder -----------------------------------------------------------------------------------------------


_held: set[_KernelLock] = set()


def _close_in_child() -> None:
    """A forked child would keep the lock for as long as it lives, whatever becomes of its parent."""
    for held in _held:
        os.close(held.descriptor)
        held.turn = threading.RLock()  # a thread that is not here may have had it
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)

Place = tuple[Identity | None, Identity | None]
"""The folder that the lock file stands in, and the lock file."""


class _KernelLock(Lock):
    def __init__(self, uri: str, what: str) -> None:
        super().__init__(uri, what)
        self._holder, self._token = Holder.this_process(), secrets.token_hex(8)
        self.turn = threading.RLock()
        self._how_lost: str | None = None
        with writing(uri):
            guards.make_folders(os.path.dirname(uris.local_path(uri)))
        while not self._take():
            pass  # the file was removed between two steps
        _held.add(self)

    def _take(self) -> bool:
        with writing(self.uri):
            self.descriptor = os.open(uris.local_path(self.uri), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try_flock(self.descriptor):
                raise self.refused(_kernel_holder(self.uri))
            self._place = _look(self.uri)
            if self._place[1] == _identity_of(self.descriptor):
                self._write_down(self.descriptor, self._holder)
                self._names = self._other_names()
                return True
        except BaseException:
            os.close(self.descriptor)
            raise
        os.close(self.descriptor)
        return False

    def _write_down(self, descriptor: int, by: Holder) -> None:
        with writing(self.uri):
            content = exact_json.dump({**asdict(by), "token": self._token}).encode()
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))

    def release(self) -> None:
        guards.lift(self)
        if self in _held:
            _held.discard(self)
            os.close(self.descriptor)

    def shared(self) -> Guard:
        return _KernelGuard(self.uri, self.what, self._token, self._place)

    # --- looked at again ------------------------------------------------------------------------------------

    def check(self, now: bool = False) -> None:
        if self._how_lost is None and _look(self.uri) == self._place:
            if now:
                self._names = self._other_names()
            return
        with self.turn:
            if self._how_lost is None and _look(self.uri) != self._place and not self._put_back():
                self._how_lost = self._what_happened()
        if self._how_lost is not None:
            raise self.lost(self._how_lost)

    def _other_names(self) -> set[str]:
        """What else stands in the folder: where some of it went with the lock file, all of it is going."""
        try:
            names = os.listdir(uris.local_path(self.folder))
        except OSError:
            return set()
        return {name for name in names if name != uris.name(self.uri) and not name.endswith(files.UNFINISHED)}

    def _put_back(self) -> bool:
        """Take the lock file anew, if it alone was removed or replaced and no other process has had it since."""
        folder = self._place[0]
        if _look(self.uri)[0] != folder or self not in _held:
            return False
        time.sleep(SETTLE_SECONDS)
        if _look(self.uri)[0] != folder or not self._names <= self._other_names():
            return False
        descriptor = -1
        try:
            descriptor = os.open(uris.local_path(self.uri), os.O_RDWR | os.O_CREAT, 0o666)
            if not _try_flock(descriptor):
                raise BlockingIOError
            place, record = _look(self.uri), _read_record(os.pread(descriptor, 2**16, 0))
            if place != (folder, _identity_of(descriptor)) or record.get("token", self._token) != self._token:
                raise BlockingIOError
            self._write_down(descriptor, replace(self._holder, leaving=True))
        except (OSError, StorageError):
            if descriptor >= 0:
                os.close(descriptor)
            return False
        os.close(self.descriptor)
        self.descriptor, self._place = descriptor, place
        self.leaving = f"The lock file '{self.uri}' was removed or replaced while process {os.getpid()} held it."
        return True

    def _what_happened(self) -> str:
        folder, lock_file = _look(self.uri)
        if folder == self._place[0]:
            by = _kernel_holder(self.uri)
            taken = f"was replaced, and {by or 'another process'} has had it since"
            return f"its lock file {taken if lock_file else 'was removed with other files'}"
        how = "another folder stands there" if folder else "the folder is not there any more"
        if self in _held:
            with suppress(OSError):  # the kernel of another system does not tell
                path = os.path.dirname(os.readlink(f"/proc/self/fd/{self.descriptor}"))
                if identity(path) == self._place[0]:
                    how += f"; it was moved to '{path}'"
        return how


def _look(uri: str) -> Place:
    path = uris.local_path(uri)
    return identity(os.path.dirname(path) or "."), identity(path)


def _identity_of(descriptor: int) -> Identity:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _try_flock(descriptor: int) -> bool:
    for _ in range(_ATTEMPTS):
        try:
            flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            time.sleep(_PAUSE_SECONDS)
        else:
            return True
    return False


def _read_record(content: bytes) -> dict[str, Any]:
    """What a lock file says; nothing if no holder wrote it. What an earlier version wrote has a token of its own."""
    try:
        record = exact_json.load(content)
    except ValueError:
        return {}
    return {"token": None, **record} if isinstance(record, dict) and "pid" in record else {}


# --- those that work for it, and those that ask ---------------------------------------------------------------


class _KernelGuard(Guard):
    """Of a process that works for the holder: the path must lead to the lock file that this one took, or has put back.
    A process of another machine sees other numbers of files, so there the first look counts."""

    def __init__(self, uri: str, what: str, token: str, place: Place) -> None:
        super().__init__(uri, what)
        self._token, self._place, self._machine = token, place, this_machine()
        self._seen: tuple[Place, int] | None = None

    def check(self, now: bool = False) -> None:
        if self._seen is not None and self._look() == self._seen:
            return
        deadline = time.monotonic() + PUT_BACK_SECONDS
        while not self._is_sound(seen := self._look()):
            if seen[0][0] != self._place[0] or seen[0][1] == self._place[1] or time.monotonic() > deadline:
                raise self.lost("the folder or its lock file was moved, removed, replaced, or taken by another process")
            time.sleep(_PAUSE_SECONDS)
        self._seen = seen

    def _look(self) -> tuple[Place, int]:
        """Where the path leads, and when the lock file was written last."""
        try:
            return _look(self.uri), os.stat(uris.local_path(self.uri)).st_mtime_ns
        except OSError:
            return _look(self.uri), 0

    def _is_sound(self, seen: tuple[Place, int]) -> bool:
        try:
            record = _read_record(files.read_bytes(self.uri))
        except (OSError, StorageError):
            return False
        if record.get("token") != self._token:
            return False
        if self._seen is None and self._machine != this_machine():
            self._place = seen[0]
        return seen[0] == self._place or (seen[0][0] == self._place[0] and bool(record.get("leaving")))


def _kernel_holder(uri: str) -> Holder | None:
    try:
        file = files.open_file(uri, "rb")
    except NotFound:
        return None
    with file:
        for _ in range(_ATTEMPTS):
            try:
                flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
            else:
                return None
            try:
                return Holder.read(exact_json.load(file.read()))
            except ValueError:  # the holder is just writing down who it is
                time.sleep(_PAUSE_SECONDS)
    return Holder("this machine", 0, "just now")
