"""Files behind URIs: the same behaviour for a local path and a remote one, and errors that a user understands."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from postlude import storage
from postlude.storage import files

Start = Callable[..., BaseProcess]


def test_what_is_written_is_read(place: str) -> None:
    uri = storage.join(place, "a", "b.txt")
    assert not storage.exists(uri)
    storage.write_text(uri, "first")
    storage.write_text(uri, "línea\r\nand\u2028more")
    assert storage.read_text(uri) == "línea\r\nand\u2028more"
    assert storage.size_bytes(uri) == len("línea\r\nand\u2028more".encode())
    with storage.open_file(uri, "w") as file:
        file.write("one\ntwo\r\n")
    with storage.open_file(uri, "r") as file:
        assert list(file) == ["one\n", "two\r\n"]


def test_folders_are_listed_and_removed(place: str) -> None:
    for name in ("b", "a", "c/d"):
        storage.write_text(storage.join(place, name), name)
    assert storage.list_directory(place) == ["a", "b", "c"]
    assert storage.is_directory(storage.join(place, "c"))
    assert not storage.is_directory(storage.join(place, "a"))
    storage.remove(storage.join(place, "a"))
    storage.remove(storage.join(place, "never"))
    assert storage.list_directory(place) == ["b", "c"]
    storage.remove(place)
    assert not storage.exists(storage.join(place, "c/d"))
    assert storage.list_directory(place) == []


def test_patterns_expand_to_sorted_uris_that_can_be_read(place: str) -> None:
    for name in ("x/2.jsonl", "x/1.jsonl", "x/y/3.jsonl", "x/1.txt"):
        storage.write_text(storage.join(place, name), name)

    def expanded(pattern: str) -> list[str]:
        return [storage.read_text(uri) for uri in storage.expand(storage.join(place, pattern))]

    assert expanded("x/*.jsonl") == ["x/1.jsonl", "x/2.jsonl"]
    assert expanded("**/*.jsonl") == ["x/1.jsonl", "x/2.jsonl", "x/y/3.jsonl"]
    assert expanded("x/1.txt") == ["x/1.txt"]
    assert storage.expand(storage.join(place, "x/*.csv")) == []
    assert all(uri.startswith(place) for uri in storage.expand(storage.join(place, "x/*")))


def test_a_name_with_brackets_is_itself(tmp_path: Path) -> None:
    file = tmp_path / "log[1].jsonl"
    file.write_text("")
    assert storage.expand(str(file)) == [str(file)]


def test_a_fingerprint_changes_with_the_file(place: str) -> None:
    uri = storage.join(place, "a")
    storage.write_text(uri, "same size")
    before = storage.modified_fingerprint(uri)
    assert storage.modified_fingerprint(uri) == before
    time.sleep(0.01)
    storage.write_text(uri, "SAME SIZE")
    assert storage.modified_fingerprint(uri) != before


def refuse_behind_the_end(patch: pytest.MonkeyPatch) -> None:
    """Have the store in memory say what S3 does of a range that begins behind the end."""
    read = MemoryFileSystem.cat_file

    def cat_file(self, path, start=None, end=None, **options):
        if start is not None and start >= self.info(path)["size"]:
            raise OSError(errno.EINVAL, "The requested range is not satisfiable")
        return read(self, path, start, end, **options)

    patch.setattr(MemoryFileSystem, "cat_file", cat_file)


@pytest.mark.parametrize("refuses", [False, True])
def test_a_range_of_a_file_is_read(place: str, refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if refuses:
        refuse_behind_the_end(monkeypatch)
    uri = storage.join(place, "x")
    storage.write_bytes(uri, b"0123456789")
    ranges = {(0, 3): b"012", (4, 2): b"45", (8, 9): b"89", (10, 1): b"", (99, 1): b""}
    assert {(start, count): files.read_range(uri, start, count) for start, count in ranges} == ranges
    with pytest.raises(storage.NotFound, match="nothing at"):
        files.read_range(storage.join(place, "y"), 0, 1)


def test_create_leaves_what_is_there(place: str) -> None:
    uri = storage.join(place, "a")
    assert storage.create(uri, b"mine")
    assert not storage.create(uri, b"yours")
    assert storage.read_bytes(uri) == b"mine"
    assert storage.list_directory(place) == ["a"]


parts = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=5)


@given(st.sampled_from(["/", "/root", "folder", "memory://", "s3://bucket", "s3://bucket/k/"]), parts, parts)
def test_join_parent_and_name_agree(base: str, first: str, second: str) -> None:
    uri = storage.join(base, first, second)
    assert storage.name(uri) == second
    assert storage.parent(uri) == storage.join(base, first)
    assert uri == storage.join(storage.join(base, first), second)


def test_joining_something_absolute_starts_anew() -> None:
    assert storage.join("runs", "/data/x") == "/data/x"
    assert storage.join("s3://bucket/runs", "s3://other/x") == "s3://other/x"
    assert storage.join("", "x") == "x"


def test_a_missing_file_is_named(place: str) -> None:
    uri = storage.join(place, "absent.txt")
    for attempt in (storage.read_text, storage.size_bytes, storage.modified_fingerprint):
        with pytest.raises(storage.NotFound, match=r"absent\.txt"):
            attempt(uri)
    with pytest.raises(FileNotFoundError):
        storage.open_file(uri)


def test_a_protocol_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules, "postlude.storage.object_store", raising=False)
    files._filesystem.cache_clear()
    with pytest.raises(storage.StorageError, match=r"pip install 'postlude\[s3\]'"):
        storage.exists("s3a://bucket/key")


def test_an_unknown_protocol_names_the_nearest() -> None:
    with pytest.raises(storage.StorageError, match=r"Did you mean 'memory://'"):
        storage.read_text("memry://x")


# --- faults ---------------------------------------------------------------------------------------------------


@pytest.mark.capability("A full disk is told as such and leaves old files whole")
def test_a_full_disk_is_told_and_the_old_file_stays(small_disk: Path) -> None:
    uri = str(small_disk / "state.json")
    storage.write_text(uri, "old")
    with pytest.raises(storage.StorageFull, match=r"no room.*state\.json"):
        storage.write_bytes(uri, os.urandom(2**20))
    assert storage.read_text(uri) == "old"
    assert os.listdir(small_disk) == ["state.json"], "the unfinished file is still there"


def test_a_disk_that_fills_up_while_a_file_is_open_is_told(small_disk: Path) -> None:
    def fill() -> None:
        with storage.open_file(str(small_disk / "part.bin"), "wb") as file:
            for _ in range(64):
                file.write(bytes(2**14))

    with pytest.raises(storage.StorageFull, match=r"part\.bin"):
        fill()


@pytest.mark.capability("A read-only place is told as such")
def test_a_read_only_disk_is_told(read_only_disk: Path) -> None:
    for attempt in (
        lambda: storage.write_text(str(read_only_disk / "new"), "x"),
        lambda: storage.write_text(str(read_only_disk / "folder" / "new"), "x"),
        lambda: storage.open_file(str(read_only_disk / "kept"), "wb"),
        lambda: storage.remove(str(read_only_disk / "kept")),
        lambda: storage.lock(str(read_only_disk / "lock")),
        lambda: storage.Journal(str(read_only_disk / "events.jsonl")).append({}),
        lambda: storage.begin(str(read_only_disk / "step-1")),
    ):
        with pytest.raises(storage.NotWritable, match=r"may not be written \(read-only file system\)"):
            attempt()
    assert storage.read_text(str(read_only_disk / "kept")) == "kept"


def test_a_file_where_a_folder_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(storage.NotWritable, match="in each other's place"):
        storage.write_text(str(tmp_path / "runs" / "x"), "")
    with pytest.raises(storage.NotWritable, match="in each other's place"):
        storage.write_text(str(tmp_path), "")


def _replace_for_ever(uri: str) -> None:
    length = 0
    while True:
        length = (length + 977) % 50_000 + 1
        storage.write_text(uri, f"{length}:" + "x" * length)


def test_a_reader_sees_one_version_or_another_while_a_writer_writes_and_is_killed(tmp_path: Path, start: Start) -> None:
    uri = str(tmp_path / "state.json")
    storage.write_text(uri, "1:x")
    for round_number in range(4):
        writer = start(_replace_for_ever, uri)
        seen = set()
        while len(seen) < 10 + 7 * round_number:
            length, _, content = storage.read_text(uri).partition(":")
            assert content == "x" * int(length)
            seen.add(length)
        writer.kill()
        writer.join()
        length, _, content = storage.read_text(uri).partition(":")
        assert content == "x" * int(length)
        assert storage.list_directory(str(tmp_path)) == ["state.json"]


def test_storage_is_quick_to_import() -> None:
    heavy = "import sys, postlude.storage; print([m for m in ('fsspec', 'torch', 'pyarrow') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


# --- limits ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[int]:
    """No file of this process may be larger than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield 10_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _streams(uri: str, content: bytes) -> None:
    with storage.open_hashed(uri) as file:
        file.write(content)


def _appends(uri: str, content: bytes) -> None:
    storage.Journal(uri).append({"text": content.decode()})


@pytest.mark.parametrize("write", [storage.write_bytes, storage.create, _streams, _appends])
def test_a_file_that_may_not_grow_so_large_is_told(
    tmp_path: Path, small_files: int, write: Callable[..., None]
) -> None:
    with pytest.raises(storage.StorageFull, match=r"ulimit -f"):
        write(str(tmp_path / "file"), b"x" * 2 * small_files)
    storage.write_text(str(tmp_path / "other"), "small")


TOO_LONG = ["x" * 256, "/".join(["y" * 200] * 30)]


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_name_that_is_too_long_is_told(tmp_path: Path, name: str) -> None:
    place = storage.join(str(tmp_path), name)
    for write in (
        lambda: storage.write_text(place, "x"),
        lambda: storage.create(place, b"x"),
        lambda: storage.open_file(place, "wb"),
        lambda: storage.begin(place),
        lambda: storage.lock(storage.join(place, "run.lock")),
        lambda: storage.Journal(storage.join(place, "events.jsonl")).append({}),
    ):
        with pytest.raises(storage.NotWritable, match="too long"):
            write()
    with pytest.raises(storage.NotWritable, match="too long"), storage.new_folder(place):
        pass
    for read in (storage.read_bytes, storage.size_bytes, storage.modified_fingerprint, storage.read_marker):
        with pytest.raises(storage.NotFound):
            read(place)
    assert not storage.exists(place)
    assert not storage.is_committed(place)
    assert storage.list_directory(place) == []
    assert storage.holder(place) is None


def test_a_name_of_the_greatest_length_is_written(tmp_path: Path) -> None:
    """Though a file is written beside its place, under a longer name."""
    place = str(tmp_path / ("x" * 255))
    storage.write_text(place, "whole")
    assert storage.read_text(place) == "whole"
    with storage.new_folder(str(tmp_path / ("y" * 255))) as folder:
        Path(folder, "file").write_text("x")
    assert storage.is_committed(str(tmp_path / ("y" * 255)))


class OfItsOwn(Exception):
    """What a library makes of a server that does not answer."""

    __module__ = "botocore.exceptions"


@pytest.mark.parametrize("error", [OfItsOwn("no route"), OSError("no route"), ConnectionResetError("no route")])
def test_a_store_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    for name in ("isdir", "exists", "ls", "info", "cat_file", "pipe_file", "_open"):
        monkeypatch.setattr(MemoryFileSystem, name, fail)
    uri = "memory://far/away"
    for look in (storage.is_directory, storage.exists, storage.list_directory, storage.size_bytes, storage.read_bytes):
        with pytest.raises(storage.StorageError, match=r"'memory://far/away' cannot be read.*\(.*no route\)"):
            look(uri)
    for write in (storage.write_bytes, files.create):
        with pytest.raises(storage.StorageError, match=r"'memory://far/away' cannot be written.*\(.*no route\)"):
            write(uri, b"x")


def test_a_fault_of_ours_is_none_of_a_store() -> None:
    with pytest.raises(ZeroDivisionError), storage.errors.reading("memory://far/away"):
        raise ZeroDivisionError
