"""A request to stop: the step in progress ends, the state is checkpointed, the process leaves."""

from __future__ import annotations

import errno
import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Whether this process was asked to stop, soon or when it has a checkpoint anyway.

    Asked in a thread, told from any. While it listens, SIGTERM, SIGHUP and SIGINT are such a request, and a second
    SIGINT stops at once, with KeyboardInterrupt. A SIGHUP that is ignored, as under nohup, stays so.
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
        """Take the signals over for the time of the context (main thread only)."""
        with heard_by(self._heard):
            yield self

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            leave_terminal()
        self.requested = True


@contextmanager
def heard_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have a handler take the signals that ask this process to stop, for the time of the context (main thread only)."""
    before = {number: signal.signal(number, handler) for number in stop_signals()}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def stop_signals() -> list[signal.Signals]:
    """The signals that ask this process to stop."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *[signal.SIGHUP] * hangs_up]


def leave_terminal() -> None:
    """Print nowhere from now on where the terminal that was printed to has gone: it would be an error."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
