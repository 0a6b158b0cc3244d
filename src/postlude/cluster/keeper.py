"""Keeps the process alive that controls the workers, where Ray is this command's own.

Ray's client is not made for the death of Ray's servers: calls wait without end, and after a while it ends the process
that it is in. So all that knows Ray is done in a child of the command. The command itself holds the run, hands on what
it is asked by signals, and watches: when the child dies, or says that a process of Ray's is gone, everything that is
left of it is ended and another child goes on from the committed state. What of that may fail how often is the budget of
the groups of workers.

The child is forked, before anything has threads, so it costs no time and has the manifest as it was read. It is no
member of the terminal's group of processes: what a terminal sends comes through the command alone. It dies with the
command, and its Ray with it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from types import FrameType
from typing import Any

from postlude.cluster.budget import Budget
from postlude.cluster.failure import Failure, Kind, ProgramError
from postlude.cluster.standstill import Standstill
from postlude.errors import UserError
from postlude.processes import LEAVE_SECONDS, adopting_orphans, descendants, die_with_parent, end_all
from postlude.training.interruption import heard_by, leave_terminal, stop_signals

TICK_SECONDS = 1.0
_LOST = 75


class Stopped(Exception):
    """The child was asked to stop, and is gone without a result: what was committed holds."""


@dataclass(frozen=True)
class _Result:
    value: Any = None
    error: BaseException | None = None
    lost: str | None = None
    """Why the child cannot go on though nothing is wrong with its work."""


def keep(
    work: Callable[[int], Any], budget: Budget, tell: Callable[..., Any], must_stop: Callable[[], bool] = lambda: False
) -> Any:
    """What ``work`` returns, or raises, in a child of this process.

    Where that is lost it is called again in another, with how many were lost before, and must go on where the committed
    state ends. ``tell`` records an event (its kind and fields). ``must_stop`` is asked about every second whether the
    child has to stop as if it were asked to; what it raises ends the child at once and is raised here.

    SIGTERM, SIGHUP and SIGINT are handed on to the child, a second SIGINT so that it stops at once. For the main
    thread. :class:`Stopped` if it was asked to stop and then lost; :class:`ProgramError` if the budget is spent.
    """
    before, lost = descendants(), 0

    def attend() -> None:
        for stand in standstill.look():
            tell("stood_still", seconds=stand.seconds, reason=str(stand))
        if not requests.asked and must_stop():
            requests.ask(signal.SIGTERM)

    with adopting_orphans(), _Requests().listening() as requests, Standstill() as standstill:
        while not requests.asked:
            child = requests.child = _Child(partial(work, lost))
            if requests.asked:  # while it was made
                child.signal(signal.SIGTERM)
            try:
                result = child.result(attend)
            except BaseException:  # such as a full disk, for which nothing can be told, or a lock that was lost
                end_all(but=before)
                raise
            if result.error is not None:
                raise result.error
            if result.lost is None:
                return result.value
            lost += 1
            end_all(but=before)
            if not requests.asked:
                failure = Failure(Kind.CLUSTER, result.lost)
                tell("worker_failure", what=failure.kind.value, reason=failure.reason)
                attempt, pause = budget.charge(failure)
                tell("recovery", attempt=attempt, pause_seconds=pause)
                deadline = time.monotonic() + pause
                while time.monotonic() < deadline and not requests.asked:
                    attend()
                    time.sleep(0.1)
    raise Stopped


def give_up(reason: str) -> None:
    """End this process, in which the work cannot go on, at once, so that another does it. From any thread. Returns
    where nobody keeps it alive."""
    if _Child.to_keeper is not None:
        _Child.to_keeper.send(_Result(lost=reason))
        os._exit(_LOST)


class _Child:
    """A process that does the work."""

    to_keeper: Connection | None = None
    """In the child: what it tells its keeper through."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._line, theirs = multiprocessing.Pipe(duplex=False)
        self._process: ForkProcess = multiprocessing.get_context("fork").Process(
            target=_do, args=(work, theirs, os.getpid()), name="controller"
        )
        self._process.start()
        theirs.close()

    def result(self, attend: Callable[[], None]) -> _Result:
        """How it ended, once it has. ``attend`` is called about every second."""
        result: _Result | None = None
        try:
            while result is None:
                # Asked first: what it has sent before its end is there then.
                alive = self._process.is_alive()
                with suppress(EOFError):
                    if self._line.poll(TICK_SECONDS if alive else 0.0):
                        result = self._line.recv()
                attend()
                if not alive:
                    break
            self._process.join(LEAVE_SECONDS)
        finally:
            self._process.kill()
            self._process.join()
            self._line.close()
        return result or _Result(lost=f"the process that controls the workers {self._how_it_ended()}")

    def _how_it_ended(self) -> str:
        code = self._process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"(process {self._process.pid}) {how}"

    def signal(self, number: int) -> None:
        """Send it a signal, if it is there."""
        if self._process.is_alive() and self._process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)


class _Requests:
    """What this process is asked by signals, handed on to the child that there is."""

    def __init__(self) -> None:
        self.asked = False
        self.child: _Child | None = None

    @contextmanager
    def listening(self) -> Iterator[_Requests]:
        """Hear them for as long as the context lasts."""
        with heard_by(self._hear):
            yield self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self.asked:
            number = signal.SIGTERM  # a second one reaches the child as what it is
        if number == signal.SIGHUP:
            leave_terminal()
        self.ask(number)

    def ask(self, number: int) -> None:
        """Hand a signal on."""
        self.asked = True
        if self.child is not None:
            self.child.signal(number)


def _do(work: Callable[[], Any], line: Connection, parent: int) -> None:
    """In the child."""
    os.setpgid(0, 0)
    die_with_parent(parent)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it may print though the terminal is another group's
    for number in stop_signals():
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _Child.to_keeper = line
    try:
        result = _Result(work())
    except BaseException as error:
        result = _Result(error=_portable(error))
    line.send(result)


def _portable(error: BaseException) -> BaseException:
    """The error as another process can have it: an internal fault with its traceback."""
    trace = "".join(traceback.format_exception(error))
    if not isinstance(error, UserError):
        error.add_note(trace)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return ProgramError(str(error) if isinstance(error, UserError) else trace)
    return error
