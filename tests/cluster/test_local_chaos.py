"""Chaos on one machine: whichever process of a run is killed, Ray's own and the command itself included, it goes on and
ends with the numbers of an undisturbed run, bit for bit.

POSTLUDE_CHAOS_KILLS says how many are killed (by default one of each kind); those after the first of each kind are
drawn from the whole tree, some while the run recovers from the one before. How long each kept the run from training is
printed.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from postlude import storage
from postlude.cluster import fork_client, fork_server
from postlude.cluster.ray_processes import EXPECTED, name_of

pytestmark = pytest.mark.long

COMMAND, CONTROLLER, RANK, FORK_SERVER = "the command", "the controller", "a rank", "the fork server"
EACH_KIND = [*[(kind,) for kind in (*sorted(EXPECTED), CONTROLLER, FORK_SERVER, RANK)], (COMMAND, "GCS")]
"""What is killed in turn, each while the run trains; what follows in the same turn at once, here while Ray starts."""
STEPS_BETWEEN = 20
RECOVERY_SECONDS = 10.0
"""Within which of a kill another follows, where one does."""


def turns(kills: int, chance: random.Random) -> Iterator[tuple[str | None, ...]]:
    """Which kinds of processes are killed one after another; None for any."""
    yield from EACH_KIND
    left = kills - sum(map(len, EACH_KIND))
    while left > 0:
        turn = (None,) * min(left, chance.choice([1, 1, 1, 2]))
        left -= len(turn)
        yield turn


@pytest.mark.capability("Whichever process of a local run is killed, Ray's own too, it ends bitwise undisturbed")
def test_whichever_process_of_the_tree_is_killed_the_run_ends_as_if_undisturbed(tmp_path: Path, new_project, capsys):
    chance = random.Random(7)
    kills = int(os.environ.get("POSTLUDE_CHAOS_KILLS", 0))
    wanted = list(turns(kills, chance))
    project = new_project(tmp_path)
    project.manifest["compute"]["pools"]["train"]["workers"] = 2 if kills else 1  # most of a recovery is their imports
    project.stage |= {"steps": STEPS_BETWEEN * (len(wanted) + 2), "checkpoint": {"every": 10}}
    calm = project.called("calm").finished()
    weights = storage.sha256_of(project.run.stage("sft").artifact + "/model.safetensors")
    killed, waits = list[str](), list[float]()
    project.called("shaken").start()
    try:
        for number, turn in enumerate(wanted, start=1):
            project.until(lambda least=STEPS_BETWEEN * number: project.step() >= least)
            for position, kind in enumerate(turn):
                time.sleep(chance.random() * (RECOVERY_SECONDS if position and kind is None else 0.2))
                killed.append(kill(project, kind, chance))
                begun, reached, begin = len(project.told("stage_started")), project.step(), time.monotonic()
                if killed[-1] == COMMAND:
                    project.process.communicate()
                    project.start()
            project.until(lambda begun=begun, reached=reached: trains_again(project, begun, reached))
            waits.append(time.monotonic() - begin)
            with capsys.disabled():
                print(f"\n{' and '.join(killed[-len(turn) :])}: {waits[-1]:.1f} s", end="", flush=True)
        project.ended()
    finally:
        project.kill()
    with capsys.disabled():
        print(f"\n{len(killed)} kills: {statistics.median(waits):.1f} s in the median, {max(waits):.1f} s at most")
    assert project.lines() == calm
    assert storage.sha256_of(project.run.stage("sft").artifact + "/model.safetensors") == weights
    reasons = [failure["reason"] for failure in project.told("worker_failure") if failure["what"] == "cluster"]
    for name in EXPECTED:
        assert any(f"{name} (process" in reason for reason in reasons), (name, reasons)


def kill(project, kind: str | None, chance: random.Random) -> str:
    """Kill a process of this kind, or any, of a run that is at work; what it is."""
    while True:
        of_kind = project.until(lambda: [each for each in tree(project) if kind in (None, each[1])])
        process, name = chance.choice(sorted(of_kind, key=lambda each: each[0].pid))
        with suppress(psutil.NoSuchProcess):
            process.kill()
            return name


def tree(project) -> list[tuple[psutil.Process, str]]:
    """The processes of a run that is at work, with what each is."""
    command = psutil.Process(project.process.pid)
    found = [(command, COMMAND)]
    for child in command.children(recursive=True):
        with suppress(psutil.Error):
            if child.status() != psutil.STATUS_ZOMBIE:
                rank = RANK if child.name().startswith("ray::Worker") else None
                mine = CONTROLLER if child.ppid() == command.pid and child.exe() == command.exe() else None
                forks = FORK_SERVER if fork_server.__name__ in child.cmdline() else None
                client = "a fork client" if fork_client.__file__ in child.cmdline() else None
                found.append((child, name_of(child) or rank or forks or client or mine or child.name()))
    return found


def trains_again(project, begun: int, reached: int) -> bool:
    """Whether the stage has begun again and made a step, or did not have to."""
    time.sleep(0.05)
    if len(project.told("stage_started")) == begun:
        return project.step() > reached + STEPS_BETWEEN / 2
    first = project.step()
    project.until(lambda: project.step() > first)
    return True
