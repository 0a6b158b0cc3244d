"""The processes of Ray's own on this machine, looked at several times a second for as long as Ray is this process's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from postlude.cluster.standstill import LIMIT_SECONDS

TICK_SECONDS = 0.25
FIND_SECONDS = 60.0
"""How long after the start new ones are looked for; it takes a few seconds until all are there."""
NAMES = {
    "gcs_server": "GCS",
    "raylet/raylet": "raylet",
    "log_monitor.py": "log monitor",
    "dashboard/agent.py": "dashboard agent",
    "runtime_env/agent/main.py": "agent for environments",
    "autoscaler/v2/monitor.py": "monitor",
    "autoscaler/_private/monitor.py": "monitor",
    "ray::DashboardAgent": "dashboard agent",
    "ray::RuntimeEnvAgent": "agent for environments",
}
"""What tells each by its command line, and what it is called."""
NAMES_OF_DEAD = {"gcs_server": "GCS", "raylet": "raylet"}
"""Of a process that ended before it was looked at the kernel has the program's name alone."""
EXPECTED = {"GCS", "raylet", "log monitor", "dashboard agent", "agent for environments"}
"""When these are known no more are looked for."""


class _Watch:
    def __init__(self, silence_seconds: float) -> None:
        self._silence_seconds = silence_seconds
        self._known: dict[psutil.Process, str] = {}
        self._stopped: dict[psutil.Process, float] = {}
        """Since when."""
        self._begin = self._looked = time.monotonic()

    def look(self) -> str | None:
        """Why Ray cannot be relied upon any more, if it cannot."""
        now = time.monotonic()
        if now - self._looked > LIMIT_SECONDS:  # this process stood still itself, and they may have with it
            self._stopped.clear()
        self._looked = now
        if now - self._begin < FIND_SECONDS and not set(self._known.values()) >= EXPECTED:
            self._find()
        states = {process: _state(process) for process in self._known}
        gone = [f"{self._known[process]} (process {process.pid})" for process, state in states.items() if state is None]
        if gone:  # one that dies takes others along
            return f"Ray's {' and '.join(gone)} {'is' if len(gone) == 1 else 'are'} gone"
        for process, state in states.items():
            if state != psutil.STATUS_STOPPED:
                self._stopped.pop(process, None)
            elif now - self._stopped.setdefault(process, now) > self._silence_seconds:
                who = f"{self._known[process]} (process {process.pid})"
                return f"Ray's {who} has been stopped for {self._silence_seconds:g} seconds"
        return None

    def _find(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                name = name_of(process)
                if name is not None:
                    self._known.setdefault(process, name)


def name_of(process: psutil.Process) -> str | None:
    """What a process of Ray's own is called; None for any other."""
    if process.status() == psutil.STATUS_ZOMBIE:
        return NAMES_OF_DEAD.get(process.name())
    command = " ".join(process.cmdline()[:4])
    return next((name for mark, name in NAMES.items() if mark in command), None)


@contextmanager
def watched(silence_seconds: float, lost: Callable[[str], None]) -> Iterator[None]:
    """Call ``lost`` with the reason, from a thread, when a process of Ray's own below this one has died, or has been
    stopped for so long; before an error leaves the block, too, which may come of that."""
    over, watch = threading.Event(), _Watch(silence_seconds)

    def keep_looking() -> None:
        while not over.wait(TICK_SECONDS):
            if (reason := watch.look()) is not None:
                lost(reason)
                return

    thread = threading.Thread(target=keep_looking, name="ray's processes", daemon=True)
    thread.start()
    try:
        yield
    except Exception:
        over.set()
        thread.join()
        if (reason := watch.look()) is not None:
            lost(reason)
        raise
    finally:
        over.set()
        thread.join()


def _state(process: psutil.Process) -> str | None:
    """As psutil has it; None for one that is gone."""
    try:
        state = process.status() if process.is_running() else psutil.STATUS_DEAD
    except psutil.NoSuchProcess:
        return None
    return None if state in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else state
