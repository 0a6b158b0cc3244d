"""Rewards that are computed beside the work: in processes of their own, with a deadline for each sample and a bound on
their memory.

A function that hangs is killed with its process; one that raises, needs too much or returns no number is told. Either
way its sample has no reward, and the others have theirs. Where a process dies, its sample is tried once more in a new
one: a kill from outside changes nothing, and a function that takes its process down is told at the second time. Each
process has a pipe of its own, so that none can die with a lock that others need.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from postlude.errors import UserError
from postlude.manifest.component import Component
from postlude.processes import die_with_parent
from postlude.rollout.reward import RewardFunction, call
from postlude.storage import rules
from postlude.telemetry.guard import guard_streams
from postlude.telemetry.hardware import machine_bytes

if TYPE_CHECKING:  # the processes of the pool need no torch
    from postlude.rollout.prompts import Prompt

TRIES = 2
"""How many processes may die under one sample."""
START_SECONDS = 60.0
"""How long a process may take to start."""
SHARE_OF_MEMORY = 0.5
"""Of this machine's, that all the processes of a pool may have together."""


@dataclass(frozen=True)
class Unscored:
    """Why a sample has no reward."""

    reason: str
    """In words that are the same for many samples."""
    detail: str
    """With the record and the place."""


@dataclass(frozen=True)
class Task:
    """What is asked of one sample."""

    example_id: str
    arguments: tuple[Any, ...]


class RewardPool:
    """Calls reward functions, and what else is somebody's own code, in ``workers`` processes, which start with the
    first call. ``seconds`` is how long one call may take.

    Once it is closed no process is left. Nor is one when this process dies, however it dies.
    """

    def __init__(self, workers: int, seconds: float) -> None:
        self._workers, self._seconds = workers, seconds
        self._memory = int(machine_bytes() * SHARE_OF_MEMORY / workers)
        self._processes: list[_Process] = []

    def score(
        self, function: RewardFunction, name: str, completions: Sequence[tuple[Prompt, str]]
    ) -> list[float | Unscored]:
        """The function's reward of each completion of a prompt, or why there is none."""
        tasks = [
            Task(prompt.example_id, (prompt.asked, text, dict(prompt.rewarded_record))) for prompt, text in completions
        ]
        return self.run(call, function, name, tasks, f"the reward '{name}'")

    def run(
        self, function: Callable[..., Any], component: Component, name: str, tasks: Sequence[Task], subject: str
    ) -> list[Any | Unscored]:
        """``function(component, name, example_id, *arguments)`` for each task, or why it gave nothing, a sentence about
        the ``subject``."""
        calls = [(function, (component, name, task.example_id, *task.arguments)) for task in tasks]
        results: dict[int, Any | Unscored] = {}
        waiting = deque(range(len(tasks)))
        deaths = [0] * len(tasks)
        for process in [process for process in self._processes if process.task is not None]:
            self._remove(process)  # it is still at work on what a call asked that was broken off
        while len(results) < len(tasks):
            self._give(waiting, calls)
            busy = {process.connection: process for process in self._processes if process.task is not None}
            left = min(process.deadline for process in busy.values()) - time.monotonic()
            for connection in wait(list(busy), max(left, 0.0)):
                process = busy.pop(connection)  # type: ignore[call-overload]
                place: int = process.task
                try:
                    kind, value = process.connection.recv()
                except (EOFError, OSError):
                    self._remove(process)
                    deaths[place] += 1
                    if deaths[place] < TRIES:
                        waiting.appendleft(place)
                    else:
                        results[place] = _unscored(f"{subject} ended its process", tasks[place])
                    continue
                if kind == "stands":
                    process.stands, process.deadline = True, time.monotonic() + self._seconds
                    continue
                process.task = None
                results[place] = value if kind == "value" else Unscored(f"{subject} failed", value)
            for process in busy.values():
                if time.monotonic() > process.deadline:
                    late = f"{subject} took longer than {self._seconds:g} seconds"
                    results[process.task] = _unscored(late, tasks[process.task])  # type: ignore[index]
                    self._remove(process)
        return [results[place] for place in range(len(tasks))]

    def close(self) -> None:
        """Kill what is at work, and wait until it is gone."""
        for process in list(self._processes):
            self._remove(process)

    def _give(self, waiting: deque[int], calls: Sequence[Any]) -> None:
        """Give every process that has nothing to do something to do."""
        while waiting and len(self._processes) < min(self._workers, len(waiting)):
            self._processes.append(_Process(self._memory))
        for process in list(self._processes):
            if waiting and process.task is None:
                try:
                    process.connection.send(calls[waiting[0]])
                except OSError:  # it died while it had nothing to do
                    self._remove(process)
                    continue
                process.task = waiting.popleft()
                process.deadline = time.monotonic() + (self._seconds if process.stands else START_SECONDS)
        if waiting and not self._processes:
            self._give(waiting, calls)

    def _remove(self, process: _Process) -> None:
        self._processes.remove(process)
        process.end()


class _Process:
    """One process that computes rewards."""

    def __init__(self, memory: int) -> None:
        self.connection: Connection
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, os.getpid(), memory, rules.current()), name="rewards", daemon=True
        )
        self._process.start()
        theirs.close()
        self.task: int | None = None
        self.deadline = 0.0
        self.stands = False

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _unscored(reason: str, task: Task) -> Unscored:
    return Unscored(reason, f"{reason}, at the record '{task.example_id}'.")


def _serve(connection: Connection, parent: int, memory: int, places: tuple[rules.Rule, ...]) -> None:
    """Compute rewards until nobody asks any more."""
    die_with_parent(parent)
    rules.use(places)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    guard_streams()
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard))
    connection.send(("stands", None))
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[str, Any] = ("value", function(*arguments))
        except UserError as error:
            answer = ("failed", str(error))
        connection.send(answer)
