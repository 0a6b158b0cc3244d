"""The ranks of a test as processes of this machine, without Ray: they meet through a file, and die with the test.

They are forked from one process that has imported what every rank imports, and has done nothing else.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import tempfile
import traceback
from multiprocessing.connection import wait
from typing import Any

IMPORTED = ["postlude.stages.stage", "postlude.stages.parts", "torch.distributed.checkpoint", "torch._dynamo"]


def run_ranks(function: str, task: Any, ranks: int, threads: int = 1) -> list[Any]:
    """Call ``function`` ("module:name") with ``task`` in every rank and return the results in rank order.

    RuntimeError with the traceback of a rank that raised, once another has not returned within its grace.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory(prefix="ranks-") as meeting:
        processes, ends = [], {}
        for rank in range(ranks):
            told = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "POSTLUDE_RENDEZVOUS": f"file://{meeting}/rendezvous",
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": str(threads),
            }
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(function, task, threads, told, theirs))
            process.start()
            theirs.close()
            processes.append(process)
            ends[ours] = rank
        results, failures, grace = {}, [], None
        while ends and (ready := wait(list(ends), timeout=grace)):
            for end in ready:
                rank = ends.pop(end)
                try:
                    raised, value = end.recv()
                except EOFError:
                    raised, value = True, f"rank {rank} died"
                if raised:
                    failures.append(value)
                    grace = 10.0
                else:
                    results[rank] = value
        for process in processes:
            process.kill()
            process.join()
    if failures:
        raise RuntimeError("\n".join(failures))
    return [results[rank] for rank in range(ranks)]


def _rank(function: str, task: Any, threads: int, environment: dict[str, str], end: Any) -> None:
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(threads)
    module, name = function.split(":")
    try:
        end.send((False, getattr(importlib.import_module(module), name)(task)))
    except BaseException:
        end.send((True, traceback.format_exc()))
