"""Waiting for what another thread or process does."""

from __future__ import annotations

import threading
from collections.abc import Callable


def until(holds: Callable[[], bool]) -> None:
    """Return once it holds; a loaded machine may take a minute."""
    moment = threading.Event()
    for _ in range(3000):
        if holds():
            return
        moment.wait(0.02)
    raise AssertionError("it did not come about")
