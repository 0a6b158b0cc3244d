"""One process at a time, and a killed one does not stand in the way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from postlude import storage
from postlude.storage import exact_json, locks

Start = Callable[..., BaseProcess]


@pytest.fixture
def uri(place: str) -> str:
    return storage.join(place, "run.lock")


@pytest.mark.capability("A second process on the same run is refused")
def test_a_held_lock_is_refused_and_the_holder_named(uri: str, place: str) -> None:
    assert storage.holder(uri) is None
    with storage.lock(uri) as held:
        held.check()
        by = storage.holder(uri)
        assert by is not None
        assert (by.host, by.pid) == (socket.gethostname(), os.getpid())
        with pytest.raises(storage.LockedError) as refused:
            storage.lock(uri)
        for part in (place, f"process {os.getpid()}", socket.gethostname(), by.since):
            assert part in str(refused.value)
    assert storage.holder(uri) is None
    storage.lock(uri).release()


def test_releasing_twice_does_not_let_go_of_a_later_lock(uri: str) -> None:
    first = storage.lock(uri)
    first.release()
    second = storage.lock(uri)
    first.release()
    assert storage.holder(uri) is not None
    second.release()


def _hold(uri: str, told: Connection, with_child: bool) -> None:
    with storage.lock(uri):
        child = os.fork() if with_child else -1
        if child:
            told.send(child)
        time.sleep(600)


@pytest.mark.parametrize("with_child", [False, True], ids=["alone", "leaving a forked child"])
def test_the_kernel_releases_the_lock_of_a_killed_process(tmp_path: Path, start: Start, with_child: bool) -> None:
    uri = str(tmp_path / "run.lock")
    here, there = multiprocessing.Pipe()
    other = start(_hold, uri, there, with_child)
    child = here.recv()
    with pytest.raises(storage.LockedError, match=f"process {other.pid} on"):
        storage.lock(uri)
    other.kill()
    other.join()
    try:
        storage.lock(uri).release()
    finally:
        if with_child:
            os.kill(child, signal.SIGKILL)


def test_asking_who_holds_it_does_not_refuse_a_process_that_takes_it(tmp_path: Path, start: Start) -> None:
    uri = str(tmp_path / "run.lock")
    storage.lock(uri).release()
    for _ in range(2):
        start(_ask_for_ever, uri)
    for _ in range(300):
        storage.lock(uri).release()


def _ask_for_ever(uri: str) -> None:
    while True:
        storage.holder(uri)


# --- leases ---------------------------------------------------------------------------------------------------


@pytest.fixture
def lease() -> str:
    return f"memory://{os.urandom(4).hex()}/run.lock"


def _leave_lease(uri: str, host: str, pid: int, renewed: float) -> None:
    left = {"host": host, "pid": pid, "since": "before", "token": "left", "renewed": renewed}
    storage.write_text(uri, exact_json.dump(left))


def test_a_fresh_lease_of_another_host_holds(lease: str) -> None:
    _leave_lease(lease, "elsewhere", 1, time.time())
    with pytest.raises(storage.LockedError, match="process 1 on elsewhere, since before"):
        storage.lock(lease)


def test_a_lease_that_was_not_renewed_is_taken_over(lease: str) -> None:
    _leave_lease(lease, "elsewhere", 1, time.time() - locks.LEASE_SECONDS - 1)
    assert storage.holder(lease) is None
    with storage.lock(lease):
        assert storage.holder(lease) is not None


def test_a_lease_of_a_dead_process_of_this_host_is_taken_over(lease: str, start: Start) -> None:
    dead = start(int)
    dead.join()
    for pid in (dead.pid, os.getpid()):  # the second: an earlier process that had our number
        assert pid is not None
        _leave_lease(lease, socket.gethostname(), pid, time.time())
        storage.lock(lease).release()


def test_a_lease_is_renewed_and_its_loss_is_noticed(lease: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    held = storage.lock(lease)
    first = exact_json.load(storage.read_text(lease))["renewed"]
    while exact_json.load(storage.read_text(lease))["renewed"] == first:
        time.sleep(0.01)
    held.check()
    while not _is_refused(held):
        _leave_lease(lease, "elsewhere", 1, time.time())
        time.sleep(0.02)
    held.release()
    assert storage.holder(lease) == locks.Holder("elsewhere", 1, "before"), "the other's lease was removed"


def _is_refused(held: storage.Lock) -> bool:
    try:
        held.check()
    except storage.LockedError:
        return True
    return False
