"""The sinks of a run: a process beside it follows the run directory, and tells them.

No step has to do with it: what is to be told stands in ``metrics.jsonl`` and ``events.jsonl``, and the process is not
the one that trains. The process that controls the run starts it, starts it anew where it dies, and at the end gives it
its time.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from postlude import storage
from postlude.manifest.component import Component
from postlude.runs import Run
from postlude.telemetry import events
from postlude.telemetry.progress import say
from postlude.telemetry.sinks.process import CLOSING_SECONDS, Order
from postlude.telemetry.sinks.sink import Sink

MOST_STARTS = 5
"""Of the process in one life of the run."""
START_SECONDS = 20.0
"""What it may take at the end besides: it may not even have begun."""
_PAUSE_SECONDS = 2.0


def sinks_of(components: Sequence[Component], run_uri: str) -> dict[str, Sink]:
    """The sinks of a manifest by the names that they are called. UserError if one cannot work on this machine."""
    sinks: dict[str, Sink] = {}
    for sink in map(Sink.of, components):
        name = sink.component_name or type(sink).__name__
        sinks[f"{name} {len(sinks)}" if name in sinks else name] = sink
        sink.check(run_uri)
    return sinks


@contextmanager
def tracking(
    run: Run,
    sinks: Mapping[str, Sink],
    trains: Mapping[str, bool],
    secrets: Any = None,
    environment: Mapping[str, str] | None = None,
    closing_seconds: float = CLOSING_SECONDS,
) -> Iterator[None]:
    """Have sinks told of a run in the block, and for so long after it as they may take for the rest.

    ``trains``: the stages, and whether they train. ``secrets`` are plain data that hold some, as a manifest does;
    ``environment`` are variables for the process of the sinks.
    """
    if not sinks:
        yield
        return
    guard, variables = storage.shared_guard(run.uri), environment or {}
    process = _Trackers(Order(run.uri, os.getpid(), sinks, trains, secrets, variables, guard, closing_seconds))
    try:
        yield
    finally:
        process.close()


class _Trackers:
    """The process, and the thread that looks after it: such a process ends with the thread that started it."""

    def __init__(self, order: Order) -> None:
        self._order, self._run = order, Run(order.run_uri)
        self._over, self._turn = threading.Event(), threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._attend, name="sinks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let it come to its end, and end it where it does not."""
        with self._turn:
            self._over.set()
            if self._process is not None and self._process.stdin is not None:
                with suppress(OSError):
                    self._process.stdin.close()
        self._thread.join(self._order.closing_seconds + START_SECONDS)
        if self._thread.is_alive() and self._process is not None:
            self._process.kill()
            self._alarm("the process of the sinks did not come to its end, and was killed")

    def _attend(self) -> None:
        for _ in range(MOST_STARTS):
            with self._turn:
                process = self._process = self._start()
                if self._over.is_set() and process.stdin is not None:
                    process.stdin.close()
            relay = threading.Thread(target=_relay, args=(process.stdout,), name="sinks' output", daemon=True)
            relay.start()
            code = process.wait()
            relay.join(1.0)  # what a sink has started may have the pipe for longer
            if code == 0:
                return
            self._alarm(f"the process of the sinks ended with {code}; another goes on where it was")
            self._over.wait(_PAUSE_SECONDS)
        self._alarm(f"the process of the sinks ended {MOST_STARTS} times, and no sink is told any more in this life")

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "postlude.telemetry.sinks.process"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # what a terminal sends is not for it
        )
        assert process.stdin is not None
        with suppress(OSError):  # it is gone already, which is seen where it is waited for
            process.stdin.write(pickle.dumps(([entry for entry in sys.path if entry], pickle.dumps(self._order))))
            process.stdin.flush()
        return process

    def _alarm(self, reason: str) -> None:
        say(f"{self._run.name}: {reason}")
        with suppress(storage.StorageError, OSError):
            events.record(self._run.events, "alarm", what="sinks", reason=reason)


def _relay(output: IO[bytes]) -> None:
    for line in output:
        say(line.decode(errors="replace").rstrip(), whole=True)
