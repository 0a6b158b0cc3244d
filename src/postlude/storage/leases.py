"""Locks where no kernel holds them: leases, each a numbered file beside the others that its holder writes anew.

``run.lock.00000007`` is the seventh lease of a run. Who takes the lock makes the next number, which succeeds for one
process only, so that taking is a compare-and-swap on the newest number; renewing touches the holder's own file only,
so that a holder that was held up never writes over its successor. The number is the fencing number: it never falls as
long as one of the files is there, every marker repeats it, and what was committed with a lower one counts only if it
stood there when the lease was taken.

No clock of one machine is compared with that of another. A lease is abandoned when whoever wants it has seen it
unchanged for :data:`LEASE_SECONDS` by its own clock; its holder stops believing in it somewhat before that, by a clock
that goes on while the machine sleeps.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from postlude.storage import commits, conditional, exact_json, files, guards, uris
from postlude.storage.errors import NotFound, StorageError
from postlude.storage.guards import Guard, Lock
from postlude.storage.holders import Holder

LEASE_SECONDS = 60.0
"""A lease that did not change for so long is abandoned."""
BELIEVED_SECONDS = 50.0
"""How long its holder believes in it after the last renewal began."""
HEARTBEAT_SECONDS = 10.0
LOOK_SECONDS = 5.0
"""Between two looks at one's own lease, unless something is about to be committed, cut or removed."""
WATCH_SECONDS = 1.0
"""Between two looks of who wants a lease that may be held."""

_NUMBER = re.compile(r"\.(\d{8})")

_seen: dict[str, tuple[int, bytes, float]] = {}
"""What this process knows of the leases of others: their number, their content, and since when it is the same."""


def clock() -> float:
    """Seconds, never set by anybody; where the system can, those count in which it sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def holder(uri: str) -> Holder | None:
    """Who has the newest lease, unless that was let go, is of a process of this machine that is gone, or has been
    unchanged for :data:`LEASE_SECONDS` since this process first saw it so."""
    number, content = _newest(uri)
    by = _holder_of(content)
    if by is None or by.is_gone():
        return None
    before = _seen.get(uri)
    if before is None or before[:2] != (number, content):
        _seen[uri] = number, content, clock()
        return by
    return by if clock() - before[2] < LEASE_SECONDS else None


class _LeaseGuard(Guard):
    """Of a process that works for the holder: it looks whether the holder's number is the newest."""

    def __init__(self, uri: str, what: str, number: int, standing: frozenset[str] | None) -> None:
        super().__init__(uri, what)
        self.number: int = number
        self._standing = standing
        self._folder_identity: guards.Identity | None = None
        self._looked = -LOOK_SECONDS

    def check(self, now: bool = False) -> None:
        if not now and clock() - self._looked < LOOK_SECONDS:
            return
        begin = clock()
        self._hold_to_folder()
        numbers = _numbers(self.uri)
        if self.number not in numbers:
            raise self.lost("its lease was removed")
        if numbers[-1] > self.number:
            raise self.lost(f"{_holder_of(_newest(self.uri)[1]) or 'another process'} has had it since")
        self._looked = begin

    def believes(self, uri: str, number: int) -> bool:
        return number >= self.number or self._standing is None or uris.plain(uri) in self._standing

    def _hold_to_folder(self) -> None:
        """A local folder must be the one that it was."""
        if uris.is_local(self.uri):
            now = guards.identity(uris.local_path(self.folder))
            self._folder_identity = self._folder_identity or now
            if now is None or now != self._folder_identity:
                raise self.lost("another folder stands there" if now else "the folder is not there any more")


class Lease(Lock):
    """A lease that a thread renews until it is released. Taking one that may be held takes time."""

    def __init__(self, uri: str, what: str) -> None:
        super().__init__(uri, what)
        self._record: dict[str, Any] = {**asdict(Holder.this_process()), "token": secrets.token_hex(8)}
        self._how_lost: str | None = None
        self._renewed = clock()
        if not uris.is_local(uri):
            conditional.require_exclusive(uri)
        self.number: int = self._take()
        self._tag = conditional.tag_of(_place(uri, self.number))
        self._standing = _standing(self.folder)
        self._guard = _LeaseGuard(uri, what, self.number, self._standing)
        self._guard.check(now=True)
        if not uris.is_local(uri):
            conditional.abort_uploads(self.folder, _place(uri, self.number))
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._heart.start()

    def _take(self) -> int:
        number, content = self._free_lease()
        self._renewed = clock()
        own = _place(self.uri, number + 1)
        if not files.create(own, self._content()):
            raise self.refused(_holder_of(_newest(self.uri)[1]))
        numbers = _numbers(self.uri)
        if numbers[-1:] != [number + 1]:  # others have come and gone since it was looked at
            files.remove(own)
            raise self.refused(_holder_of(_newest(self.uri)[1]))
        for lower in numbers[:-1]:
            files.remove(_place(self.uri, lower))
        if content and not number:
            files.remove(self.uri)
        return number + 1

    def _free_lease(self) -> tuple[int, bytes]:
        """The newest lease, which nobody has; one that may be held is watched. LockedError if it changes."""
        lease, began, seconds = _newest(self.uri), clock(), 0.0
        while True:
            by = _holder_of(lease[1])
            if by is None or by.is_gone() or seconds > LEASE_SECONDS:
                return lease
            time.sleep(WATCH_SECONDS)
            seconds = clock() - began  # before the look: what is seen then has not changed for at least so long
            before, lease = lease, _newest(self.uri)
            if lease != before and _holder_of(lease[1]) is not None:
                raise self.refused(_holder_of(lease[1]))

    # --- while it is held -----------------------------------------------------------------------------------

    def check(self, now: bool = False) -> None:
        if self._how_lost is None and clock() - self._renewed > BELIEVED_SECONDS:
            self._how_lost = f"its lease could not be renewed for {BELIEVED_SECONDS:.0f} seconds"
        if self._how_lost is not None:
            raise self.lost(self._how_lost)
        self._guard.check(now)

    def believes(self, uri: str, number: int) -> bool:
        return self._guard.believes(uri, number)

    def shared(self) -> Guard:
        return _LeaseGuard(self.uri, self.what, self.number, self._standing)

    def release(self) -> None:
        if self._released.is_set():
            return
        self._released.set()
        self._heart.join()
        with suppress(OSError, StorageError):  # of a lease that is lost, or of a store that is not there
            self.check(now=True)
            self._record = {"released": self._record["token"]}
            conditional.swap(_place(self.uri, self.number), self._content(), self._tag)
        guards.lift(self)

    def _beat(self) -> None:
        beat = 0
        while not self._released.wait(HEARTBEAT_SECONDS):
            begin, beat = clock(), beat + 1
            # Whatever a store that cannot be reached for a moment raises: it is tried again, and check() tells when
            # it was too long.
            with suppress(Exception):
                self.check(now=True)
                self._record["beat"] = beat
                if self._renew():
                    self._renewed = begin

    def _renew(self) -> bool:
        """Write the own lease anew, while it is what this process wrote last."""
        place = _place(self.uri, self.number)
        tag = conditional.swap(place, self._content(), self._tag)
        if tag is None:  # taken away, or written by this process in a try whose answer got lost
            self._tag = conditional.tag_of(place)
            if exact_json.load(files.read_bytes(place)).get("token") != self._record["token"]:
                self._how_lost = "another process has written its lease"
            return False
        self._tag = tag
        return True

    def _content(self) -> bytes:
        return exact_json.dump(self._record).encode()


# --- what stands there ----------------------------------------------------------------------------------------


def _place(uri: str, number: int) -> str:
    return f"{uri}.{number:08d}"


def _numbers(uri: str) -> list[int]:
    """The numbers of the leases that are there, lowest first."""
    base = uris.name(uri)
    names = (entry[len(base) :] for entry in files.list_directory(uris.parent(uri)) if entry.startswith(base))
    return sorted(int(match[1]) for match in map(_NUMBER.fullmatch, names) if match)


def _newest(uri: str) -> tuple[int, bytes]:
    """The newest lease and what it says; 0 for one of an earlier version, which had no number, and for none."""
    while True:
        numbers = _numbers(uri)
        try:
            return (numbers[-1], files.read_bytes(_place(uri, numbers[-1]))) if numbers else (0, files.read_bytes(uri))
        except NotFound:
            if not numbers:
                return 0, b""


def _holder_of(content: bytes) -> Holder | None:
    """Who a lease names; None for one that was let go, and for none. One that cannot be read is just being written."""
    if not content:
        return None
    try:
        record = exact_json.load(content)
        return None if "released" in record else Holder.read(record)
    except (ValueError, TypeError):
        return Holder("another machine", 0, "just now")


def _standing(folder: str) -> frozenset[str] | None:
    """The places below a folder that are committed; None for a local one, which is moved as it is."""
    if uris.is_local(folder):
        return None
    below = [uris.parent(path) for path in files.files_below(folder) if uris.name(path) == commits.MARKER]
    return frozenset(uris.plain(uris.join(folder, path)) for path in below)
