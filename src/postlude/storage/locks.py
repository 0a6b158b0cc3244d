"""One process at a time: a lock whose holder can be named, and which a killed holder does not keep.

Locally the kernel holds it (``flock``) and lets it go with the process. Behind a remote URI it is a lease: an
object that its holder renews, and that counts for nothing once it is :data:`LEASE_SECONDS` old by the clocks of
the machines, or at once where the holder was a process of this machine that is gone.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import psutil

from postlude.storage import exact_json, files
from postlude.storage.errors import LockedError, NotFound, writing

LEASE_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0

_SETTLE_SECONDS = 1.0
"""Two machines that take over the same lease write within this time of each other."""

_ATTEMPTS, _PAUSE_SECONDS = 10, 0.05
"""A process that only asks who holds a local lock takes it for an instant, so the first refusal is not final."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    host: str
    pid: int
    since: str
    """ISO 8601, UTC."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @staticmethod
    def this_process() -> Holder:
        return Holder(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))


class Lock:
    """A lock that is held until it is released or the process ends. Made by :func:`lock`; a context manager."""

    def check(self) -> None:
        """LockedError if the lock was lost: a lease that could not be renewed in time may be somebody else's now."""

    def release(self) -> None:
        """Let go; releasing again does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock(uri: str, what: str = "run") -> Lock:
    """Take the lock behind ``uri``, a file that is nothing else. LockedError, naming the holder, if it is taken.

    ``what`` is the thing that the lock guards, for the error.
    """
    return _KernelLock(uri, what) if files.is_local(uri) else _Lease(uri, what)


def holder(uri: str) -> Holder | None:
    """Who holds the lock at this moment; None if nobody does."""
    return _kernel_holder(uri) if files.is_local(uri) else _lease_holder(uri)


def _refusal(uri: str, what: str, by: Holder | None) -> LockedError:
    who = by or "another process"
    return LockedError(f"The {what} at '{files.parent(uri)}' is in use by {who}. Wait until it ends, or stop it.")


# --- local ----------------------------------------------------------------------------------------------------


_held: set[_KernelLock] = set()


def _close_in_child() -> None:
    """A forked child would keep the lock for as long as it lives, whatever becomes of its parent."""
    for held in _held:
        os.close(held.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


class _KernelLock(Lock):
    def __init__(self, uri: str, what: str) -> None:
        path = files.local_path(uri)
        with writing(uri):
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try_flock(self.descriptor):
                raise _refusal(uri, what, _kernel_holder(uri))
            with writing(uri):
                content = exact_json.dump(asdict(Holder.this_process())).encode()
                os.pwrite(self.descriptor, content, 0)
                os.ftruncate(self.descriptor, len(content))
        except BaseException:
            os.close(self.descriptor)
            raise
        _held.add(self)

    def release(self) -> None:
        if self in _held:
            _held.discard(self)
            os.close(self.descriptor)


def _try_flock(descriptor: int) -> bool:
    for _ in range(_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            time.sleep(_PAUSE_SECONDS)
        else:
            return True
    return False


def _kernel_holder(uri: str) -> Holder | None:
    try:
        file = files.open_file(uri, "rb")
    except NotFound:
        return None
    with file:
        for _ in range(_ATTEMPTS):
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
            else:
                return None
            try:
                return Holder(**exact_json.load(file.read()))
            except ValueError:  # the holder is just writing down who it is
                time.sleep(_PAUSE_SECONDS)
    return Holder("this machine", 0, "just now")


# --- remote ---------------------------------------------------------------------------------------------------


_own_tokens: set[str] = set()


class _Lease(Lock):
    def __init__(self, uri: str, what: str) -> None:
        self._uri, self._what = uri, what
        self._holder, self._token = Holder.this_process(), secrets.token_hex(8)
        self._renewed, self._lost = time.time(), False
        if not self._take():
            raise _refusal(uri, what, _lease_holder(uri))
        _own_tokens.add(self._token)
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._heart.start()

    def _take(self) -> bool:
        if files.create(self._uri, self._content(self._renewed)):
            return True
        if _lease_holder(self._uri) is not None:
            return False
        # Several processes may find the same lease abandoned: the one that wrote last has it.
        files.write_bytes(self._uri, self._content(self._renewed))
        time.sleep(_SETTLE_SECONDS)
        return self._is_own()

    def check(self) -> None:
        if self._lost or time.time() - self._renewed > LEASE_SECONDS:
            raise LockedError(
                f"The {self._what} at '{files.parent(self._uri)}' was held by this process, but its lease could not be "
                f"renewed for {LEASE_SECONDS:.0f} seconds or was taken by another process. Run again to go on."
            )

    def release(self) -> None:
        if self._released.is_set():
            return
        self._released.set()
        self._heart.join()
        _own_tokens.discard(self._token)
        if self._is_own():
            files.remove(self._uri)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            # A store that cannot be reached for a moment is tried again; check() tells when it was too long.
            with suppress(OSError):
                if not self._is_own():
                    self._lost = True
                    return
                now = time.time()
                files.write_bytes(self._uri, self._content(now))
                self._renewed = now

    def _content(self, renewed: float) -> bytes:
        return exact_json.dump({**asdict(self._holder), "token": self._token, "renewed": renewed}).encode()

    def _is_own(self) -> bool:
        lease = _read_lease(self._uri)
        return lease is not None and lease["token"] == self._token


def _read_lease(uri: str) -> dict[str, Any] | None:
    try:
        return exact_json.load(files.read_bytes(uri))
    except NotFound:
        return None


def _lease_holder(uri: str) -> Holder | None:
    lease = _read_lease(uri)
    if lease is None or time.time() - lease["renewed"] > LEASE_SECONDS:
        return None
    by = Holder(lease["host"], lease["pid"], lease["since"])
    if by.host != socket.gethostname():
        return by
    is_alive = lease["token"] in _own_tokens if by.pid == os.getpid() else psutil.pid_exists(by.pid)
    return by if is_alive else None
