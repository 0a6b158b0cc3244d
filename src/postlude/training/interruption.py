"""A request to stop: the step in progress ends, the state is checkpointed, the process leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Whether this process was asked to stop, soon or when it has a checkpoint anyway.

    Asked in a thread, told from any. While it listens, SIGTERM and SIGINT are such a request, and a second SIGINT stops
    at once, with KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.requested = False
        self.requested_at_checkpoint = False

    def __call__(self, at_checkpoint: bool = True) -> bool:
        """Whether to stop now; ``at_checkpoint`` says that nothing would be lost."""
        return self.requested or (self.requested_at_checkpoint and at_checkpoint)

    def request(self, at_checkpoint: bool = False) -> None:
        """Ask to stop after the step in progress, or after the next checkpoint."""
        if at_checkpoint:
            self.requested_at_checkpoint = True
        else:
            self.requested = True

    def abandon(self) -> None:
        """Stop at once, with KeyboardInterrupt in the main thread. From any thread, while it listens."""
        self.requested = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    @contextmanager
    def listening(self) -> Iterator[Interruption]:
        """Take the two signals over for the time of the context (main thread only)."""
        before = {number: signal.signal(number, self._heard) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
