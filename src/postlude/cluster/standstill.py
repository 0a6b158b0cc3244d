"""Notices that this process stood still: it was stopped (SIGSTOP, a container that is paused), or its machine slept.

A process that stands still hears nothing, and what depends on it takes it for dead: workers end themselves when nobody
looks at them. That is no failure of theirs.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

TICK_SECONDS = 0.5
LIMIT_SECONDS = 5.0
"""A gap between two ticks from which on it is no mere delay on a busy machine."""


@dataclass(frozen=True)
class Stand:
    """One time of standing still."""

    seconds: float
    slept: bool
    """Whether the machine slept: then nothing on it went on meanwhile."""

    def __str__(self) -> str:
        what = "its machine slept" if self.slept else "it was stopped"
        return f"the controlling process stood still for {self.seconds:.0f} seconds: {what}"


class Standstill:
    """Looks at the clocks, in a thread of its own and whenever it is asked. A context manager."""

    def __init__(self, limit_seconds: float = LIMIT_SECONDS) -> None:
        self._limit = limit_seconds
        self._lock, self._over = threading.Lock(), threading.Event()
        self._ticked = self._running(), self._passed()
        self._ended = float("-inf")
        self._untold: list[Stand] = []

    def __enter__(self) -> Standstill:
        self._ticked = self._running(), self._passed()
        threading.Thread(target=self._tick, name="standstill", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def look(self) -> list[Stand]:
        """What has not been told yet of it."""
        with self._lock:
            self._measure()
            untold, self._untold = self._untold, []
            return untold

    def ended_within(self, seconds: float) -> bool:
        """Whether it stood still, and goes on since no longer than this."""
        with self._lock:
            self._measure()
            return self._running() - self._ended < seconds

    def _tick(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            with self._lock:
                self._measure()

    def _measure(self) -> None:
        running, passed = self._running(), self._passed()
        awake, whole = running - self._ticked[0], passed - self._ticked[1]
        self._ticked = running, passed
        if whole > self._limit:
            self._ended = running
            self._untold.append(Stand(whole, slept=whole > 2 * awake))

    @staticmethod
    def _running() -> float:
        """Seconds in which the machine was awake."""
        return time.monotonic()

    @staticmethod
    def _passed() -> float:
        """Seconds with those in which it slept."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)
