"""Stopping a run: nobody is sent a signal but the process that holds it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from postlude.errors import ComputeError
from postlude.runs import Run
from postlude.storage import exact_json
from postlude.workflow.detached import stop


@pytest.fixture
def asleep() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing of what the run is about."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Run, Path, dict[str, Any]]]:
    """A run that this process holds, its lock file, and what that says."""
    run = Run(str(tmp_path / "r"))
    with run.hold() as lock:
        path = Path(lock.uri)
        yield run, path, exact_json.load(path.read_bytes())


@pytest.mark.parametrize("now", [False, True], ids=["with a checkpoint", "now"])
@pytest.mark.parametrize(
    "changes",
    [{"started": 1}, {"machine": "another boot or container"}],
    ids=["a later process with its number", "a process of another machine of this name"],
)
@pytest.mark.capability("`stop` ends only the process that holds the run, told by its start")
def test_a_process_that_only_has_the_number_is_left_alone(held, asleep, now: bool, changes: dict[str, object]) -> None:
    run, lock_file, record = held
    lock_file.write_text(exact_json.dump({**record, "pid": asleep.pid, **changes}))
    with pytest.raises(ComputeError, match="was left alone"):
        stop(run.uri, now, seconds=1.0)
    assert asleep.poll() is None


def test_of_an_earlier_version_it_is_not_killed_but_asked(held, asleep) -> None:
    run, lock_file, record = held
    lock_file.write_text(exact_json.dump({"host": record["host"], "pid": asleep.pid, "since": record["since"]}))
    with pytest.raises(ComputeError, match="was left alone"):
        stop(run.uri, now=True, seconds=1.0)
    assert asleep.poll() is None
    with pytest.raises(ComputeError, match="has not stopped within"):
        stop(run.uri, now=False, seconds=0.0)  # it has, but this process holds the run
    assert asleep.wait(10) == -signal.SIGTERM


def test_now_kills_the_process_that_holds_it(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "r"))
    here, there = os.pipe()
    child = os.fork()
    if not child:
        try:
            run.hold()
            os.write(there, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.read(here, 1)
    assert stop(run.uri, now=True, seconds=10.0).startswith("Killed process")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert run.holder() is None
