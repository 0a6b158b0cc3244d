"""Lines of versions: older ones are read, a newer one is refused in words and left as it is."""

from __future__ import annotations

import pytest

from postlude import storage


class First(storage.Line):
    step: int


class Second(First):
    version = 2


@pytest.mark.parametrize("sealed", [False, True])
def test_the_first_version_is_not_written_and_later_ones_are(place: str, sealed: bool) -> None:
    storage.Journal(place, First, sealed=sealed).append({"step": 1}, sync=True)
    first = list(storage.Journal(place).lines())
    assert b"schema" not in first[0]
    storage.Journal(place, Second, sealed=sealed).append({"step": 2}, sync=True)
    assert storage.Journal(place, Second, sealed=sealed).read() == [{"step": 1}, {"step": 2}]
    assert next(storage.Journal(place).lines()) == first[0]


def test_a_newer_line_is_refused_and_nothing_is_changed(place: str) -> None:
    for schema in (First, Second):
        storage.Journal(place, schema).append({"step": schema.version}, sync=True)
    older, before = storage.Journal(place, First), list(storage.Journal(place).lines())
    followed = storage.Entries(older)
    for read in (older.read, older.drop_damaged, followed.update, lambda: older.cut(lambda line: True)):
        with pytest.raises(storage.NewerSchema, match=r"(?s)line \d.*version 2.*newer postlude.*pip install"):
            read()
    assert list(storage.Journal(place).lines()) == before
    assert not storage.exists(f"{place}.damaged-1")


@pytest.mark.parametrize("version", ["2", 1.5, True, None])
def test_what_is_no_version_is_damage(place: str, version: object) -> None:
    storage.Journal(place).append({"step": 1, "schema": version}, sync=True)
    with pytest.raises(storage.CorruptError, match="no version"):
        storage.Journal(place, Second).read()
