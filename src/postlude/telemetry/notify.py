"""Receivers of alarms: a web address or a program is told of each as it comes.

A thread follows the run's events, whoever writes them; each receiver has a thread and a queue of its own. So a receiver
that hangs keeps up neither the run nor another receiver. An alarm is sent once or, if that fails, not at all; what was
not sent is counted in the events.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from postlude import storage
from postlude.manifest.alarms import Receiver
from postlude.runs import Run
from postlude.telemetry import events
from postlude.telemetry.progress import say

SENT = ("alarm", "alarm_over", "failure")
"""The kinds of events that receivers are told of."""
MOST_WAITING = 100
"""Alarms that wait for one receiver; more are dropped."""
CLOSING_SECONDS = 15.0
"""What the end of a run waits besides, where its folder does not answer."""


@contextmanager
def notifying(run: Run, receivers: Sequence[Receiver] | None) -> Iterator[None]:
    """Tell receivers what happens in a run from now on, until the context ends; then they have their deadline to take
    what is left."""
    if not receivers:
        yield
        return
    follower = _Follower(run, [_Outbox(receiver) for receiver in receivers])
    try:
        yield
    finally:
        follower.close()


class _Outbox:
    """What one receiver is still to be told."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.name = f"{urlsplit(receiver.webhook).hostname}" if receiver.webhook else (receiver.command or [""])[0]
        self._waiting: queue.Queue[bytes | None] = queue.Queue()
        self._turn = threading.Lock()
        self._unsent, self._dropped, self._reason = 0, 0, ""
        self._thread = threading.Thread(target=self._work, name=f"notify {self.name}", daemon=True)
        self._thread.start()

    def put(self, letter: bytes) -> None:
        with self._turn:
            if self._unsent >= MOST_WAITING:
                self._dropped, self._reason = self._dropped + 1, f"{MOST_WAITING} wait already"
                return
            self._unsent += 1
        self._waiting.put(letter)

    def close(self, until: float) -> None:
        """Wait so long for what is left, and give up the rest."""
        self._waiting.put(None)
        self._thread.join(max(0.0, until - time.monotonic()))
        with self._turn:
            if self._unsent:
                self._dropped, self._reason = self._dropped + self._unsent, "the run went on to its end without it"

    def dropped(self) -> tuple[int, str]:
        """How many were dropped since this was asked before, and why the last one was."""
        with self._turn:
            count, self._dropped = self._dropped, 0
            return count, self._reason

    def _work(self) -> None:
        while (letter := self._waiting.get()) is not None:
            failed = _send(self.receiver, letter)
            with self._turn:
                self._unsent -= 1
                if failed is not None:
                    self._dropped, self._reason = self._dropped + 1, failed


def _send(receiver: Receiver, letter: bytes) -> str | None:
    """Tell a receiver; why that failed, or None."""
    try:
        if receiver.webhook is not None:
            headers = {"Content-Type": "application/json", "User-Agent": "postlude"}
            request = urllib.request.Request(receiver.webhook, letter, headers)
            with urllib.request.urlopen(request, timeout=receiver.deadline_seconds):
                return None
        return _start(receiver.command or [], letter, receiver.deadline_seconds)
    except (OSError, ValueError) as error:  # URLError and HTTPError are OSErrors
        return f"{type(error).__name__}: {error}"


def _start(command: Sequence[str], letter: bytes, seconds: float) -> str | None:
    silent = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=silent, stderr=silent, start_new_session=True
    ) as process:
        try:
            process.communicate(letter, timeout=seconds)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return f"it took more than {seconds:g} seconds"
    return None if process.returncode == 0 else f"it ended with exit code {process.returncode}"


class _Follower:
    """Reads what is added to a run's events, and hands it out."""

    def __init__(self, run: Run, outboxes: Sequence[_Outbox]) -> None:
        self._run, self._outboxes = Run(run.uri), outboxes  # a journal far away has a writer of its own in each thread
        self._seconds = 1.0 if storage.is_local(run.uri) else 10.0
        self._events = storage.Entries(self._run.events)
        self._over = threading.Event()
        self._read()
        self._thread = threading.Thread(target=self._work, name="notify", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(max(outbox.receiver.deadline_seconds for outbox in self._outboxes) + CLOSING_SECONDS)

    def _work(self) -> None:
        try:
            while not self._over.wait(self._seconds):
                self._hand_out()
            self._hand_out()
            until = time.monotonic() + max(outbox.receiver.deadline_seconds for outbox in self._outboxes)
            for outbox in self._outboxes:
                outbox.close(until)
            self._tell_dropped()
        except (storage.StorageError, OSError) as error:  # the run itself meets it, too
            say(f"{self._run.name}: nobody is told of alarms any more: {error}")

    def _hand_out(self) -> None:
        for event in self._read():
            if event.get("kind") in SENT:
                letter = json.dumps({"run": self._run.name, **event}).encode()
                for outbox in self._outboxes:
                    outbox.put(letter)
        self._tell_dropped()

    def _read(self) -> list[dict[str, Any]]:
        """The lines that were added since this was asked before."""
        kept = self._events.update()
        return self._events.entries[kept:]

    def _tell_dropped(self) -> None:
        for outbox in self._outboxes:
            count, reason = outbox.dropped()
            if count:
                events.record(
                    self._run.events, "notifications_dropped", receiver=outbox.name, count=count, reason=reason
                )
