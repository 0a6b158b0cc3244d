"""Processes that are called as Ray's own are missed when they die or stop."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from postlude.cluster.ray_processes import TICK_SECONDS, watched

Start = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that is called so, which the watch has then seen."""
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["bash", "-c", f"exec -a /somewhere/{name} sleep 60"]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


class Lost:
    """What was told of the loss."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self._told = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self._told.set()

    def wait(self) -> str:
        assert self._told.wait(30)
        (reason,) = self.reasons
        return reason


def test_one_that_dies_is_named_with_those_that_it_takes_along(start: Start) -> None:
    gcs, monitor, lost = start("gcs_server"), start("ray/_private/log_monitor.py"), Lost()
    start("raylet/raylet")
    with watched(10.0, lost):
        time.sleep(4 * TICK_SECONDS)
        assert lost.reasons == []
        gcs.kill()
        assert f"GCS (process {gcs.pid})" in lost.wait()
    lost = Lost()
    with watched(10.0, lost):
        time.sleep(4 * TICK_SECONDS)
        monitor.kill()
        assert lost.wait() == f"Ray's log monitor (process {monitor.pid}) is gone"


def test_one_that_ended_before_it_was_looked_at_is_missed(tmp_path: Path) -> None:
    (tmp_path / "gcs_server").symlink_to(shutil.which("sleep"))
    with subprocess.Popen([tmp_path / "gcs_server", "60"]) as gcs:
        gcs.kill()
        os.waitid(os.P_PID, gcs.pid, os.WEXITED | os.WNOWAIT)
        with watched(10.0, lost := Lost()):
            assert lost.wait() == f"Ray's GCS (process {gcs.pid}) is gone"


def test_one_that_is_stopped_is_waited_for_a_while(start: Start) -> None:
    gcs, lost = start("gcs_server"), Lost()
    with watched(1.0, lost):
        time.sleep(4 * TICK_SECONDS)
        gcs.send_signal(signal.SIGSTOP)
        time.sleep(2 * TICK_SECONDS)
        gcs.send_signal(signal.SIGCONT)
        time.sleep(4 * TICK_SECONDS)
        assert lost.reasons == []
        gcs.send_signal(signal.SIGSTOP)
        assert lost.wait() == f"Ray's GCS (process {gcs.pid}) has been stopped for 1 seconds"


def test_an_error_that_comes_of_a_death_is_laid_to_it(start: Start) -> None:
    gcs, lost = start("gcs_server"), Lost()
    with pytest.raises(ConnectionError), watched(10.0, lost):  # noqa: PT012
        time.sleep(4 * TICK_SECONDS)
        gcs.kill()
        gcs.wait()
        raise ConnectionError
    assert "GCS" in lost.wait()
    with pytest.raises(ConnectionError), watched(10.0, lost := Lost()):
        raise ConnectionError
    assert lost.reasons == []
