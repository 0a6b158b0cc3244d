"""One process at a time, and a killed one does not stand in the way; a holder whose lock file is gone notices."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from no_flock import refuse_flock, require_refusal
from postlude import storage
from postlude.storage import exact_json, guards, locks

Start = Callable[..., BaseProcess]


@pytest.fixture
def uri(place: str) -> str:
    return storage.join(place, "run.lock")


@pytest.mark.capability("A second process on the same run is refused")
def test_a_held_lock_is_refused_and_the_holder_named(uri: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postlude.storage.leases.HEARTBEAT_SECONDS", 0.1)
    assert storage.holder(uri) is None
    with storage.lock(uri) as held:
        held.check(now=True)
        by = storage.holder(uri)
        assert by is not None
        assert (by.host, by.pid) == (socket.gethostname(), os.getpid())
        assert by.process() is not None
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


def test_a_lock_file_of_an_earlier_version_is_read_and_its_process_not_killed_for_certain(tmp_path: Path) -> None:
    uri = str(tmp_path / "run.lock")
    with storage.lock(uri):
        old = {"host": socket.gethostname(), "pid": os.getpid(), "since": "2026-01-01T00:00:00+00:00"}
        Path(uri).write_text(json.dumps(old))
        by = storage.holder(uri)
        assert by == storage.Holder(**old)
        assert by.process() is not None
        assert not by.send(signal.SIGKILL, only_if_certain=True)


def test_only_the_process_that_began_when_it_was_written_down_is_sent_a_signal(tmp_path: Path) -> None:
    innocent = subprocess.Popen(["sleep", "600"])
    try:
        with storage.lock(str(tmp_path / "run.lock")) as held:
            by = storage.holder(held.uri)
            assert by is not None
            record = exact_json.load(storage.read_text(held.uri))
            for changed in ({"pid": innocent.pid}, {"pid": innocent.pid, "machine": "another boot"}):
                storage.write_text(str(tmp_path / "other"), exact_json.dump({**record, **changed}))
                other = storage.Holder.read(exact_json.load(storage.read_text(str(tmp_path / "other"))))
                assert not other.send(signal.SIGKILL)
                assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


# --- looked at again ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder with two files beside its lock."""
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(locks, "PUT_BACK_SECONDS", 0.2)
    folder = tmp_path / "runs" / "r"
    storage.write_text(str(folder / "manifest.lock.yaml"), "name: r\n")
    storage.write_text(str(folder / "events.jsonl"), "")
    return folder


def _hold_folder(folder: Path) -> storage.Lock:
    return storage.lock(str(folder / "run.lock"), guarded_folder=str(folder))


def _moved(folder: Path) -> Path:
    return folder.with_name("moved")


def _move(folder: Path) -> None:
    folder.rename(_moved(folder))


def _put_another(folder: Path) -> None:
    _move(folder)
    folder.mkdir()


def _put_a_copy(folder: Path) -> None:
    _move(folder)
    shutil.copytree(_moved(folder), folder)


def _put_a_copy_of_links(folder: Path) -> None:
    _move(folder)
    shutil.copytree(_moved(folder), folder, copy_function=os.link)


def _put_a_file(folder: Path) -> None:
    _move(folder)
    folder.write_text("")


def _let_another_have_had_it(folder: Path) -> None:
    (folder / "run.lock").unlink()
    child = os.fork()
    if not child:
        try:
            guards._guards.clear()  # as another process, which has none
            storage.lock(str(folder / "run.lock")).release()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def _begin_to_remove_all(folder: Path) -> None:
    (folder / "run.lock").unlink()
    (folder / "events.jsonl").unlink()


LOST = (
    (_move, "is not there any more; it was moved to"),
    (shutil.rmtree, "is not there any more"),
    (_put_another, "another folder stands there; it was moved to"),
    (_put_a_copy, "another folder stands there; it was moved to"),
    (_put_a_copy_of_links, "another folder stands there; it was moved to"),
    (_put_a_file, "it was moved to"),
    (_let_another_have_had_it, "was replaced, and another process has had it since"),
    (_begin_to_remove_all, "was removed with other files"),
)

WRITES: tuple[Callable[[str], object], ...] = (
    lambda place: storage.write_text(f"{place}/state.json", "{}"),
    lambda place: storage.open_file(f"{place}/part", "wb"),
    lambda place: storage.open_hashed(f"{place}/part"),
    lambda place: storage.create(f"{place}/part", b""),
    lambda place: storage.begin(f"{place}/step-1"),
    lambda place: storage.commit(f"{place}/step-0", {}),
    lambda place: storage.discard(f"{place}/step-0"),
    lambda place: storage.remove(f"{place}/kept"),
    lambda place: storage.new_folder(f"{place}/model").__enter__(),
    lambda place: storage.link_file(__file__, f"{place}/link"),
    lambda place: storage.copy_file(__file__, f"{place}/copy"),
    lambda place: storage.make_folders(f"{place}/deep/below"),
    lambda place: storage.Journal(f"{place}/metrics.jsonl").append({}),
    lambda place: storage.Journal(f"{place}/metrics.jsonl").flush(),
    lambda place: storage.Journal(f"{place}/metrics.jsonl").cut(lambda line: False),
    lambda place: storage.lock(f"{place}/cache/index.lock"),
)


def _files(*folders: Path) -> dict[str, bytes]:
    found = [path for folder in folders if folder.is_dir() for path in folder.rglob("*")]
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in found}


@pytest.mark.capability("A process that lost its run writes nothing more there, however it lost it")
@pytest.mark.parametrize(("lose", "why"), LOST, ids=lambda value: getattr(value, "__name__", ""))
def test_a_holder_that_lost_its_folder_writes_nothing_more(folder: Path, lose: Callable, why: str) -> None:
    with _hold_folder(folder) as held:
        worker = held.shared()
        worker.check()
        stage = folder / "stages" / "sft"
        storage.Journal(str(stage / "metrics.jsonl")).append({"step": 1})
        storage.write_text(str(stage / "kept"), "kept")
        storage.begin(str(stage / "step-0"))
        held.check(now=True)
        lose(folder)
        before = _files(folder, _moved(folder))
        for write in WRITES:
            with pytest.raises(storage.LockedError, match="no longer this process's"):
                write(str(stage))
        assert _files(folder, _moved(folder)) == before
        with pytest.raises(storage.LockedError, match=why):
            held.check()
        with pytest.raises(storage.LockedError, match="no longer this process's"):
            worker.check()
        assert held.leaving is None


@pytest.mark.parametrize("write", [storage.write_bytes, storage.create], ids=lambda write: write.__name__)
def test_a_folder_that_is_lost_while_the_disk_takes_its_time_is_not_written_to(
    folder: Path, write: Callable[[str, bytes], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def slow(descriptor: int) -> None:
        sync(descriptor)
        if not _moved(folder).exists():
            _put_a_copy(folder)

    with _hold_folder(folder) as held:
        monkeypatch.setattr(os, "fsync", slow)
        with pytest.raises(storage.LockedError, match="another folder stands there"):
            write(f"{folder}/state.json", b"{}")
        assert not (folder / "state.json").exists()
        with pytest.raises(storage.LockedError):
            held.check()


@pytest.mark.parametrize("how", ["removed", "emptied by a copy", "replaced by a copy"])
def test_a_lock_file_that_nobody_else_has_had_is_put_back_to_leave_with_a_checkpoint(folder: Path, how: str) -> None:
    with _hold_folder(folder) as held:
        worker, lock_file, copy = held.shared(), folder / "run.lock", folder / "copy"
        worker.check()
        first = storage.holder(held.uri)
        if how == "removed":
            lock_file.unlink()
        else:
            shutil.copy2(lock_file, copy)
            if how == "emptied by a copy":
                copy.write_text("")
            copy.replace(lock_file)
            with pytest.raises(storage.LockedError):
                worker.check()  # the holder has not put it back
        storage.begin(str(folder / "step-1"))
        storage.commit(str(folder / "step-1"), {})
        assert "was removed or replaced while process" in (held.leaving or "")
        worker.check()
        by = storage.holder(held.uri)
        assert by is not None
        assert by.leaving
        assert (by.pid, by.since, by.started) == (first.pid, first.since, first.started)
        with pytest.raises(storage.LockedError, match="about to leave it with a checkpoint"):
            storage.lock(held.uri)
    assert storage.holder(held.uri) is None
    storage.lock(held.uri).release()


def test_a_worker_of_an_earlier_holder_is_refused(folder: Path) -> None:
    with _hold_folder(folder) as held:
        worker = held.shared()
        worker.check()
    with _hold_folder(folder), pytest.raises(storage.LockedError):
        worker.check()


def _write_when_asked(folder: Path, held: storage.Lock, asked: Connection) -> None:
    storage.set_guard(str(folder), held.shared())
    while True:
        asked.recv()
        try:
            storage.write_text(str(folder / "state.json"), "{}")
        except storage.LockedError as error:
            asked.send(str(error))
        else:
            asked.send("written")


def test_a_forked_child_of_the_holder_works_for_it(folder: Path, start: Start) -> None:
    here, there = multiprocessing.Pipe()

    def child_writes() -> str:
        here.send(None)
        return here.recv()

    with _hold_folder(folder) as held:
        start(_write_when_asked, folder, held, there)
        assert child_writes() == "written"
        (folder / "run.lock").unlink()
        held.check()
        assert held.leaving
        assert child_writes() == "written", "its holder has put the lock file back"
        _move(folder)
        assert "is no longer this process's" in child_writes()


def test_a_folder_is_guarded_under_every_name_by_which_it_is_written_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    Path("link").symlink_to("r")
    with storage.lock("./link/run.lock", guarded_folder="./link"):
        _move(folder)
        for name in ("link/a", "./link//a", f"{folder.parent}/link/a", f"{folder}/a", f"file://{folder}/a"):
            with pytest.raises(storage.LockedError):
                storage.write_text(name, "")
        storage.write_text(f"{folder.parent}/linked", "another place")


def test_a_relative_path_goes_with_the_folder_that_it_is_relative_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    with storage.lock("r/run.lock", guarded_folder="r") as held:
        folder.parent.rename(folder.parent.with_name("renamed"))
        storage.write_text("r/state.json", "{}")
        held.check(now=True)
        with pytest.raises(storage.LockedError, match="in use by process"):
            storage.lock(str(folder.parent.with_name("renamed") / "r" / "run.lock"))


def test_what_goes_wrong_because_the_lock_was_lost_is_told_as_that(folder: Path) -> None:
    def work() -> None:
        with _hold_folder(folder):
            _move(folder)
            storage.read_text(str(folder / "events.jsonl"))

    with pytest.raises(storage.LockedError, match="is not there any more") as raised:
        work()
    assert isinstance(raised.value.__context__, storage.NotFound)


# --- file systems without such locks --------------------------------------------------------------------------


def _without_flock(number: int, uri: str, told: Connection) -> None:
    refuse_flock(number)
    with storage.lock(uri, guarded_folder=str(Path(uri).parent)) as held:
        journal = storage.Journal(str(Path(uri).parent / "events.jsonl"))
        journal.append({"line": 1}, sync=True)
        journal.flush()
        try:
            storage.lock(uri)
        except storage.LockedError as error:
            told.send((held.number, str(error), storage.holder(uri)))
        time.sleep(600)


@pytest.mark.capability("Where the file system has no locks of the kernel a lease serves")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_without_flock_a_lease_serves(tmp_path: Path, start: Start, number: int, monkeypatch) -> None:
    require_refusal()
    monkeypatch.setattr("postlude.storage.leases.HEARTBEAT_SECONDS", 0.2)
    uri = str(tmp_path / "run.lock")
    for taken in (1, 2):
        here, there = multiprocessing.Pipe()
        process = start(_without_flock, number, uri, there)
        assert here.poll(60), "nothing was told"
        fencing_number, refusal, by = here.recv()
        assert fencing_number == taken
        assert f"in use by process {process.pid}" in refusal
        assert by.pid == process.pid
        process.kill()
        process.join()
    assert [line["line"] for line in storage.Journal(str(tmp_path / "events.jsonl")).read()] == [1, 1]
