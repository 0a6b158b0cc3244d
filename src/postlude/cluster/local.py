"""The ranks of a stage as processes of this machine.

One rank runs in this very process, where a debugger can follow it. Several are spawned, meet through a file
(no port to collide on), and live and die together: with their parent, with each other, and by the signals that
the parent hands on. A user's mistake in a rank reaches the caller as the same :class:`UserError`.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
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
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="postlude-") as meeting:
        rendezvous = f"file://{meeting}/rendezvous"
        processes, ends = [], []
        for rank in range(ranks):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "POSTLUDE_RENDEZVOUS": rendezvous,
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": str(threads),
            }
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank,
                args=(function, task, threads, os.getpid(), environment, theirs),
                name=f"rank-{rank}",
            )
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
        with _signals_handed_on(processes):
            try:
                return _collect(processes, ends)
            finally:
                for process in processes:
                    process.kill()
                for process in processes:
                    process.join()


def _collect(processes: list[Any], ends: list[Connection]) -> list[Any]:
    """Each rank's result; the first failure is raised after the others had their grace."""
    results: dict[int, Any] = {}
    failures: dict[int, BaseException] = {}
    open_ends = dict(enumerate(ends))
    while open_ends:
        ready = wait(list(open_ends.values()), timeout=GRACE_SECONDS if failures else None)
        if not ready:
            break
        for rank in [rank for rank, end in open_ends.items() if end in ready]:
            try:
                outcome, value = open_ends.pop(rank).recv()
            except EOFError:
                processes[rank].join()
                failures[rank] = RankFailed(f"rank {rank} ended with exit code {processes[rank].exitcode}")
                continue
            (results if outcome == "result" else failures)[rank] = value
    if failures:
        raise min(failures.values(), key=lambda failure: not isinstance(failure, UserError))
    return [results[rank] for rank in range(len(processes))]


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
def _signals_handed_on(processes: list[Any]) -> Iterator[None]:
    """Pass SIGTERM and SIGINT to every rank: each decides with the others at the next step."""

    def hand_on(number: int, frame: Any) -> None:
        for process in processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGTERM)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
