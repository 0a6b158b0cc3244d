"""The process that controls the workers is kept alive: what ends it is told, and another goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

PROGRAM = """
import os, psutil, signal, subprocess, sys, threading, time
from pathlib import Path
from postlude import processes
from postlude.cluster import keeper
from postlude.cluster.budget import Budget
from postlude.errors import DataError
from postlude.storage import LockedError
from postlude.manifest.compute import Supervision
from postlude.training.interruption import Interruption

place = Path(sys.argv[1])
processes.LEAVE_SECONDS = 1.0
keeper.Standstill.__init__.__defaults__ = ({limit},)

def reached():
    return place.joinpath("reached").exists()

def must_stop():
    if place.joinpath("lost").exists():
        raise LockedError("it is another's")
    return place.joinpath("stop").exists()

def tell(kind, **fields):
    print(kind, fields.get("what", ""), fields.get("reason", ""), flush=True)

def work(lost):
    print("child", os.getpid(), lost, flush=True)
    {work}

try:
    print("result", keeper.keep(work, Budget(Supervision(failures=2), reached), tell, must_stop), flush=True)
except keeper.Stopped:
    print("stopped")
except BaseException as error:
    print(type(error).__name__, error, *getattr(error, "__notes__", ()))
print("left", psutil.Process().children(recursive=True), signal.getsignal(signal.SIGTERM))
"""


class Kept:
    """A program that keeps some work alive, and what it says."""

    def __init__(self, place: Path, work: str, before: str = "", limit_seconds: float = 5.0) -> None:
        program = PROGRAM.replace("{work}", work.replace("\n", "\n    ")).replace("{limit}", str(limit_seconds))
        self.process = subprocess.Popen(
            [*before.split(), sys.executable, "-c", program, str(place)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # whatever runs the tests
        )
        self.lines: list[str] = []

    def until(self, start: str) -> str:
        """The next line that begins so."""
        while not self.lines or not self.lines[-1].startswith(start):
            line = self.process.stdout.readline()
            assert line, self.lines
            self.lines.append(line.rstrip())
        return self.lines.pop()

    def end(self) -> list[str]:
        """What it says to its end."""
        out, _ = self.process.communicate(timeout=60)
        return [*self.lines, *out.splitlines()]


@pytest.fixture
def kept(tmp_path: Path):
    made: list[Kept] = []

    def keep(work: str, **options: Any) -> Kept:
        made.append(Kept(tmp_path, work, **options))
        return made[-1]

    yield keep
    for each in made:
        each.process.kill()
        if not each.process.stdout.closed:
            each.process.communicate()


Keep = Callable[..., Kept]


def test_what_the_work_returns_or_raises_is_handed_on(kept: Keep) -> None:
    assert kept("return {'a': 1}").end()[1:] == ["result {'a': 1}", "left [] 0"]
    assert kept("raise DataError('row 7')").end()[1:] == ["DataError row 7", "left [] 0"]
    said = "\n".join(kept("{}['key']").end())
    assert "KeyError 'key'" in said
    assert "in work" in said, "its own traceback comes along"
    said = "\n".join(kept("class Odd(Exception): pass\nraise Odd('never seen elsewhere')").end())
    assert "never seen elsewhere" in said


@pytest.mark.capability("A controller that dies is started anew, within its budget")
def test_a_child_that_dies_is_followed_by_another_within_the_budget(kept: Keep) -> None:
    program = kept("if lost < 2: os.kill(os.getpid(), signal.SIGKILL)\nreturn lost")
    said = program.end()
    told = [line.strip() for line in said if line.startswith(("result", "recovery"))]
    assert told == ["recovery", "recovery", "result 2"]
    assert sum("was killed by SIGKILL" in line for line in said) == 2
    said = kept("os.kill(os.getpid(), signal.SIGKILL)").end()
    assert any("compute.supervision.failures allows 2" in line for line in said)


def test_the_budget_begins_anew_with_what_is_committed(kept: Keep, tmp_path: Path) -> None:
    work = "if lost == 2: place.joinpath('reached').touch()\nif lost < 4: os._exit(3)\nreturn lost"
    said = kept(work).end()
    assert "result 4" in said
    assert sum("ended with 3" in line for line in said) == 4


def test_one_that_gives_up_is_followed_by_another_with_its_reason(kept: Keep) -> None:
    work = (
        "if lost: return 'whole'\n"
        "threading.Thread(target=keeper.give_up, args=('the raylet is gone',)).start()\n"
        "threading.Event().wait()"
    )
    said = kept(work).end()
    assert "worker_failure cluster the raylet is gone" in said
    assert "result whole" in said


def test_what_a_child_has_left_is_ended_before_the_next(kept: Keep) -> None:
    work = (
        "if lost: return place.joinpath('pid').read_text()\n"
        "started = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "place.joinpath('pid').write_text(str(started.pid))\n"
        "os._exit(1)"
    )
    said = kept(work).end()
    (result,) = [line for line in said if line.startswith("result")]
    assert not psutil.pid_exists(int(result.split()[1]))
    assert said[-1].startswith("left []")


LISTENS = """with Interruption().listening() as stop:
    print('ready', flush=True)
    while not stop.requested: time.sleep(0.01)
return 'checkpoint'"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_request_to_stop_is_handed_on(kept: Keep, number: signal.Signals) -> None:
    program = kept(LISTENS)
    program.until("ready")
    program.process.send_signal(number)
    assert "result checkpoint" in program.end()


def test_a_child_is_asked_to_stop_when_its_keeper_must(kept: Keep, tmp_path: Path) -> None:
    program = kept(LISTENS)
    program.until("ready")
    (tmp_path / "stop").touch()
    assert "result checkpoint" in program.end()


def test_a_child_whose_keeper_may_not_go_on_is_ended_at_once(kept: Keep, tmp_path: Path) -> None:
    program = kept("with Interruption().listening():\n    print('ready', flush=True)\n    threading.Event().wait()")
    program.until("ready")
    (tmp_path / "lost").touch()
    assert program.end()[1:] == ["LockedError it is another's", "left [] 0"]


def test_a_second_interrupt_stops_at_once(kept: Keep) -> None:
    program = kept("with Interruption().listening():\n    print('ready', flush=True)\n    threading.Event().wait()")
    program.until("ready")
    for _ in range(2):
        program.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert any(line.startswith("KeyboardInterrupt") for line in program.end())


def test_one_that_was_asked_to_stop_and_dies_is_not_followed(kept: Keep) -> None:
    program = kept("with Interruption().listening():\n    print('ready', flush=True)\n    threading.Event().wait()")
    child = int(program.until("child").split()[1])
    program.until("ready")
    program.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    os.kill(child, signal.SIGKILL)
    assert "stopped" in program.end()


def test_a_hang_up_is_ignored_where_it_was(kept: Keep) -> None:
    program = kept(LISTENS, before="nohup")
    program.until("ready")
    program.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert program.process.poll() is None
    program.process.send_signal(signal.SIGTERM)
    assert "result checkpoint" in program.end()


def test_the_child_dies_with_its_keeper(kept: Keep) -> None:
    program = kept("threading.Event().wait()")
    child = int(program.until("child").split()[1])
    program.process.kill()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.capability("A controller that was stopped itself says so, and spends no budget on it")
def test_a_keeper_that_stood_still_says_so(kept: Keep) -> None:
    program = kept("time.sleep(5)\nreturn 'whole'", limit_seconds=2.0)
    program.until("child")
    program.process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    program.process.send_signal(signal.SIGCONT)
    said = program.end()
    assert any("stood_still" in line and "it was stopped" in line for line in said)
    assert "result whole" in said
