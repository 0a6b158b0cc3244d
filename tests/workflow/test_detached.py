"""Stopping a run: nobody is sent a signal but the process that holds it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from postlude.errors import ComputeError
from postlude.runs import Run
from postlude.storage import exact_json
from postlude.workflow.detached import stop


@pytest.mark.parametrize("now", [False, True], ids=["with a checkpoint", "now"])
@pytest.mark.parametrize(
    "changes",
    [{"started": 1}, {"machine": "another boot or container"}],
    ids=["a later process with its number", "a process of another machine of this name"],
)
@pytest.mark.capability("`stop` ends only the process that holds the run, told by its start")
def test_a_process_that_only_has_the_number_is_left_alone(
    tmp_path: Path, now: bool, changes: dict[str, object]
) -> None:
    run = Run(str(tmp_path / "r"))
    innocent = subprocess.Popen(["sleep", "600"])
    try:
        with run.hold() as held:
            lock_file = Path(held.uri)
            record = exact_json.load(lock_file.read_bytes())
            lock_file.write_text(exact_json.dump({**record, "pid": innocent.pid, **changes}))
            with pytest.raises(ComputeError, match="was left alone"):
                stop(run.uri, now, seconds=1.0)
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_of_an_earlier_version_it_is_not_killed_but_asked(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "r"))
    earlier = subprocess.Popen(["sleep", "600"])
    try:
        with run.hold() as held:
            lock_file = Path(held.uri)
            record = exact_json.load(lock_file.read_bytes())
            old = {"host": record["host"], "pid": earlier.pid, "since": record["since"]}
            lock_file.write_text(exact_json.dump(old))
            with pytest.raises(ComputeError, match="was left alone"):
                stop(run.uri, now=True, seconds=1.0)
            assert earlier.poll() is None
            with pytest.raises(ComputeError, match="has not stopped within"):
                stop(run.uri, now=False, seconds=0.0)  # it has, but this process holds the run
        assert earlier.wait(10) == -signal.SIGTERM
    finally:
        earlier.kill()
        earlier.wait()


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
