"""What goes wrong with a group of workers is found, told and recovered from, or ends the run with its own words."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.long


@pytest.mark.capability("A rank that stops is found, named and replaced")
def test_a_rank_that_hangs_is_named_and_replaced(project, calm):
    project.manifest["compute"]["supervision"] = {"silence_seconds": 4}
    project.start()
    project.until(lambda: project.step() > 12)
    stopped = project.ranks()[0]
    stopped.send_signal(signal.SIGSTOP)
    said = project.ended()
    (failure,) = project.told("worker_failure")
    assert failure["what"] == "hang"
    assert failure["rank"] in (0, 1)
    assert "does not answer" in failure["reason"]
    assert f"hang failure: rank {failure['rank']} on" in said
    assert not psutil.pid_exists(stopped.pid) or psutil.Process(stopped.pid).status() == psutil.STATUS_ZOMBIE
    assert project.lines() == calm


@pytest.mark.capability("A notice that a machine goes away costs no step")
def test_a_notice_costs_no_step(project, calm):
    """SIGTERM is how a provider says so; what it gives as grace is more than a step takes."""
    project.start()
    project.until(lambda: project.step() > 12)
    project.ranks()[0].send_signal(signal.SIGTERM)
    project.ended()
    (failure,) = project.told("worker_failure")
    assert failure["what"] == "preemption"
    _, resumed = project.told("stage_started")
    saved = [event["step"] for event in project.told("checkpoint_saved")]
    assert resumed["from_step"] in saved
    assert resumed["from_step"] % 10  # saved for the notice, not because it was due
    assert project.lines() == calm


def test_the_stack_of_a_rank_that_makes_no_progress_is_shown(project, tmp_path):
    """Code of a format that waits for ever."""
    project.manifest["compute"]["supervision"] = {"stall_seconds": 8, "failures": 0}
    module(project, tmp_path, "waits_forever", "threading.Event().wait()")
    project.start()
    said = project.ended(1)
    (failure,) = project.told("worker_failure")
    assert failure["what"] == "hang"
    assert "makes no progress" in failure["reason"]
    assert "test_plugin_waits_forever.py" in failure["trace"], failure["trace"]
    assert "compute.supervision.failures allows 0" in said


@pytest.mark.capability("User code that raises ends a run once, with its traceback, rank and record")
def test_code_that_raises_ends_the_run_once(project, tmp_path):
    module(project, tmp_path, "raises", "raise LookupError('no such flavour')")
    project.start()
    said = project.ended(1)
    assert not project.told("worker_failure")
    assert not project.told("recovery")
    assert len(project.told("group_formed")) == 1
    (failure,) = project.told("failure")
    assert re.search(r"rank [01] on ", failure["error"])
    assert "LookupError: no such flavour" in failure["error"]
    assert "test_plugin_raises.py" in said  # its own traceback
    assert "chats.jsonl, line 78" in said  # the record


def module(project, folder: Path, name: str, does: str) -> None:
    """A plugin whose format does something at one of the records."""
    (folder / f"test_plugin_{name}.py").write_text(
        f"""
import threading
from postlude.data.formats.messages import Messages
from postlude.manifest.component import register

@register("formats", "{name}")
class Strange(Messages):
    def parse(self, record):
        if record["messages"][0]["content"] == "Say 77.":
            {does}
        return super().parse(record)
"""
    )
    project.manifest["plugins"] = [f"test_plugin_{name}"]
    project.manifest["data"]["chats"]["format"] = name


def test_a_failure_that_comes_back_exhausts_its_budget(project):
    """A stage that loses a process whenever it begins, before any checkpoint."""
    project.manifest["compute"]["supervision"] = {"failures": 1}
    project.stage["checkpoint"] = {"every": 1000}
    project.start()
    for hits in (1, 2):
        project.until(lambda hits=hits: len(project.told("group_formed")) == hits)
        project.until(lambda: project.ranks())
        project.ranks()[0].kill()
        project.until(lambda hits=hits: len(project.told("worker_failure")) == hits)
    said = project.ended(1)
    assert "compute.supervision.failures allows 1" in said
    assert len(project.told("recovery")) == 1


@pytest.mark.capability("A controller that was stopped itself says so, and spends no budget on it")
def test_a_controller_that_was_stopped_goes_on_without_spending_its_budget(project):
    """For longer than the ranks wait until they end themselves, which they would not live to see with few steps."""
    project.manifest["compute"]["supervision"] = {"silence_seconds": 4, "failures": 0}
    project.stage |= {"steps": 500, "checkpoint": {"every": 50}}
    calm = project.called("calm").finished()
    project.called("stopped").start()
    project.until(lambda: project.step() > 12)
    command = psutil.Process(project.process.pid)
    (controller,) = [child for child in command.children() if child.cmdline() == command.cmdline()]
    for process in (command, controller):
        process.suspend()
    time.sleep(9)
    for process in (controller, command):
        process.resume()
    said = project.ended()
    assert {failure["what"] for failure in project.told("worker_failure")} == {"standstill"}
    assert project.told("stood_still")[0]["seconds"] > 8
    assert "it was stopped" in " ".join(said.split())
    assert project.lines() == calm


@pytest.mark.capability("A terminal that is closed stops a run with a checkpoint")
def test_a_run_whose_terminal_is_closed_stops_with_a_checkpoint(project, calm):
    ours, theirs = pty.openpty()
    project.process = subprocess.Popen(
        [sys.executable, "-m", "postlude", "run", project.write()],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        cwd=project.folder,
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    reader = threading.Thread(target=_read_on, args=(ours, stop := threading.Event()))
    reader.start()
    project.until(lambda: project.step() > 12)
    stop.set()
    reader.join()
    os.close(ours)
    assert project.process.wait(60) == 130
    saved = project.told("checkpoint_saved")[-1]["step"]
    assert saved == project.step() < 60
    assert project.lines() == calm[:saved]


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever runs the tests


def _read_on(descriptor: int, stop: threading.Event) -> None:
    """Have somebody at a terminal, until it is closed."""
    while not stop.is_set():
        if select.select([descriptor], [], [], 0.05)[0]:
            os.read(descriptor, 4096)
