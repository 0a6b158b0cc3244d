"""The ranks of a stage as processes of this machine.

One rank runs in this very process, where a debugger can follow it. Several are spawned, meet through a file
(no port to collide on), and live and die together: with their parent, with each other, and by the signals that
the parent hands on. A user's mistake in a rank reaches the caller as the same :class:`UserError`.

Groups of ranks can be at work side by side, each for a task of its own: :class:`RankGroup` and :func:`attend`.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from postlude.manifest.errors import UserError

GRACE_SECONDS = 10.0
"""How long the other ranks may take to leave by themselves once one has failed."""


class RankFailed(Exception):
    """A rank ended without saying why; its own traceback, if it had one, is on standard error."""


def run_ranks(function: str, task: Any, ranks: int, threads: int) -> list[Any]:
    """Call ``function`` ("module:name") with ``task`` in every rank and return the results in rank order.

    ``task`` and the results are picklable. Each rank computes with ``threads`` threads.
    :class:`UserError` as a rank raised it; :class:`RankFailed` when a rank died.
    """
    if ranks == 1:
        return [_call(function, task, threads)]
    with RankGroup(function, task, ranks, threads) as group, signals_handed_on([group]):
        while not group.is_over:
            attend([group])
        return group.results()


class RankGroup:
    """The ranks of one task, spawned, even where it is only one. A context manager: on leaving none is alive.

    ``environment`` is what each rank gets besides the variables by which the ranks find each other.
    """

    def __init__(
        self, function: str, task: Any, ranks: int, threads: int, environment: Mapping[str, str] | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._meeting = tempfile.TemporaryDirectory(prefix="postlude-")
        self.processes: list[Any] = []
        self.ends: dict[int, Connection] = {}
        """Where each rank that is still at work will say how it ended."""
        self._results: dict[int, Any] = {}
        self._failures: dict[int, BaseException] = {}
        self._deadline: float | None = None
        for rank in range(ranks):
            told = {
                **(environment or {}),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "POSTLUDE_RENDEZVOUS": f"file://{self._meeting.name}/rendezvous",
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": str(threads),
            }
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(function, task, threads, os.getpid(), told, theirs), name=f"rank-{rank}"
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.ends[rank] = ours

    @property
    def is_over(self) -> bool:
        """Whether every rank has ended, or one has failed and the others have had their grace."""
        return not self.ends or self.seconds_left == 0.0

    @property
    def seconds_left(self) -> float | None:
        """How long the others may take, once a rank has failed; None before."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def hear(self, ready: Sequence[Any]) -> None:
        """Take what the ranks behind the ends that are ``ready`` have to say."""
        for rank in [rank for rank, end in self.ends.items() if end in ready]:
            try:
                outcome, value = self.ends.pop(rank).recv()
            except EOFError:
                self.processes[rank].join()
                outcome = "failure"
                value = RankFailed(f"rank {rank} ended with exit code {self.processes[rank].exitcode}")
            (self._results if outcome == "result" else self._failures)[rank] = value
            if outcome == "failure" and self._deadline is None:
                self._deadline = time.monotonic() + GRACE_SECONDS

    def results(self) -> list[Any]:
        """What each rank returned. What a rank raised is raised here, a user's mistake first."""
        if self._failures:
            raise min(self._failures.values(), key=lambda failure: not isinstance(failure, UserError))
        return [self._results[rank] for rank in range(len(self.processes))]

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self._meeting.cleanup()


def attend(groups: Sequence[RankGroup]) -> None:
    """Wait until a rank of any group has something to say, or the grace of a group is over."""
    ends = [end for group in groups for end in group.ends.values()]
    left = [group.seconds_left for group in groups if group.seconds_left is not None]
    ready = wait(ends, timeout=min(left, default=None))
    for group in groups:
        group.hear(ready)


def _rank(function: str, task: Any, threads: int, parent: int, environment: dict[str, str], end: Connection) -> None:
    _die_with(parent)
    os.environ.update(environment)
    try:
        end.send(("result", _call(function, task, threads)))
    except UserError as error:
        end.send(("failure", error))
    except BaseException as error:
        traceback.print_exc()
        end.send(("failure", RankFailed(f"rank {environment['RANK']}: {type(error).__name__}: {error}")))
        sys.exit(1)


def _call(function: str, task: Any, threads: int) -> Any:
    import torch

    torch.set_num_threads(threads)
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)(task)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however it dies."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


@contextmanager
def signals_handed_on(groups: Sequence[RankGroup]) -> Iterator[list[int]]:
    """Pass SIGTERM and SIGINT to every rank of the groups: each decides with its own at the next step.

    ``groups`` may change meanwhile. The list that comes back gathers the signals that came.
    """
    came: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        came.append(number)
        for process in [process for group in groups for process in group.processes]:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGTERM)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
