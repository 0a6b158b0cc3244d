"""A room for expressions that are not ours: templates that came with a model, regular expressions of users, their
filters.

They run in a process that can be killed: a copy of this one, so that nothing is loaded anew and what they need is
there. It has a deadline for each record and a bound on what it may add to its memory. What exceeds them is told in
the place of its record, and the others have theirs. The process is made with the first call, and again when it is
needed and gone; it ends with this one, and with the room.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import pickle
import resource
import signal
import struct
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from postlude.data.example import BadRecord
from postlude.errors import UserError

SECONDS = 20.0
"""How long it may take for one record."""
MEMORY_BYTES = 2**30
"""How much memory it may need for one record, beside what this process has."""
TASKS = 256
"""That are given to the process at a time."""
TRIES = 2
"""How many processes may die under one record: a kill from outside changes nothing."""

Task = TypeVar("Task")
Result = TypeVar("Result")


class Exceeded(BadRecord):
    """A record for which something took longer, or needed more, than it may."""


class Room(Generic[Task, Result]):
    """Calls a function within the room. ``subject`` is what an error calls it, with what it is about."""

    def __init__(self, function: Callable[[Task], Result], subject: str) -> None:
        self._function, self._subject = function, subject
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def __call__(self, task: Task) -> Result:
        """What the function returns; raises what it raises, or :class:`Exceeded`."""
        [result] = self.map([task])
        if isinstance(result, Exception):
            raise result
        return result

    def map(self, tasks: Sequence[Task]) -> list[Result | Exception]:
        """What the function returns for each task, or what it raises: a UserError, BadRecord or :class:`Exceeded`. What
        else it raises is raised here."""
        with self._lock:
            results: list[Result | Exception] = []
            for first in range(0, len(tasks), TASKS):
                results += self._map(tasks[first : first + TASKS])
            return results

    def _map(self, tasks: Sequence[Task]) -> list[Result | Exception]:
        exceeded: dict[int, Exceeded] = {}
        deaths: dict[int, int] = {}
        while True:
            left = [place for place in range(len(tasks)) if place not in exceeded]
            answer = self._at_work().ask([tasks[place] for place in left])
            if isinstance(answer, _Ended):
                self._process = None
                place = left[answer.place] if left else 0
                deaths[place] = deaths.get(place, 0) + 1
                if answer.reason or deaths[place] == TRIES:
                    exceeded[place] = Exceeded(f"{self._subject} {answer.reason or 'ended its process'}")
                continue
            kind, value = answer
            if kind == "raised":
                raise value
            results = iter(value)
            return [exceeded[place] if place in exceeded else self._told(next(results)) for place in range(len(tasks))]

    def _told(self, result: Any) -> Any:
        return Exceeded(f"{self._subject} needed too much memory") if isinstance(result, MemoryError) else result

    def _at_work(self) -> _Process:
        if self._process is None or not self._process.lives:
            self._process = _Process(self._function)
        return self._process

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_process": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


class _Ended:
    """A process that has ended while it was at the task at ``place``; ``reason`` if it was made to."""

    def __init__(self, place: int, reason: str = "") -> None:
        self.place, self.reason = place, reason


class _Process:
    """A copy of this process that calls a function."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._place = mmap.mmap(-1, 8)
        """Shared: at which task it is."""
        ours, theirs = os.pipe(), os.pipe()
        parent = os.getpid()
        with warnings.catch_warnings():  # other threads may hold locks, but none that the copy takes
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            try:
                _serve(function, theirs[0], ours[1], parent, self._place)
            finally:
                os._exit(1)
        os.close(theirs[0])
        os.close(ours[1])
        self._reads, self._writes = Connection(ours[0], writable=False), Connection(theirs[1], readable=False)
        self._pid = pid
        self.end = weakref.finalize(self, _end, pid, self._reads, self._writes)

    @property
    def lives(self) -> bool:
        """Whether it was not killed since it was last asked."""
        return self.end.alive and not self._reads.poll()

    def ask(self, tasks: Sequence[Any]) -> tuple[str, Any] | _Ended:
        """The results of the tasks, or how it ended."""
        self._mark(0)
        try:
            self._writes.send_bytes(pickle.dumps(tasks, pickle.HIGHEST_PROTOCOL))
            place, waited, pause = 0, 0.0, min(SECONDS, 0.5)
            while not self._reads.poll(pause):
                waited += pause  # not by the clock: this process may be stopped for a while, and the other with it
                if self._marked() != place:
                    place, waited = self._marked(), 0.0
                elif waited > SECONDS:
                    self.end()
                    return _Ended(place, f"took longer than {SECONDS:g} seconds")
            answer: tuple[str, Any] = pickle.loads(self._reads.recv_bytes())
        except (EOFError, OSError):
            self.end()
            return _Ended(self._marked())
        return answer

    def _mark(self, place: int) -> None:
        struct.pack_into("q", self._place, 0, place)

    def _marked(self) -> int:
        return int(struct.unpack_from("q", self._place)[0])


def _end(pid: int, *connections: Connection) -> None:
    for connection in connections:
        connection.close()
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):  # of a process that was copied itself
        return


def _serve(function: Callable[[Any], Any], reads: int, writes: int, parent: int, marked: mmap.mmap) -> None:
    """Call the function until nobody asks any more."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what this process shares with the other is not touched
    low, high = sorted((reads, writes))
    os.closerange(3, low)  # locks and sockets that the other holds are not held on to
    os.closerange(low + 1, high)
    os.closerange(high + 1, 2**20)
    asked, answers = Connection(reads, writable=False), Connection(writes, readable=False)
    _bound_memory()
    while True:
        try:
            tasks = pickle.loads(asked.recv_bytes())
        except EOFError:
            return
        results: list[Any] = []
        try:
            for place, task in enumerate(tasks):
                struct.pack_into("q", marked, 0, place)
                results.append(_call(function, task))
            answer = pickle.dumps(("done", results), pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # a fault of ours: it is raised where it was asked
            answer = pickle.dumps(("raised", error), pickle.HIGHEST_PROTOCOL)
        answers.send_bytes(answer)


def _call(function: Callable[[Any], Any], task: Any) -> Any:
    try:
        return function(task)
    except (UserError, BadRecord, MemoryError) as error:
        return error


def _bound_memory() -> None:
    with open("/proc/self/status") as file:
        have = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = have + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
