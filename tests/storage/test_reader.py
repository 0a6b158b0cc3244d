"""A reader that goes on has what a reader from the beginning has, whatever became of the journal between two looks."""

from __future__ import annotations

import itertools
import os
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postlude import storage
from postlude.storage import files, journal, reader

numbers = itertools.count()

steps_of_a_life = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 40)),
    st.tuples(st.just("append beside"), st.integers(1, 5)),
    st.tuples(st.just("cut"), st.integers(0, 60)),
    st.tuples(st.just("tear"), st.integers(1, 30)),
    st.tuples(st.just("replace"), st.integers(0, 30)),
    st.tuples(st.just("look"), st.just(0)),
)


def line(number: int, step: int) -> dict:
    """A line of metrics with its step, and what only this line has."""
    return {"step": step, "loss": number / 3, "text": "x" * (number * 7 % 50)}


def live(uri: str, lives: list[tuple[str, int]], followed: storage.Entries) -> None:
    """Do to a journal what can be done, and hold at each look that the follower has it as it stands."""
    writers = storage.Journal(uri), storage.Journal(uri)
    for what, count in lives:
        if what == "append":
            for step in range(count):
                writers[0].append(line(next(numbers), step))
        elif what == "append beside":
            for step in range(count):
                writers[1].append(line(next(numbers), step))
        elif what == "cut":
            left = iter(range(count))
            writers[0].cut(lambda entry, left=left: next(left, None) is not None)
            writers = storage.Journal(uri), storage.Journal(uri)
        elif what == "tear" and files.is_local(uri) and os.path.exists(uri):
            with open(uri, "ab") as file:
                file.write(b'{"torn": "' + b"x" * count)
        elif what == "replace":
            storage.remove(uri)
            writers = storage.Journal(uri), storage.Journal(uri)
            for step in range(count):
                writers[0].append(line(next(numbers), step))
        else:
            before = list(followed.entries)
            kept = followed.update()
            assert followed.entries == storage.Journal(uri).read()
            assert followed.entries[:kept] == before[:kept]
    followed.update()
    assert followed.entries == storage.Journal(uri).read()


@pytest.mark.parametrize("where", ["local", "memory"])
@settings(deadline=None, max_examples=60)
@given(lives=st.lists(steps_of_a_life, max_size=14), small=st.booleans())
def test_a_reader_that_goes_on_has_what_stands(where: str, lives: list[tuple[str, int]], small: bool) -> None:
    name = f"reader-{os.getpid()}-{uuid.uuid4().hex}.jsonl"
    uri = f"/dev/shm/{name}" if where == "local" else f"memory://{name}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "PUT_SECONDS", 0.0)
        if small:
            patch.setattr(journal, "SEGMENT_BYTES", 200)
            patch.setattr(reader, "BLOCK_BYTES", 60)
            patch.setattr(reader, "MARK_BYTES", 150)
        try:
            live(uri, lives, storage.Entries(storage.Journal(uri)))
        finally:
            storage.remove(uri)


def bytes_read(patch: pytest.MonkeyPatch) -> list[int]:
    """How much each read of a range gave, from now on."""
    counts: list[int] = []
    read_range = files.read_range

    def counted(uri: str, start: int, count: int) -> bytes:
        content = read_range(uri, start, count)
        counts.append(len(content))
        return content

    patch.setattr(files, "read_range", counted)
    return counts


def test_what_was_read_is_not_read_again(near_place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "PUT_SECONDS", 0.0)
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 2**14)
    monkeypatch.setattr(reader, "MARK_BYTES", 2**12)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 2**13)
    written = storage.Journal(near_place)
    for step in range(2000):
        written.append(line(step, step))
    followed = storage.Entries(storage.Journal(near_place))
    counts = bytes_read(monkeypatch)
    followed.update()
    assert sum(counts) < 1.5 * written.size_bytes()
    counts.clear()
    followed.update()
    assert not counts
    written.append(line(2000, 2000))
    assert followed.update() == 2000
    assert sum(counts) < 4 * reader._BEFORE_BYTES
    counts.clear()
    written.cut(lambda entry: entry["step"] < 1900)
    storage.Journal(near_place).append({"step": "again"})
    assert 1700 < followed.update() <= 1900
    assert followed.entries == storage.Journal(near_place).read()
    assert sum(counts) < written.size_bytes() / 5


def test_what_was_not_taken_comes_again(tmp_path: Path) -> None:
    written = storage.Journal(str(tmp_path / "metrics.jsonl"))
    written.append({"step": 1})
    followed = storage.Entries(storage.Journal(written.uri))
    followed.update()
    with open(written.uri, "ab") as file:
        file.write(b"no JSON\n")
    for _ in range(2):
        with pytest.raises(storage.CorruptError, match=r"metrics\.jsonl', line 2,"):
            followed.update()
    assert followed.entries == [{"step": 1}]
    written.drop_damaged()
    written.append({"step": 2})
    followed.update()
    assert followed.entries == [{"step": 1}, {"step": 2}]


def test_a_line_of_any_length_is_read(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 100)
    storage.Journal(place).append({"text": "x" * 5000}, sync=True)
    followed = storage.Entries(storage.Journal(place))
    followed.update()
    assert [len(entry["text"]) for entry in followed.entries] == [5000]


@given(st.lists(st.integers(0, 300), max_size=8), st.integers(0, 30))
@settings(deadline=None, max_examples=50)
@pytest.mark.parametrize("where", ["local", "memory"])
def test_the_last_entry_is_read_from_the_end(where: str, lengths: list[int], torn: int) -> None:
    name = f"last-{os.getpid()}-{uuid.uuid4().hex}.jsonl"
    uri = f"/dev/shm/{name}" if where == "local" else f"memory://{name}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SEGMENT_BYTES", 200)
        patch.setattr(journal, "_TAIL_BYTES", 20)
        written = storage.Journal(uri)
        for number, length in enumerate(lengths):
            written.append({"number": number, "text": "x" * length}, sync=True)
        if lengths and where == "local":
            with open(uri, "ab") as file:
                file.write(b"x" * torn)
        assert storage.Journal(uri).last() == (storage.Journal(uri).read() or [None])[-1]
        storage.remove(uri)


def test_a_local_journal_that_was_copied_to_a_bucket_is_read(tmp_path: Path) -> None:
    local, remote = storage.Journal(str(tmp_path / "x.jsonl")), f"memory://{uuid.uuid4().hex}/x.jsonl"
    followed = storage.Entries(storage.Journal(remote))
    for count in (3, 5, 2):
        local.cut(lambda entry: False)
        for step in range(count):
            local.append({"step": step})
        storage.copy_file(local.uri, remote)
        followed.update()
        assert followed.entries == local.read() == storage.Journal(remote).read()
        assert local.size_bytes() == storage.Journal(remote).size_bytes()
