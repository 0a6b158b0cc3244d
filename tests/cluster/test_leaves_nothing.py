"""However a run on worker groups ends, no process, port or temporary file of it stays."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.long

MARK = "POSTLUDE_TEST_MARK"


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder for temporary files that is this test's alone, with a short path, as sockets need."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # a cache is meant to stay
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield Path(folder)


def marked(mark: str) -> list[psutil.Process]:
    """The processes that have the mark in their environment, this run's and whatever it started."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def nothing_is_left(mark: str, place: Path) -> None:
    deadline = time.monotonic() + 60
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [one.name() for one in left] == []
    assert list(place.iterdir()) == []


@pytest.mark.capability("No process, port or temporary file stays, however a run ends")
@pytest.mark.parametrize("how", ["success", "failure", "interrupt", "second interrupt"])
def test_nothing_is_left_however_a_run_ends(project, place, how):
    if how == "failure":
        project.manifest["data"]["chats"]["source"]["path"] = str(place.parent / "not-there.jsonl")
    project.stage["steps"] = 60 if how == "success" else 4000
    project.start(TMPDIR=str(place), **{MARK: how})
    if how.endswith("interrupt"):
        project.until(lambda: project.step() > 5)
        assert len(marked(how)) > 3  # they are found while they run
        for _ in range(2 if how.startswith("second") else 1):
            os.kill(project.process.pid, signal.SIGINT)
            time.sleep(0.05)
    said = project.ended(*{"success": (0,), "failure": (3,), "interrupt": (130,)}.get(how, (1, 130, -signal.SIGINT)))
    nothing_is_left(how, place)
    if how == "interrupt":
        saved = project.run.stage("sft").checkpoints()[0].step
        assert saved == project.step(), said


@pytest.mark.capability("A killed controller leaves nothing, and its run can be gone on with at once")
def test_a_killed_controller_leaves_nothing_and_its_run_goes_on_at_once(project, calm, place):
    project.start(TMPDIR=str(place), **{MARK: "killed"})
    project.until(lambda: project.step() > 25)
    os.kill(project.process.pid, signal.SIGKILL)
    project.process.communicate()
    project.start(TMPDIR=str(place), **{MARK: "killed"})
    project.ended()
    assert project.told("stage_started")[-1]["from_step"] > 0
    assert project.lines() == calm
    nothing_is_left("killed", place)  # what the killed one left on the disk, the next one has swept
