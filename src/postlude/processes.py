"""Processes: that none outlives what it was started for, or is taken for another. Linux alone."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress

import psutil

LEAVE_SECONDS = 10.0
"""How long a process that lost its parent may take to clear away what it shares: engines have a guardian that does."""
_SET_PARENT_DEATH_SIGNAL, _SET_NAME, _SET_CHILD_SUBREAPER = 1, 15, 36


def descendants() -> set[psutil.Process]:
    """All processes below this one."""
    return set(psutil.Process().children(recursive=True))


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies, however it dies; ``parent`` is the one it is to have."""
    _control(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def take_name(name: str) -> None:
    """Have this process shown as ``name``, of 15 bytes at most, by ``ps`` and ``top``."""
    _control(_SET_NAME, name.encode())


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Have what the processes below this one leave behind become its children."""
    _control(_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _control(_SET_CHILD_SUBREAPER, 0)


def end_all(but: Set[psutil.Process]) -> None:
    """End all descendants but these, and wait for it: Ray's own at once, the rest when it has had time."""
    deadline = time.monotonic() + LEAVE_SECONDS
    while left := descendants() - but:
        for process in left:
            with suppress(psutil.NoSuchProcess, ChildProcessError):
                if process.status() == psutil.STATUS_ZOMBIE:
                    if process.ppid() == os.getpid():
                        os.waitpid(process.pid, os.WNOHANG)
                elif time.monotonic() > deadline or _is_of_ray(process):
                    process.kill()
        time.sleep(0.05)


def _is_of_ray(process: psutil.Process) -> bool:
    command = " ".join(process.cmdline()[:4])
    return command.startswith("ray::") or any(f"/ray/{part}/" in command for part in ("core", "_private", "dashboard"))


def _control(option: int, value: int | bytes) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
