"""Signs that this process gets on: what it began last, how many things it has begun, and how long ago that was.

Whatever works counts its beats here, the trainer with each phase of a step; whoever watches over the process looks.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from dataclasses import dataclass


@dataclass(frozen=True)
class Pulse:
    """How a process gets on at a moment."""

    beats: int
    doing: str
    seconds: float
    """Since the last beat."""


_lock = threading.Lock()
_beats, _doing, _at, _thread = 0, "starting", time.monotonic(), 0


def beat(doing: str) -> None:
    """Say that something new was begun."""
    global _beats, _doing, _at, _thread
    with _lock:
        _beats, _doing, _at, _thread = _beats + 1, doing, time.monotonic(), threading.get_ident()


def pulse() -> Pulse:
    """How this process gets on."""
    with _lock:
        return Pulse(_beats, _doing, time.monotonic() - _at)


def stack() -> str:
    """Where each thread of this process is now, innermost call last; that of the last beat comes first."""
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    order = sorted(frames, key=lambda thread: (thread != _thread, names.get(thread, "")))
    stacks = {thread: "".join(traceback.format_stack(frames[thread])) for thread in order}
    return "\n".join(f"Thread {names.get(thread, thread)}:\n{text}" for thread, text in stacks.items()).rstrip()
