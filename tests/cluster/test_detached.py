"""A run without a terminal: started in the background, listened to, stopped with a checkpoint, and gone on with."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from cluster.hosts import PATIENCE_SECONDS

pytestmark = pytest.mark.long


def postlude(project, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "postlude", *arguments]
    return subprocess.run(command, cwd=project.folder, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


@pytest.mark.capability("A detached run is followed, stopped with a checkpoint and gone on with, bitwise")
def test_a_detached_run_is_followed_stopped_and_gone_on_with(project, new_project, tmp_path_factory):
    calm_project = new_project(tmp_path_factory.mktemp("calm"))
    for one in (project, calm_project):
        one.stage |= {"steps": 400, "batch": {"tokens": 4096, "block": 128}}  # longer than a few commands take
    calm = calm_project.finished()
    path = project.write()

    started = postlude(project, "run", path, "--detach")
    assert started.returncode == 0, started.stderr
    assert project.run.uri in started.stdout
    again = postlude(project, "run", path, "--detach")
    assert again.returncode == 1
    assert "is in use by" in again.stderr
    deadline = time.monotonic() + PATIENCE_SECONDS
    while project.step() < 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert postlude(project, "status", project.run.uri).stdout.count("running")
    stopped = postlude(project, "stop", project.run.uri)
    assert stopped.returncode == 0, stopped.stderr
    assert "has stopped" in stopped.stdout
    reached = project.step()
    assert 20 <= reached < 400
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
