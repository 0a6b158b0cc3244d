"""A run without a terminal: started in the background, listened to, stopped with a checkpoint, and gone on with."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from cluster.hosts import PATIENCE_SECONDS

pytestmark = pytest.mark.long


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "postlude", *arguments]


def postlude(project, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=project.folder, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


@contextmanager
def standing_still(processes: list[psutil.Process]) -> Iterator[None]:
    """Stop processes for the time of the context."""
    assert processes
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


@pytest.mark.capability("A detached run is followed, stopped with a checkpoint and gone on with, bitwise")
def test_a_detached_run_is_followed_stopped_and_gone_on_with(project, calm):
    project.manifest["compute"]["supervision"] = {"silence_seconds": PATIENCE_SECONDS}
    path = project.write()
    started = postlude(project, "run", path, "--detach")
    assert started.returncode == 0, started.stderr
    assert project.run.uri in started.stdout
    again = postlude(project, "run", path, "--detach")
    assert again.returncode == 1
    assert "is in use by" in again.stderr
    deadline = time.monotonic() + PATIENCE_SECONDS
    while project.step() < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    with standing_still(project.ranks(above=[project.run.holder().pid])):  # commands take longer than the steps
        assert postlude(project, "status", project.run.uri).stdout.count("running")
        stopping = subprocess.Popen(command("stop", project.run.uri), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert b"to stop with a checkpoint" in stopping.stderr.readline()
    out, _ = stopping.communicate(timeout=PATIENCE_SECONDS)
    assert stopping.returncode == 0
    assert b"has stopped" in out
    reached = project.step()
    assert 20 <= reached < len(calm)
    assert project.run.stage("sft").checkpoints()[0].step == reached
    assert "nothing to stop" in postlude(project, "stop", project.run.uri).stderr

    assert postlude(project, "run", path, "--detach").returncode == 0
    followed = postlude(project, "logs", project.run.uri, "--follow")
    assert followed.returncode == 0
    assert "continues after step" in followed.stdout
    assert "done" in followed.stdout
    assert project.lines() == calm


def test_what_is_wrong_with_the_manifest_is_told_before_anything_starts(project):
    project.stage["optimiser"] = {}
    wrong = postlude(project, "run", project.write(), "--detach")
    assert wrong.returncode == 2
    assert "unknown key" in wrong.stderr
    assert not project.run.exists()
    assert "was not started with --detach" in postlude(project, "logs", project.run.uri).stderr
