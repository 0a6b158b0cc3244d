"""Lines that something stands for are found to be there, or written again from what was kept of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude import storage
from postlude.storage import extent as extents
from postlude.storage import journal as journals


class Stepped(storage.Line):
    step: int


def written(path: Path, *counts: int) -> tuple[storage.Journal, list[storage.Extent]]:
    """A journal to which so many lines were added at a time, and its extent after each, newest first."""
    journal, number = storage.Journal(str(path)), 0
    follower = storage.Follower(journal)
    found = []
    for count in counts:
        for _ in range(count):
            journal.append({"step": number, "loss": number / 7})
            number += 1
        found.append(follower.extent())
    return journal, found[::-1]


def test_an_extent_says_how_far_a_journal_goes(tmp_path: Path) -> None:
    journal, (newest, before) = written(tmp_path / "x.jsonl", 3, 2)
    lines = list(journal.lines())
    assert (newest.lines, before.lines) == (5, 3)
    assert newest.holds(lines)
    assert before.holds(lines)
    assert not newest.holds(lines[:4])
    assert newest.tail.encode() == b"".join(lines[3:])
    assert storage.extent_of(journal) == storage.Extent(5, newest.sha256)
    assert storage.read_extent(newest.to_json()) == newest


@pytest.mark.parametrize("is_long", [True, False])
def test_what_stands_at_the_beginning_is_in_the_first_tail_unless_it_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_long: bool
) -> None:
    monkeypatch.setattr(extents, "TAIL_BYTES", 200 if is_long else 4000)
    journal, _ = written(tmp_path / "x.jsonl", 4)
    follower = storage.Follower(journal)
    follower.pass_over_long()
    journal.append({"step": 4})
    lines = list(journal.lines())
    extent = follower.extent()
    assert extent.holds(lines)
    assert extent.tail.encode() == b"".join(lines[4:] if is_long else lines)


@given(st.data())
def test_lines_that_are_kept_come_back_whatever_became_of_them(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.jsonl")
        journal, (newest, before) = written(path, 4, 3)
        journal.append({"step": "later"})
        whole = path.read_bytes()
        border = sum(map(len, list(journal.lines())[:1]))
        first = data.draw(st.sampled_from([0, border]))
        place = data.draw(st.integers(first, len(whole) - 1))
        how = data.draw(st.sampled_from(["cut", "changed"]))
        value = whole[place] ^ data.draw(st.integers(1, 255))
        path.write_bytes(whole[:place] if how == "cut" else whole[:place] + bytes([value]) + whole[place + 1 :])
        if newest.holds(journal.lines()):
            return
        assert storage.restore(journal, [newest, before])
        lines = list(journal.lines())
        assert newest.holds(lines)
        assert set(lines[7:]) <= {b'{"step": "later"}\n'}


def test_a_line_that_was_changed_does_not_come_behind_what_it_was(tmp_path: Path) -> None:
    journal, found = written(tmp_path / "x.jsonl", 4)
    journal.append({"step": "later"})
    whole = list(journal.lines())
    storage.write_bytes(journal.uri, b"".join([*whole[:3], whole[3].replace(b"3", b"4", 1), whole[4]]))
    assert storage.restore(journal, found)
    assert list(journal.lines()) == whole


def test_what_nobody_has_is_not_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extents, "TAIL_BYTES", 60)
    journal, found = written(tmp_path / "x.jsonl", 9, 1)
    assert [len(extent.tail) > 0 for extent in found] == [True, False]
    storage.write_bytes(journal.uri, b"".join(list(journal.lines())[:5]))
    assert not storage.restore(journal, found)
    assert len(list(journal.lines())) == 5


def test_what_stood_there_is_kept_beside(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "SEGMENT_BYTES", 30)
    monkeypatch.setattr(journals, "PUT_SECONDS", 0.0)
    journal = storage.Journal(place, Stepped)
    for entry in ({"step": 1}, {"stop": 2}, {"step": "3"}, {"step": 4}):
        journal.append(entry)
    damage = journal.drop_damaged()
    assert damage is not None
    assert "line" in damage
    assert storage.Journal(place).read() == [{"step": 1}, {"step": 4}]
    assert storage.read_bytes(f"{place}.damaged-1").count(b"\n") == 4
    assert journal.drop_damaged() is None


def test_a_line_of_a_sealed_journal_that_was_changed_is_named(tmp_path: Path) -> None:
    journal = storage.Journal(str(tmp_path / "x.jsonl"), remedy="Put it back.", sealed=True)
    journal.append({"id": 0, "assignment": "optimizer.lr=1e-3"})
    assert journal.read() == [{"id": 0, "assignment": "optimizer.lr=1e-3"}]
    path = Path(journal.uri)
    path.write_bytes(path.read_bytes().replace(b"1e-3", b"2e-3"))
    with pytest.raises(storage.CorruptError, match=r"line 1.*digest.*Put it back"):
        journal.read()
