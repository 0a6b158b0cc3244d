"""What is read again is what was written: every damage is found, and files without a digest are still read."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude import storage
from postlude.storage import exact_json

BODY = {"state": "done", "details": {"loss": 0.1, "nothing": None, "far": float("inf")}, "names": ["a", "ü"]}
TEXT = "hash: ab\nmanifest:\n  name: ü\n"


def damages(content: bytes, seed: int) -> list[bytes]:
    """The content cut, emptied, and with one byte changed at each place."""
    chance = random.Random(seed)
    cuts = [content[:length] for length in range(len(content))]
    changed = [
        content[:place] + bytes([content[place] ^ chance.randrange(1, 256)]) + content[place + 1 :]
        for place in range(len(content))
    ]
    return cuts + changed


def test_a_document_is_what_was_written_or_an_error_that_names_it(near_place: str) -> None:
    storage.write_document(near_place, BODY)
    assert storage.read_document(near_place) == BODY
    told = []
    for content in damages(storage.read_bytes(near_place), 0):
        storage.write_bytes(near_place, content)
        try:
            read = storage.read_document(near_place, "Do this.")
        except storage.CorruptError as error:
            told.append(str(error))
        else:  # white space, or another name for the digest, which is no key that anybody knows
            assert {key: value for key, value in read.items() if key in BODY} == BODY
    assert len(told) > 100
    assert all(near_place in text and text.endswith("Do this.") for text in told)


def test_a_text_is_what_was_written_or_an_error(near_place: str) -> None:
    storage.write_sealed_text(near_place, TEXT)
    assert storage.read_sealed_text(near_place) == TEXT
    whole = storage.read_bytes(near_place)
    for content in damages(whole, 1):
        storage.write_bytes(near_place, content)
        try:
            read = storage.read_sealed_text(near_place)
        except storage.CorruptError:
            continue
        # What was cut before its last line looks as an earlier version wrote it: its own hash tells.
        assert read.startswith(TEXT) or whole.startswith(content)


def test_what_an_earlier_version_wrote_is_read(place: str) -> None:
    storage.write_text(place, exact_json.dump(BODY))
    assert storage.read_document(place) == BODY
    storage.write_text(place, TEXT)
    assert storage.read_sealed_text(place) == TEXT
    storage.write_text(f"{place}-folder/part-1.jsonl", "x")
    assert storage.whole_files(f"{place}-folder") == {"part-1.jsonl": f"{place}-folder/part-1.jsonl"}


@given(st.binary(max_size=40), st.data())
def test_a_file_with_a_digest_in_its_name_is_whole_or_left_out(content: bytes, data: st.DataObject) -> None:
    folder = "memory://sealed"
    storage.remove(folder)
    uri = storage.write_once(f"{folder}/part.jsonl", content)
    assert storage.whole_files(folder, ".jsonl") == {"part.jsonl": uri}
    other = data.draw(st.binary(max_size=40).filter(lambda other: other != content))
    storage.write_bytes(uri, other)
    assert storage.whole_files(folder, ".jsonl") == {}
    storage.remove(uri)
    assert not storage.is_as_named(uri)


def test_a_file_of_a_committed_folder_is_compared_with_its_marker(place: str) -> None:
    with storage.new_folder(place) as folder:
        storage.write_text(storage.join(folder, "lineage.json"), "{}")
    assert storage.read_committed(place, "lineage.json") == b"{}"
    storage.write_text(storage.join(place, "lineage.json"), "[]")
    with pytest.raises(storage.CorruptError, match=r"lineage\.json"):
        storage.read_committed(place, "lineage.json")


def test_what_is_set_aside_has_a_name_of_its_own_each_time(place: str) -> None:
    for number in (1, 2):
        storage.write_text(f"{place}/state.json", str(number))
        assert storage.set_aside(f"{place}/state.json") == f"{place}/state.json.damaged-{number}"
    assert storage.read_text(f"{place}/state.json.damaged-1") == "1"
    assert not storage.exists(f"{place}/state.json")


def test_a_fetched_copy_that_is_damaged_is_fetched_again(tmp_path) -> None:
    place, into = "memory://fetched", str(tmp_path / "copy")
    with storage.new_folder(place) as folder:
        storage.write_text(storage.join(folder, "part"), "content")
    for damage in (None, b"", b"Content"):
        storage.fetch(place, into)
        assert storage.read_text(f"{into}/part") == "content"
        if damage is not None:
            storage.write_bytes(f"{into}/part", damage)
    assert storage.read_text(f"{storage.fetch(place, into)}/part") == "content"
