"""Who may write below a folder: everything in ``storage`` that writes, makes or removes something asks first.

A process that holds the lock of a folder has it guarded by the lock; one that works for the holder, by a guard that it
was given (:meth:`Guard.shared`, :func:`guarded`). So nothing outside ``storage`` has to remember. Where nothing is
guarded, as for readers and for files of a user's own, a check costs a look into an empty dictionary.

Nothing is written to a place that the rules of storage have as read-only either.

Between a look and the write that follows it there are microseconds in which a folder may still change hands; what is
written by then is told apart by the number that markers repeat, where there is one.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from postlude.storage import uris
from postlude.storage.errors import LockedError, NotWritable
from postlude.storage.holders import Holder
from postlude.storage.rules import rule_of

Identity = tuple[int, int]
"""Of a local file or folder: device and inode."""


class Guard(ABC):
    """Knows whether this process may still write below a folder: below the one that the file ``uri`` stands in, which
    guards ``what``. Used from any thread."""

    number: int | None = None
    """The fencing number, which grows each time the lock is taken; None where the kernel holds the lock, so that no
    two processes can believe that they have it."""

    def __init__(self, uri: str, what: str) -> None:
        self.uri, self.what, self.folder = uri, what, uris.parent(uri)

    @abstractmethod
    def check(self, now: bool = False) -> None:
        """LockedError if the lock was lost: then nothing more may be written. A lock that is behind a network is looked
        at once in a while, or ``now``."""

    def believes(self, uri: str, number: int) -> bool:
        """Whether what was committed at ``uri`` with this number counts: not if its writer was the holder no more."""
        return True

    def refused(self, by: Holder | None) -> LockedError:
        """The error that another has the lock."""
        who = f"{by or 'another process'}{', which is about to leave it with a checkpoint' * bool(by and by.leaving)}"
        return LockedError(f"The {self.what} at '{self.folder}' is in use by {who}. Wait until it ends, or stop it.")

    def lost(self, how: str) -> LockedError:
        """The error that this process has it no longer."""
        return LockedError(
            f"The {self.what} at '{self.folder}' is no longer this process's: {how}. Nothing was written there since. "
            "Run again, where it stands now, to go on from its last checkpoint."
        )


class Lock(Guard):
    """A lock that is held until it is released or the process ends. A context manager, which raises LockedError in the
    place of what went wrong because the lock was lost."""

    leaving: str | None = None
    """Why this process must stop with a checkpoint, though nobody else has the lock yet."""

    @abstractmethod
    def shared(self) -> Guard:
        """A guard for a process that works for this one: it can be pickled."""

    @abstractmethod
    def release(self) -> None:
        """Let go; releasing again does nothing."""

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is not None and not isinstance(error, LockedError):
                with suppress(OSError):  # a store that cannot be reached may well be what went wrong
                    self.check(now=True)
        finally:
            self.release()


_guards: dict[str, Guard] = {}
"""By folder, under each of the names by which a process may write there."""


def set_guard(folder: str, guard: Guard) -> None:
    """Have a folder guarded by this and nothing else, until :func:`lift`."""
    _guards.update(dict.fromkeys(_names(folder), guard))


def lift(guard: Guard) -> None:
    """Let its folder be."""
    for name in [name for name, each in _guards.items() if each is guard]:
        del _guards[name]


@contextmanager
def guarded(folder: str, guard: Guard | None) -> Iterator[None]:
    """Have a folder guarded in the block, unless it is anyway."""
    if guard is None or guard_of(folder) is not None:
        yield
        return
    set_guard(folder, guard)
    try:
        yield
    finally:
        lift(guard)


def guard_of(uri: str) -> Guard | None:
    """What guards a place; None where nothing does."""
    return _find(uri)[1]


def shared_guard(folder: str) -> Guard | None:
    """A guard of a folder for a process that works for this one; None where nothing guards it."""
    guard = guard_of(folder)
    return guard.shared() if isinstance(guard, Lock) else guard


def check(uri: str, now: bool = False) -> None:
    """LockedError if the place is guarded and this process may no longer write there; NotWritable if nothing of ours
    may."""
    _check_rule(uri)
    guard = guard_of(uri)
    if guard is not None:
        guard.check(now)


def make_folders(path: str) -> None:
    """Make a local folder and those above it that are missing. A guarded folder that is gone is never made anew from
    below: LockedError. NotWritable as :func:`check`."""
    _check_rule(path)
    folder, guard = _find(path or ".")
    if guard is None:
        os.makedirs(path or ".", exist_ok=True)
        return
    guard.check()
    path, missing = os.path.normpath(path), []
    while path != folder and not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for path in reversed(missing):
        try:
            os.mkdir(path)
        except FileExistsError:
            if not os.path.isdir(path):
                raise
        except FileNotFoundError:
            guard.check(now=True)
            raise


def _check_rule(uri: str) -> None:
    if (rule := rule_of(uri)).read_only:
        raise NotWritable(
            f"'{uri}' is not written: the manifest has '{rule.prefix}' as read-only (storage, read_only: true). Choose "
            "another place, or give it a rule of its own."
        )


def identity(path: str) -> Identity | None:
    """What stands at a path, which may be reached by other names; None if nothing does."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def _find(uri: str) -> tuple[str, Guard | None]:
    if not _guards:
        return "", None
    place = uris.plain(uri)
    return next(((name, guard) for name, guard in list(_guards.items()) if uris.is_below(place, name)), ("", None))


def _names(folder: str) -> set[str]:
    """A local folder is written to as it was named, by its whole path, and by libraries as that is without links."""
    if not uris.is_local(folder):
        return {uris.plain(folder)}
    path = uris.plain(folder)
    return {path, os.path.abspath(path), os.path.realpath(path)}
