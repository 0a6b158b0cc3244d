"""A room for expressions that are not ours: templates that came with a model, regular expressions of users, their
filters.

They run in a process that can be killed: a copy of this one, so that nothing is loaded anew and what they need is
there. It has a deadline for each record and a bound on what it may add to its memory. What exceeds them is told in
the place of its record, and the others have theirs. One process works for all the rooms; it is made with the first
call, again when it is needed and gone, and ends with this one.
"""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import pickle
import resource
import signal
import struct
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from postlude.data.example import BadRecord
from postlude.errors import UserError
from postlude.processes import die_with_parent, take_name

SECONDS = 20.0
"""How long it may take for one record."""
MEMORY_BYTES = 2**30
"""How much memory it may need for one record, beside what this process has."""
TASKS = 256
"""That are given to the process at a time."""
NAME = "postlude room"
"""Of the process, as ``top`` and ``ps`` show it."""
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
        self._enlist()

    def _enlist(self) -> None:
        self._number = next(_numbers)
        _rooms[self._number] = self

    def __call__(self, task: Task) -> Result:
        """What the function returns; raises what it raises, or :class:`Exceeded`."""
        [result] = self.map([task])
        if isinstance(result, Exception):
            raise result
        return result

    def map(self, tasks: Sequence[Task]) -> list[Result | Exception]:
        """What the function returns for each task, or what it raises: a UserError, BadRecord or :class:`Exceeded`. What
        else it raises is raised here."""
        results: list[Result | Exception] = []
        for first in range(0, len(tasks), TASKS):
            with _at_work.lock:
                results += self._map(tasks[first : first + TASKS])
        return results

    def _map(self, tasks: Sequence[Task]) -> list[Result | Exception]:
        exceeded: dict[int, Exceeded] = {}
        deaths: dict[int, int] = {}
        while True:
            left = [place for place in range(len(tasks)) if place not in exceeded]
            answer = _at_work.process_for(self._number).ask(self._number, [tasks[place] for place in left])
            if isinstance(answer, _Ended):
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

    def __getstate__(self) -> dict[str, Any]:
        return {"_function": self._function, "_subject": self._subject}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._enlist()


_numbers = itertools.count()
_rooms: weakref.WeakValueDictionary[int, Room[Any, Any]] = weakref.WeakValueDictionary()
"""Of this process, by their numbers."""


class _AtWork:
    """The one process that works for all the rooms of this process: a copy has the functions of those that there are
    when it is made, so that it is made anew for the first task of a later one. Who holds ``lock`` may ask it."""

    def __init__(self) -> None:
        self.begin()
        os.register_at_fork(after_in_child=self.begin)  # another copy of this process has a process of its own

    def begin(self) -> None:
        self.lock = threading.Lock()
        self._process: _Process | None = None

    def process_for(self, room: int) -> _Process:
        if self._process is not None and not (self._process.lives and room in self._process.rooms):
            self._process.end()
            self._process = None
        if self._process is None:
            self._process = _Process({number: one._function for number, one in _rooms.items()})
        return self._process


_at_work = _AtWork()


class _Ended:
    """A process that has ended while it was at the task at ``place``; ``reason`` if it was made to."""

    def __init__(self, place: int, reason: str = "") -> None:
        self.place, self.reason = place, reason


class _Process:
    """A copy of this process that calls functions, by the numbers of their rooms."""

    def __init__(self, functions: Mapping[int, Callable[[Any], Any]]) -> None:
        self.rooms = functions.keys()
        self._place = mmap.mmap(-1, 8)
        """Shared: at which task it is."""
        ours, theirs = os.pipe(), os.pipe()
        parent = os.getpid()
        with warnings.catch_warnings():  # other threads may hold locks, but none that the copy takes
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            try:
                _serve(functions, theirs[0], ours[1], parent, self._place)
            finally:
                os._exit(1)
        os.close(theirs[0])
        os.close(ours[1])
        self._reads, self._writes = Connection(ours[0], writable=False), Connection(theirs[1], readable=False)
        self._pid = pid
        self.end = weakref.finalize(self, _end, pid, parent, self._reads, self._writes)

    @property
    def lives(self) -> bool:
        """Whether it was not killed since it was last asked."""
        return self.end.alive and not self._reads.poll()

    def ask(self, room: int, tasks: Sequence[Any]) -> tuple[str, Any] | _Ended:
        """The results of the tasks, or how it ended."""
        self._mark(0)
        try:
            self._writes.send_bytes(pickle.dumps((room, tasks), pickle.HIGHEST_PROTOCOL))
            place, waited, pause = 0, 0.0, min(SECONDS, 0.5)
            while not self._reads.poll(pause):
                waited += pause  # not by the clock: this process may be stopped for a while, and the other with it
                if self._marked() != place:
                    place, waited = self._marked(), 0.0
                elif waited >= SECONDS:
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


def _end(pid: int, parent: int, *connections: Connection) -> None:
    for connection in connections:
        connection.close()
    if os.getpid() == parent:  # and no other copy of it
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _serve(
    functions: Mapping[int, Callable[[Any], Any]], reads: int, writes: int, parent: int, marked: mmap.mmap
) -> None:
    """Call the functions until nobody asks any more."""
    die_with_parent(parent)
    take_name(NAME)  # else it would be taken for what it is a copy of
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
            room, tasks = pickle.loads(asked.recv_bytes())
        except EOFError:
            return
        results: list[Any] = []
        try:
            for place, task in enumerate(tasks):
                struct.pack_into("q", marked, 0, place)
                results.append(_call(functions[room], task))
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
