"""Holding a run: waited for before it begins, and looked after while it is at work."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from postlude import storage
from postlude.runs import Run
from postlude.storage.leases import LEASE_SECONDS
from postlude.telemetry.progress import waiting
from postlude.training.interruption import Interruption

LEAVE_SECONDS = 600.0
"""How long a process is waited for that is about to leave the run with a checkpoint."""
LOOK_SECONDS = 1.0
"""Between two looks whether the run is still this process's."""

_POLL_SECONDS = 1.0


def hold(run: Run, wait_seconds: float = 0.0) -> storage.Lock:
    """Take the run for this process. LockedError if another process has it, and still has it after the wait."""
    begin = time.monotonic()
    who = f"in use by {run.holder() or 'another process'}"
    if not storage.is_local(run.uri):
        who += f"; it is taken over if it gives no sign of life for {LEASE_SECONDS:.0f} seconds"
    with waiting(f"the run {run.name}, {who}"):
        while True:
            try:
                return run.hold()
            except storage.LockedError:
                by = run.holder()
                patience = LEAVE_SECONDS if by is not None and by.leaving else wait_seconds
                if time.monotonic() - begin >= patience:
                    raise
                time.sleep(_POLL_SECONDS)


def must_leave(lock: storage.Lock) -> bool:
    """Whether the run is held only for a checkpoint. LockedError if it is not held any more."""
    try:
        lock.check()
    except storage.LockedError:
        raise
    except Exception:  # of a store that cannot be reached: those that write to it say so
        return False
    return lock.leaving is not None


@contextmanager
def looking_after(lock: storage.Lock, stop: Interruption) -> Iterator[None]:
    """Look in the block whether the lock is still held, however long a step takes. Once it is lost the main thread
    stops at once, with KeyboardInterrupt; one that is held only for a checkpoint is a request to stop with it."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            try:
                if must_leave(lock):
                    stop.request()
            except storage.LockedError:
                stop.abandon()
                return

    thread = threading.Thread(target=look, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
