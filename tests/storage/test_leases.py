"""Leases: taken over only from who gives no sign of life, by the clock of the one that looks; one holder at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from no_flock import refuse_flock, require_refusal
from postlude import storage
from postlude.storage import exact_json, leases

Start = Callable[..., BaseProcess]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"LEASE": 1.0, "BELIEVED": 0.7, "HEARTBEAT": 0.1, "LOOK": 0.02, "WATCH": 0.02}.items():
        monkeypatch.setattr(leases, f"{name}_SECONDS", seconds)


@pytest.fixture
def uri() -> str:
    return f"memory://{os.urandom(4).hex()}/run.lock"


def leave(uri: str, number: int = 3, **changes: Any) -> str:
    """A lease of a process that is not at work; where it stands."""
    place = f"{uri}.{number:08d}"
    record = {
        "host": "elsewhere",
        "pid": 1,
        "since": "before",
        "started": 1,
        "machine": "a",
        "token": "left",
        "beat": 0,
    }
    storage.write_text(place, exact_json.dump({**record, **changes}))
    return place


def number_of(uri: str) -> int:
    return json.loads(storage.read_text(storage.join(uri, "COMMITTED"))).get("number", 0)


# --- taking ---------------------------------------------------------------------------------------------------


@pytest.mark.capability("A remote lease is judged by its reader's clock alone, and fenced by a number")
@pytest.mark.parametrize("since", ["1970-01-01T00:00:00+00:00", "2970-01-01T00:00:00+00:00"])
def test_a_lease_that_changes_is_held_whatever_its_host_says_of_the_time(
    uri: str, since: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = leave(uri, since=since)
    beats = iter(range(1, 10**6))
    watched = leases.files.list_directory

    def beat(folder: str) -> list[str]:  # the holder renews it between any two looks of ours
        record = exact_json.load(storage.read_text(place))
        storage.write_text(place, exact_json.dump({**record, "beat": next(beats)}))
        return watched(folder)

    monkeypatch.setattr(leases.files, "list_directory", beat)
    with pytest.raises(storage.LockedError, match=re.escape(f"elsewhere, since {since}")):
        storage.lock(uri)
    assert storage.exists(place), "the other's lease was removed"


def test_a_lease_that_does_not_change_is_taken_over_and_its_number_grows(uri: str) -> None:
    place = leave(uri, number=41)
    begin = time.monotonic()
    with storage.lock(uri) as held:
        assert time.monotonic() - begin > leases.LEASE_SECONDS
        assert held.number == 42
        assert not storage.exists(place)
        by = storage.holder(uri)
        assert by is not None
        assert by.pid == os.getpid()
    assert storage.holder(uri) is None
    with storage.lock(uri) as again:
        assert again.number == 43


def test_a_lease_of_an_earlier_version_is_watched_and_then_replaced(uri: str) -> None:
    old = {"host": "elsewhere", "pid": 1, "since": "before", "token": "left", "renewed": time.time() + 1e6}
    storage.write_text(uri, exact_json.dump(old))
    assert storage.holder(uri) == storage.Holder("elsewhere", 1, "before")
    with storage.lock(uri) as held:
        assert held.number == 1
        assert not storage.exists(uri)


def test_a_lease_of_a_dead_process_of_this_host_is_taken_over_at_once(
    uri: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 1e9)
    dead = start(int)
    dead.join()
    own = asdict(storage.Holder.this_process())
    for gone in ({**own, "pid": dead.pid}, {**own, "started": own["started"] - 1}):  # or an earlier one of our number
        leave(uri, **gone)
        storage.lock(uri).release()
        storage.remove(storage.parent(uri))


@pytest.mark.parametrize("machine", ["another boot or container", None], ids=["other machine", "earlier version"])
def test_a_process_of_another_machine_of_this_name_is_not_taken_for_dead(uri: str, machine: str | None) -> None:
    leave(uri, host=socket.gethostname(), pid=2**22 + 1, machine=machine)
    assert storage.holder(uri) is not None
    begin = time.monotonic()
    storage.lock(uri).release()
    assert time.monotonic() - begin > leases.LEASE_SECONDS


def test_who_holds_it_is_nobody_once_it_was_seen_unchanged_for_too_long(uri: str) -> None:
    leave(uri)
    assert storage.holder(uri) is not None
    time.sleep(leases.LEASE_SECONDS + 0.05)
    assert storage.holder(uri) is None
    leave(uri, beat=1)
    assert storage.holder(uri) is not None


def test_a_lease_that_is_just_being_written_is_not_free(uri: str) -> None:
    storage.write_text(f"{uri}.00000001", '{"host": "else')
    assert storage.holder(uri) is not None
    with storage.lock(uri) as held:
        assert held.number == 2


def _take_in_turn(uri: str, number: int, told: Connection) -> None:
    refuse_flock()
    taken: list[int | None] = []
    for _ in range(number):
        try:
            with storage.lock(uri) as held:
                taken.append(held.number)
        except storage.LockedError:
            continue
    told.send(taken)


def test_of_several_that_want_it_at_once_one_has_each_number(tmp_path: Path, start: Start) -> None:
    require_refusal()
    pipes = [multiprocessing.Pipe() for _ in range(4)]
    for _, there in pipes:
        start(_take_in_turn, str(tmp_path / "run.lock"), 6, there)
    numbers = [number for here, _ in pipes for number in here.recv()]
    assert len(numbers) == len(set(numbers)) > 0


# --- losing ---------------------------------------------------------------------------------------------------


def _commit_when_told(uri: str, told: Connection) -> None:
    refuse_flock()
    folder = str(Path(uri).parent)
    with storage.lock(uri, guarded_folder=folder) as held:
        storage.begin(f"{folder}/step-1")
        told.send(held.number)
        told.recv()
        try:
            storage.commit(f"{folder}/step-1", {}, {"by": "the first"})
        except storage.LockedError as error:
            told.send(str(error))


def test_a_holder_that_was_held_up_commits_nothing_beside_its_successor(tmp_path: Path, start: Start) -> None:
    require_refusal()
    uri, (here, there) = str(tmp_path / "run.lock"), multiprocessing.Pipe()
    first = start(_commit_when_told, uri, there)
    assert here.recv() == 1
    os.kill(first.pid or 0, signal.SIGSTOP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("postlude.storage.locks.fcntl.flock", _refuse)
        with storage.lock(uri, guarded_folder=str(tmp_path)) as held:
            assert held.number == 2
            storage.begin(str(tmp_path / "step-1"))
            storage.commit(str(tmp_path / "step-1"), {}, {"by": "the second"})
            here.send("go on")
            os.kill(first.pid or 0, signal.SIGCONT)
            assert "no longer this process's" in here.recv()
            held.check(now=True)
    marker = storage.read_marker(str(tmp_path / "step-1"))
    assert (marker.number, marker.extra) == (2, {"by": "the second"})


def _refuse(descriptor: int, operation: int) -> None:
    raise OSError(37, "No locks available")


def _take_from(uri: str) -> None:
    """What another process does to a lease."""
    number = max(leases._numbers(uri))
    leave(uri, number + 1)


@pytest.mark.parametrize(
    ("lose", "why"),
    [
        (_take_from, "process 1 on elsewhere, since before has had it since"),
        (lambda uri: storage.remove(f"{uri}.00000001"), "its lease was removed"),
    ],
    ids=["taken", "removed"],
)
def test_a_lost_lease_is_noticed_before_anything_is_committed(uri: str, lose: Callable[[str], None], why: str) -> None:
    run = storage.parent(uri)
    with storage.lock(uri, guarded_folder=run) as held:
        worker = held.shared()
        storage.begin(f"{run}/step-1")
        lines = storage.Journal(f"{run}/metrics.jsonl")
        lines.append({"step": 1}, sync=True)
        lose(uri)
        for write in (
            lambda: storage.commit(f"{run}/step-1", {}),
            lambda: storage.discard(f"{run}/step-1"),
            lambda: lines.append({"step": 2}, sync=True),
            lambda: lines.cut(lambda line: False),
            lambda: worker.check(now=True),
        ):
            with pytest.raises(storage.LockedError, match=why):
                write()
    assert [line["step"] for line in storage.Journal(f"{run}/metrics.jsonl").read()] == [1]
    assert not storage.is_committed(f"{run}/step-1")


def test_a_lease_that_cannot_be_renewed_in_time_is_given_up(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = storage.lock(uri)

    def unreachable(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(leases.files, "write_bytes", unreachable)
    time.sleep(leases.BELIEVED_SECONDS + 0.1)
    with pytest.raises(storage.LockedError, match="could not be renewed"):
        held.check()
    held.release()


def test_a_lease_is_renewed(uri: str) -> None:
    with storage.lock(uri) as held:
        time.sleep(2 * leases.LEASE_SECONDS)
        held.check()
        with pytest.raises(storage.LockedError, match="in use by process"):
            storage.lock(uri)


# --- numbers in markers ---------------------------------------------------------------------------------------


def test_markers_repeat_the_number_where_a_lease_is_the_lock(uri: str, tmp_path: Path) -> None:
    run = storage.parent(uri)
    leave(uri, 6, released="left")
    with storage.lock(uri, guarded_folder=run):
        storage.begin(f"{run}/step-1")
        storage.commit(f"{run}/step-1", {})
    assert number_of(f"{run}/step-1") == 7
    with storage.lock(str(tmp_path / "run.lock"), guarded_folder=str(tmp_path)):
        storage.commit(str(tmp_path), {})
    assert number_of(str(tmp_path)) == 0


def test_what_a_process_commits_that_lost_the_lease_does_not_count(uri: str) -> None:
    run = storage.parent(uri)
    with storage.lock(uri, guarded_folder=run):
        for step in (1, 2):
            storage.begin(f"{run}/step-{step}")
            storage.commit(f"{run}/step-{step}", {})
    with storage.lock(uri, guarded_folder=run):
        assert storage.is_committed(f"{run}/step-1"), "it stood there when the lease was taken"
        late = storage.read_bytes(f"{run}/step-1/COMMITTED")
        storage.discard(f"{run}/step-2")
        storage.write_bytes(f"{run}/step-3/COMMITTED", late)  # arrives when its writer has long lost the lease
        assert not storage.is_committed(f"{run}/step-3")
        with pytest.raises(storage.NotFound, match="a process that had lost the run"):
            storage.read_marker(f"{run}/step-3")
        storage.commit(f"{run}/step-3", {}, {"by": "the second"})
        assert storage.read_marker(f"{run}/step-3").extra == {"by": "the second"}
        storage.write_bytes(f"{run}/step-4/COMMITTED", _marker(9))  # of a later holder that we do not know of yet
        with pytest.raises(storage.LockedError, match="later"):
            storage.commit(f"{run}/step-4", {})
        assert number_of(f"{run}/step-4") == 9


def _marker(number: int) -> bytes:
    from postlude.storage import commits

    body = {"files": {}, "extra": {}, "number": number}
    return exact_json.dump({**body, "sha256": commits.checksum(body)}).encode()


# --- stores ---------------------------------------------------------------------------------------------------


class _Looks(MemoryFileSystem):
    """Makes an object where it has seen none before, as what fsspec brings along does."""

    protocol = "looks"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    pipe_file = fsspec.AbstractFileSystem.pipe_file


class _Ignores(_Looks):
    """Makes an object whatever it is asked."""

    protocol = "ignores"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        with self.open(path, "wb") as file:
            file.write(value)


@pytest.fixture
def stores() -> None:
    for store in (_Looks, _Ignores):
        fsspec.register_implementation(store.protocol, store, clobber=True)


@pytest.mark.parametrize("protocol", ["looks", "ignores"])
def test_a_store_that_cannot_tell_two_takers_apart_is_refused(stores: None, protocol: str) -> None:
    with pytest.raises(storage.StorageError, match="cannot make an object only where there is none"):
        storage.lock(f"{protocol}://runs/r/run.lock")
    assert storage.list_directory(f"{protocol}://runs/r") == []
