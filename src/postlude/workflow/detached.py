"""Runs that go on without a terminal: started, listened to, and stopped.

Its provider starts it: as a process on this machine, whose output goes to a file in the run directory, or behind the
job server of a cluster.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence

from postlude import storage
from postlude.cluster.providers.base import provider_of, variables_set
from postlude.errors import ComputeError, UserError
from postlude.manifest.assignments import HANDED_ON, holds_secret
from postlude.manifest.value import without_value
from postlude.runs import Run
from postlude.telemetry.progress import waiting
from postlude.workflow.manifest import open_manifest
from postlude.workflow.plan import make_plan
from postlude.workflow.run import run_of
from postlude.workflow.selection import Selection

_POLL_SECONDS = 0.2


class NotRunning(UserError):
    """Nobody works on the run."""


def detach(manifest_path: str, overrides: Sequence[str], options: Sequence[str]) -> tuple[Run, str]:
    """Start ``postlude run`` in the background and return the run and who has it: a process, or a job of the cluster.

    ``options`` are those of the command. What is wrong with the manifest is raised here: nothing is started then.
    """
    resolved = open_manifest(manifest_path, overrides)
    run = run_of(resolved)
    if run.holder() is not None:
        run.hold().release()  # says who has it
    make_plan(resolved, run, Selection())
    provider = provider_of(resolved.manifest.compute)
    secret = [assignment for assignment in overrides if holds_secret(assignment)]
    if secret and provider.is_remote:
        raise ComputeError(
            f"The command line would hold a secret on another machine: {', '.join(map(without_value, secret))}. Name "
            "it in the manifest: compute.environment: {NAME: {from: environment}}."
        )
    command = ["-P", "-m", "postlude", "run", manifest_path, *(each for each in overrides if each not in secret)]
    with variables_set({HANDED_ON: json.dumps(secret)}):
        return run, provider.submit(run, [*command, *options])


def logs(uri: str, follow: bool) -> Iterator[str]:
    """What a detached run has said, and with ``follow`` goes on to say until it ends. NotRunning if it is none."""
    run = Run(uri)
    path = storage.local_path(run.output) if storage.is_local(run.uri) else ""
    if not os.path.exists(path):
        raise NotRunning(f"'{uri}' has no {storage.name(run.output)}: it was not started with --detach here.")
    with io.TextIOWrapper(storage.open_file(path), encoding="utf-8", errors="replace") as file:
        while True:
            over = run.holder() is None  # asked first: what comes after is read once more
            while text := file.read(65536):
                yield text
            if over or not follow:
                return
            time.sleep(_POLL_SECONDS)


def stop(uri: str, now: bool, seconds: float) -> str:
    """Ask whoever works on a run to stop with a checkpoint, or ``now``, and wait until it has; what was done, in words.

    :class:`NotRunning` if nobody does, ComputeError if that is on another machine or does not end in time.
    """
    run = Run(uri)
    holder = run.holder()
    if holder is None:
        raise NotRunning(f"Nobody works on '{uri}': there is nothing to stop.")
    if holder.host != socket.gethostname():
        raise ComputeError(f"{holder} works on '{uri}'. Stop it there.")
    was_sent = holder.send(signal.SIGKILL if now else signal.SIGTERM, only_if_certain=now)
    if not was_sent and run.holder() is not None:
        raise ComputeError(
            f"{holder} works on '{uri}', but the process that has this number here did not begin when that did, or an "
            "earlier version did not write down when. It was left alone: look at it, and end it yourself."
        )
    deadline = time.monotonic() + seconds
    with waiting(f"{holder} to stop" + ("" if now else " with a checkpoint")):
        while run.holder() is not None:
            if time.monotonic() > deadline:
                raise ComputeError(f"{holder} has not stopped within {seconds:.0f} seconds. --now kills it.")
            time.sleep(_POLL_SECONDS)
    return f"Killed {holder}." if now else f"{holder} has stopped. `postlude run` goes on from its checkpoint."
