"""A run without a terminal: started in the background, listened to, stopped with a checkpoint, and gone on with."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from cluster.hosts import PATIENCE_SECONDS

pytestmark = pytest.mark.long

SLOW = """
import time
from pathlib import Path
from postlude.data.formats.messages import Messages
from postlude.manifest.component import register

@register("formats", "slow")
class Slow(Messages):
    def parse(self, record):
        if Path("slow").exists():
            time.sleep(0.2)
        return super().parse(record)
"""
"""A format that takes its time for as long as a file is there, so that commands meet the run at work."""


def postlude(project, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "postlude", *arguments]
    return subprocess.run(
        command,
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": str(project.folder)},  # where the plugin is
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


@pytest.mark.capability("A detached run is followed, stopped with a checkpoint and gone on with, bitwise")
def test_a_detached_run_is_followed_stopped_and_gone_on_with(project, calm):
    (project.folder / "test_plugin_slow.py").write_text(SLOW)
    project.manifest["plugins"] = ["test_plugin_slow"]
    project.manifest["data"]["chats"]["format"] = "slow"
    slow = project.folder / "slow"
    slow.touch()
    path = project.write()

    started = postlude(project, "run", path, "--detach")
    assert started.returncode == 0, started.stderr
    assert project.run.uri in started.stdout
    again = postlude(project, "run", path, "--detach")
    assert again.returncode == 1
    assert "is in use by" in again.stderr
    deadline = time.monotonic() + PATIENCE_SECONDS
    while project.step() < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert postlude(project, "status", project.run.uri).stdout.count("running")
    stopped = postlude(project, "stop", project.run.uri)
    assert stopped.returncode == 0, stopped.stderr
    assert "has stopped" in stopped.stdout
    reached = project.step()
    assert 3 <= reached < len(calm)
    assert project.run.stage("sft").checkpoints()[0].step == reached
    assert "nothing to stop" in postlude(project, "stop", project.run.uri).stderr

    slow.unlink()
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
