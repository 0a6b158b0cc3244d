"""Journals: entries come back exactly, and a reader sees a prefix whatever happens to the writer."""

from __future__ import annotations

import json
import math
import os
import random
import struct
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude import storage
from postlude.storage import exact_json, journal

Start = Callable[..., BaseProcess]

SPECIAL = ("NaN", "Infinity", "-Infinity")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text().filter(lambda text: text not in SPECIAL),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def _bits(value: object) -> object:
    """The value with its floats as bits, so that NaN equals NaN and 0.0 differs from -0.0."""
    if isinstance(value, float):
        return ("NaN",) if math.isnan(value) else struct.pack("<d", value)
    if isinstance(value, dict):
        return {key: _bits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_bits(item) for item in value]
    return value


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@given(values)
def test_values_round_trip_through_strict_json(value: object) -> None:
    text = exact_json.dump(value)
    json.loads(text, parse_constant=_refuse)
    assert "\n" not in text
    assert _bits(exact_json.load(text)) == _bits(value)


def test_entries_are_read_in_order_by_another_reader(place: str) -> None:
    written = storage.Journal(place)
    assert storage.Journal(place).read() == []
    for step in range(5):
        written.append({"step": step, "loss": 0.1 * step}, sync=step == 2)
        if step == 2:
            assert [entry["step"] for entry in storage.Journal(place).read()] == [0, 1, 2]
    written.flush()
    assert storage.Journal(place).read() == [{"step": step, "loss": 0.1 * step} for step in range(5)]
    size = written.size_bytes()
    storage.Journal(place).append({"step": 5}, sync=True)
    assert written.size_bytes() > size
    assert [entry["step"] for entry in written.read()] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("last", [-1, 0, 3, 7, 100])
def test_a_cut_keeps_the_matching_prefix_and_writing_goes_on(
    place: str, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 30)
    monkeypatch.setattr(journal, "PUT_SECONDS", 0.0)
    entries = storage.Journal(place)
    for step in [*range(9), 2]:  # one that matches again behind the cut must go, too
        entries.append({"step": step})
    left = entries.cut(lambda entry: entry["step"] <= last)
    assert [entry["step"] for entry in entries.read()] == [*range(9), 2][:left]
    assert left == min(last + 1, 9) + (last == 100)
    entries.append({"step": "next"}, sync=True)
    assert storage.Journal(place).read()[left:] == [{"step": "next"}]


def test_a_line_in_the_middle_that_is_no_json_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(storage.CorruptError, match=r"events\.jsonl', line 2"):
        storage.Journal(str(file)).read()


@given(st.data())
def test_a_torn_last_line_is_not_read_and_is_mended_by_the_next(data: st.DataObject) -> None:
    uri = f"/dev/shm/postlude-test-{os.getpid()}.jsonl"
    storage.remove(uri)
    entries = storage.Journal(uri)
    for step in range(3):
        entries.append({"step": step, "text": "x" * 10})
    whole = storage.read_bytes(uri)
    kept = data.draw(st.integers(0, len(whole)))
    storage.write_bytes(uri, whole[:kept])
    steps = list(range(whole[:kept].count(b"\n")))
    assert [entry["step"] for entry in entries.read()] == steps
    entries.append({"step": "next"})
    assert [entry["step"] for entry in entries.read()] == [*steps, "next"]
    storage.remove(uri)


def test_a_long_torn_line_is_mended(tmp_path: Path) -> None:
    entries = storage.Journal(str(tmp_path / "x.jsonl"))
    entries.append({"step": 0})
    with open(entries.uri, "ab") as file:
        file.write(b"x" * 200_000)
    entries.append({"step": 1})
    assert [entry["step"] for entry in entries.read()] == [0, 1]


def test_a_full_disk_leaves_the_entries_before(small_disk: Path) -> None:
    entries = storage.Journal(str(small_disk / "metrics.jsonl"))
    written = 0

    def fill() -> None:
        nonlocal written
        while True:
            entries.append({"step": written, "text": "x" * 3000})
            written += 1

    with pytest.raises(storage.StorageFull, match=r"metrics\.jsonl"):
        fill()
    assert [entry["step"] for entry in entries.read()] == list(range(written))
    assert entries.cut(lambda entry: entry["step"] < 10) == 10
    entries.append({"step": 10})
    assert [entry["step"] for entry in storage.Journal(entries.uri).read()] == list(range(11))


def _append_for_ever(uri: str, writer: int) -> None:
    entries = storage.Journal(uri)
    number = sum(entry["writer"] == writer for entry in entries.read())
    while True:
        entries.append({"writer": writer, "number": number, "text": "x" * random.randrange(20_000)})
        number += 1
        time.sleep(0.0005)


def _in_order(entries: list[dict], writer: int) -> int:
    numbers = [entry["number"] for entry in entries if entry["writer"] == writer]
    assert numbers == list(range(len(numbers)))
    return len(numbers)


def test_writers_that_are_killed_lose_no_entry_that_was_seen(tmp_path: Path, start: Start) -> None:
    uri = str(tmp_path / "events.jsonl")
    entries = storage.Journal(uri)
    seen = [0, 0]
    for _ in range(8):
        writers = [start(_append_for_ever, uri, writer) for writer in range(2)]
        at_start = list(seen)
        while any(now < before + 5 for now, before in zip(seen, at_start, strict=True)):
            found = entries.read()
            for writer in range(2):
                count = _in_order(found, writer)
                assert count >= seen[writer]
                seen[writer] = count
        for process in writers:
            process.kill()
            process.join()
        found = entries.read()
        assert all(_in_order(found, writer) >= seen[writer] for writer in range(2))
        entries.cut(lambda entry: entry["number"] < 20)
        found = entries.read()
        seen = [_in_order(found, writer) for writer in range(2)]


def test_a_reader_sees_a_prefix_while_the_journal_is_cut(tmp_path: Path, start: Start) -> None:
    entries = storage.Journal(str(tmp_path / "metrics.jsonl"))
    for step in range(200):
        entries.append({"step": step})
    reader = start(_read_prefixes, entries.uri)
    for left in range(199, 0, -1):
        entries.cut(lambda entry, left=left: entry["step"] < left)
    entries.append({"step": "end"})
    reader.join()
    assert reader.exitcode == 0


def _read_prefixes(uri: str) -> None:
    entries = storage.Journal(uri)
    while (found := entries.read())[-1]["step"] != "end":
        assert [entry["step"] for entry in found] == list(range(len(found)))
        time.sleep(0.001)


def test_two_remote_writers_lose_nothing_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 60)
    uri = f"memory://{os.urandom(4).hex()}/amendments.jsonl"
    first, second = storage.Journal(uri), storage.Journal(uri)
    for number in range(20):
        first.append({"writer": 0, "number": number}, sync=number % 3 == 0)
        second.append({"writer": 1, "number": number}, sync=number % 2 == 0)
    first.flush()
    second.flush()
    found = storage.Journal(uri).read()
    assert [_in_order(found, writer) for writer in range(2)] == [20, 20]


def test_a_remote_writer_that_does_not_know_of_another_yet_leaves_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"memory://{os.urandom(4).hex()}/amendments.jsonl"
    storage.Journal(uri).append({"writer": 0, "number": 0}, sync=True)
    with monkeypatch.context() as patched:
        patched.setattr(journal.files, "list_directory", lambda uri: [])
        storage.Journal(uri).append({"writer": 1, "number": 0}, sync=True)
    assert [entry["writer"] for entry in storage.Journal(uri).read()] == [0, 1]
