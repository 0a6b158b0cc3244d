"""Runs that go on without a terminal: started, listened to, and stopped.

A detached run is a process of its own session on this machine, whose output goes to ``output.log`` in the run
directory, or behind Ray's job server where the manifest names a cluster that has one.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from postlude import storage
from postlude.errors import ComputeError, UserError
from postlude.manifest.load import load
from postlude.runs import Run
from postlude.telemetry.progress import waiting
from postlude.workflow.plan import make_plan
from postlude.workflow.run import run_of
from postlude.workflow.selection import Selection

OUTPUT = "output.log"
START_SECONDS = 30.0
_POLL_SECONDS = 0.2


class NotRunning(UserError):
    """Nobody works on the run."""


def detach(manifest_path: str, overrides: Sequence[str], options: Sequence[str]) -> tuple[Run, str]:
    """Start ``postlude run`` in the background and return the run and who has it: a process, or a job of the cluster.

    ``options`` are those of the command. What is wrong with the manifest is raised here: nothing is started then.
    """
    resolved = load(storage.read_bytes(manifest_path), manifest_path, overrides)
    run = run_of(resolved)
    if run.holder() is not None:
        run.hold()  # says who has it
    make_plan(resolved, run, Selection(None, None, None))
    command = ["-m", "postlude", "run", manifest_path, *overrides, *options]
    compute = resolved.manifest.compute
    if compute.provider == "ray":
        return run, _submit(command, os.environ.get("RAY_API_SERVER_ADDRESS"))
    if not storage.is_local(run.uri):
        raise ComputeError("A detached run on this machine keeps its output in the run directory, which must be local.")
    os.makedirs(storage.local_path(run.uri), exist_ok=True)
    with open(_output(run), "ab") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    with waiting(f"process {process.pid} to take the run up"):
        while run.holder() is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    if process.poll():
        raise ComputeError(
            f"The process ended at once with {process.returncode}. `postlude logs {run.uri}` has its words."
        )
    return run, f"process {process.pid}"


def logs(uri: str, follow: bool) -> Iterator[str]:
    """What a detached run has said, and with ``follow`` goes on to say until it ends. NotRunning if it is none."""
    run = Run(uri)
    path = _output(run) if storage.is_local(run.uri) else ""
    if not os.path.exists(path):
        raise NotRunning(f"'{uri}' has no {OUTPUT}: it was not started with --detach on this machine.")
    with open(path, encoding="utf-8", errors="replace") as file:
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
    os.kill(holder.pid, signal.SIGKILL if now else signal.SIGTERM)
    deadline = time.monotonic() + seconds
    with waiting(f"{holder} to stop" + ("" if now else " with a checkpoint")):
        while run.holder() is not None:
            if time.monotonic() > deadline:
                raise ComputeError(f"{holder} has not stopped within {seconds:.0f} seconds. --now kills it.")
            time.sleep(_POLL_SECONDS)
    return f"Killed {holder}." if now else f"{holder} has stopped. `postlude run` goes on from its checkpoint."


def _submit(command: Sequence[str], server: str | None) -> str:
    """Hand a command to the job server of a cluster, which must share this machine's disk. ComputeError without one."""
    import shlex

    try:
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(server or "http://127.0.0.1:8265")
        job = client.submit_job(entrypoint=shlex.join(["cd", os.getcwd()]) + " && " + shlex.join(["python", *command]))
    except (ImportError, ConnectionError, RuntimeError) as error:
        raise ComputeError(
            f"The cluster's job server cannot be used: {str(error).splitlines()[0]} It is part of Ray's dashboard "
            "(`pip install 'ray[default]'`, `ray start --head --include-dashboard=true`); RAY_API_SERVER_ADDRESS says "
            "where it is. Or run without --detach on the head."
        ) from error
    return f"job {job}: `ray job logs {job}` and `ray job stop {job}` reach it"


def _output(run: Run) -> str:
    return storage.local_path(storage.join(run.uri, OUTPUT))
