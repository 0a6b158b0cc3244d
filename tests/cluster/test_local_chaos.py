"""Chaos on one machine: whichever process of a run is killed, Ray's own and the command itself included, it goes on and
ends with the numbers of an undisturbed run, bit for bit.

POSTLUDE_CHAOS_KILLS says how many are killed (by default one of each kind); those after the first of each kind are
drawn from the whole tree. What each cost until the next new step is printed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from postlude import storage
from postlude.cluster.ray_processes import EXPECTED, name_of

pytestmark = pytest.mark.long

COMMAND, CONTROLLER, RANK = "the command", "the controller", "a rank"
KINDS = [*sorted(EXPECTED), CONTROLLER, RANK, COMMAND]
STEPS_BETWEEN = 40


def tree(project) -> dict[psutil.Process, str]:
    """The processes of a run that is at work, with what each is."""
    command = psutil.Process(project.process.pid)
    found = {command: COMMAND}
    for child in command.children(recursive=True):
        with suppress(psutil.Error):
            if child.status() == psutil.STATUS_ZOMBIE:
                continue
            rank = RANK if child.name().startswith("ray::Worker") else None
            mine = CONTROLLER if child.ppid() == command.pid and child.exe() == command.exe() else None
            found[child] = name_of(child) or rank or mine or child.name()
    return found


@pytest.mark.capability("Whichever process of a local run is killed, Ray's own too, it ends bitwise undisturbed")
def test_whichever_process_of_the_tree_is_killed_the_run_ends_as_if_undisturbed(tmp_path: Path, new_project, capsys):
    kills = int(os.environ.get("POSTLUDE_CHAOS_KILLS", len(KINDS)))
    project = new_project(tmp_path)
    project.stage |= {"steps": STEPS_BETWEEN * (kills + 2), "checkpoint": {"every": 10}}
    calm = project.called("calm").finished()
    weights = storage.sha256_of(project.run.stage("sft").artifact + "/model.safetensors")
    chance, lines = random.Random(7), []
    project.called("shaken").start()
    try:
        for number in range(kills):
            least = STEPS_BETWEEN * (number + 1)
            project.until(lambda least=least: project.step() >= least)
            time.sleep(chance.random() * 0.2)
            wanted = KINDS[number] if number < len(KINDS) else None
            processes = project.until(lambda wanted=wanted: _of(project, wanted))
            victim = chance.choice(sorted(processes, key=lambda each: each.pid))
            started, begin = len(project.told("stage_started")), time.monotonic()
            name = processes[victim]
            os.kill(victim.pid, signal.SIGKILL)
            if name == COMMAND:
                project.process.communicate()
                project.start()
                for gcs in project.until(lambda: _of(project, "GCS")):  # while Ray starts
                    gcs.kill()
            project.until(lambda least=least, started=started: _has_gone_on(project, started, least))
            lines.append(f"{name}: {time.monotonic() - begin:.1f} s")
        project.ended()
    finally:
        project.kill()
    with capsys.disabled():
        print(f"\n{kills} kills, until the stage had started again: " + ", ".join(lines))
    assert project.lines() == calm
    assert storage.sha256_of(project.run.stage("sft").artifact + "/model.safetensors") == weights
    reasons = [failure["reason"] for failure in project.told("worker_failure") if failure["what"] == "cluster"]
    for name in EXPECTED if kills >= len(KINDS) else ():
        assert any(f"{name} (process" in reason for reason in reasons), (name, reasons)


def _of(project, kind: str | None) -> dict[psutil.Process, str]:
    return {process: name for process, name in tree(project).items() if kind in (None, name)}


def _has_gone_on(project, started: int, least: int) -> bool:
    """Whether the stage has started again, or did not have to."""
    time.sleep(0.05)
    return len(project.told("stage_started")) > started or project.step() >= least + STEPS_BETWEEN - 1
