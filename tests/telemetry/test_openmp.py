"""OpenMP's threads wait as the user says; where nobody has said how they sleep while others want the cores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import psutil
import pytest
import torch

from postlude.telemetry import openmp


@pytest.fixture
def watch():
    libraries = openmp.loaded_libraries()
    if not libraries:
        pytest.skip("torch computes with another OpenMP here")
    watch = openmp.Watch(libraries[0], threads=1)
    yield watch
    see(watch, 0.0)


def see(watch, share):
    for _ in range(openmp.LOOKS):
        watch.judge(share)


def test_programs_that_are_not_ours_wait_as_the_user_says_else_shortly():
    assert openmp.briefly({"A": "b"}) == {**openmp.SHORT_WAIT, "A": "b"}
    assert openmp.briefly({"GOMP_SPINCOUNT": "5"})["GOMP_SPINCOUNT"] == "5"
    assert openmp.briefly({"OMP_WAIT_POLICY": "ACTIVE"}) == {"OMP_WAIT_POLICY": "ACTIVE"}


@pytest.mark.parametrize("said", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_nothing_is_watched_where_the_user_has_said_how_threads_wait(monkeypatch, said):
    monkeypatch.setattr(openmp, "_watches", [])
    monkeypatch.setenv(said, "5")
    openmp.compute_with(2)
    assert openmp._watches == []
    torch.set_num_threads(1)


def test_a_team_stands_idle_for_as_long_as_others_want_the_cores(watch):
    before = psutil.Process().num_threads()
    see(watch, 0.4)
    assert watch.gives_way
    assert until(lambda: psutil.Process().num_threads() == before + 1 + len(os.sched_getaffinity(0)))
    see(watch, 0.1)  # neither
    assert watch.gives_way
    see(watch, 0.0)
    assert not watch.gives_way
    assert until(lambda: psutil.Process().num_threads() <= before)


def test_what_a_process_takes_from_itself_now_and_then_is_not_taken_for_others(watch):
    for share in [0.03, 0.4, 0.02, 0.05, 0.3, 0.01, 0.02] * openmp.LOOKS:
        watch.judge(share)
        assert not watch.gives_way
    see(watch, 0.4)
    for share in [0.3, 0.02, 0.4, 0.05, 0.3] * openmp.LOOKS:
        watch.judge(share)
        assert watch.gives_way


def test_how_threads_wait_changes_no_bit(watch):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        numbers = torch.randn(300, 300, generator=torch.Generator().manual_seed(1))
        alone = (numbers @ numbers).softmax(0).sum(1)
        see(watch, 0.5)
        assert until(lambda: any(thread.name == "idle team" for thread in threading.enumerate()))
        assert torch.equal((numbers @ numbers).softmax(0).sum(1), alone)
    finally:
        torch.set_num_threads(threads)


def test_a_thread_waits_for_a_core_where_there_are_too_few():
    me, loop = threading.get_native_id(), [sys.executable, "-c", "while True: pass"]
    before = openmp.waited()[me]
    others = [subprocess.Popen(loop) for _ in range(2 * len(os.sched_getaffinity(0)))]
    try:
        assert any(openmp.waited()[me] > before + 10**8 for _ in range(10**6))
    finally:
        for other in others:
            other.kill()
            other.wait()


def until(condition) -> bool:
    """Whether it holds within some seconds."""
    return any(condition() or threading.Event().wait(0.02) for _ in range(1000))
