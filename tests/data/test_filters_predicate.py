"""SQL predicates over the record."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postlude.data.filters.predicate import Predicates
from postlude.errors import DataError


def keeps(predicate: str, records: Sequence[Any], batch_rows: int = 2) -> list[bool]:
    """What the predicate says of records that come in small batches."""
    batches = [records[start : start + batch_rows] for start in range(0, len(records), batch_rows)]
    predicates = Predicates([predicate], batches)
    return [kept for batch in batches for kept in predicates.keeps(predicate, batch, "record {}".format)]


def refusal(predicate: str, records: Sequence[Any]) -> str:
    with pytest.raises(DataError) as refused:
        keeps(predicate, records)
    assert predicate in str(refused.value)
    return str(refused.value)


CHATS = [
    {"messages": [{"role": "user", "content": "hi"}], "score": 0.1, "lang": "en", "tools": None},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "score": 3, "lang": None},
    {"messages": [], "score": -2.5, "lang": "de", "tools": [{"name": "f"}]},
]


@pytest.mark.capability("Filter records with SQL predicates")
@pytest.mark.parametrize(
    ("predicate", "expected"),
    [
        ("len(messages) >= 2", [False, True, False]),
        ("score > 0", [True, True, False]),
        ("lang = 'en'", [True, False, False]),
        ("lang IS NULL OR lang != 'en'", [False, True, True]),
        ("len(tools) > 0", [False, False, True]),
        ("messages[-1].role = 'assistant' -- the last one answers", [False, True, False]),
        ("len([m for m in messages if m.content LIKE 'h%']) = len(messages)", [True, True, True]),
        ('"SCORE" BETWEEN 0 AND 1', [True, False, False]),
        ("true", [True, True, True]),
        ("score > 0 OR NULL", [True, True, False]),
    ],
)
def test_predicates_over_conversations(predicate: str, expected: list[bool]) -> None:
    for batch_rows in (1, 2, 3):
        assert keeps(predicate, CHATS, batch_rows) == expected


CONDITIONS: list[tuple[str, Callable[[Any], bool | None]]] = [
    ("n >= 2", lambda r: None if r.get("n") is None else r["n"] >= 2),
    ("len(items) = 1", lambda r: None if r.get("items") is None else len(r["items"]) == 1),
    ("list_contains(items, 'ß')", lambda r: None if r.get("items") is None else "ß" in r["items"]),
    ("meta.flag", lambda r: (r.get("meta") or {}).get("flag")),
    ("text = 'it''s'", lambda r: None if r.get("text") is None else r["text"] == "it's"),
    ("n - 5 < 0", lambda r: None if r.get("n") is None else r["n"] - 5 < 0),
]
RECORDS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "n": st.none() | st.integers(-(2**40), 2**40) | st.floats(-10, 10),
            "items": st.none() | st.lists(st.sampled_from(["a", "ß", ""]), max_size=2),
            "meta": st.none() | st.fixed_dictionaries({"flag": st.none() | st.booleans()}),
            "text": st.none() | st.sampled_from(["it's", "its", "\x00", "😀"]),
        },
    ),
    min_size=1,
    max_size=8,
)
WHOLE = {"n": 1, "items": ["a"], "meta": {"flag": True}, "text": "x"}


@settings(max_examples=25, deadline=None)
@given(records=RECORDS, condition=st.sampled_from(CONDITIONS), batch_rows=st.integers(1, 9))
def test_they_mean_what_python_means(records: list[Any], condition: Any, batch_rows: int) -> None:
    predicate, expected = condition
    # One record has every column, the last: the others' types come from it, wherever the batches end.
    records = [*records, WHOLE]
    assert keeps(predicate, records, batch_rows) == [expected(record) is True for record in records]


def test_a_type_is_the_same_in_every_batch() -> None:
    records = [{"v": 1}, {"v": 2}, {"v": "three"}, {"v": [4]}]
    assert keeps("json_type(v) = 'UBIGINT'", records, 1) == keeps("json_type(v) = 'UBIGINT'", records, 4)
    assert keeps("json_type(v) = 'UBIGINT'", records, 1) == [True, True, False, False]
    later = [{"a": {}}, {"a": {}}, {"a": {"b": 1}}]
    assert keeps("a.b = 1", later, 1) == [False, False, True]


def test_what_json_lacks() -> None:
    day = datetime.date(2026, 3, 1)
    records = [
        {"day": day, "sum": decimal.Decimal(30), "share": decimal.Decimal("0.5"), "raw": b"\xff", "n": float("nan")},
        {"day": day.replace(year=2020), "sum": decimal.Decimal(3), "share": None, "raw": None, "n": 1.0},
    ]
    assert keeps("day >= '2026-01-01' AND sum > 20 AND share < 1 AND raw = 'ff' AND n IS NULL", records) == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("predicate", "expected"),
    [
        ("len(mesages) >= 2", "No record has the column 'mesages'. Did you mean 'messages'?"),
        ("len(messages >= 2", "Parser Error"),
        ("messages[1].rolle = 'user'", 'Could not find key "rolle"'),
        ("count(*) > 1", "aggregates"),
        ("row_number() OVER () < 2", "window functions"),
        ("lang::INTEGER = 1", "for record 0. Conversion Error"),
        ("lang IN (SELECT x FROM 'other.csv')", "the source 'query' can join files"),
        ("lang = 'en'; DROP TABLE batch", "Parser Error"),
    ],
)
def test_predicates_that_are_refused(predicate: str, expected: str) -> None:
    assert expected in refusal(predicate, CHATS)


def test_an_empty_predicate() -> None:
    with pytest.raises(DataError, match="empty text"):
        keeps(" ", CHATS)


def test_the_record_that_a_predicate_fails_on_is_named() -> None:
    records = [{"n": "1"}] * 5 + [{"n": "x"}] + [{"n": "3"}] * 2
    predicates = Predicates(["n::INTEGER > 1"], [records])
    with pytest.raises(DataError, match="for record 5"):
        predicates.keeps("n::INTEGER > 1", records, "record {}".format)


def test_what_goes_wrong_while_the_records_are_read_stays_what_it_was() -> None:
    def batches() -> Iterable[Sequence[Any]]:
        yield CHATS
        raise DataError("the disk is gone")

    with pytest.raises(DataError, match=r"^the disk is gone$"):
        Predicates(["score > 0"], batches())


def test_an_odd_record_is_told_and_does_not_change_the_others() -> None:
    records: list[Any] = [CHATS[0], CHATS[1], {"messages": "[{}, {}, {}]"}]
    predicates = Predicates(["len(messages) >= 2"], [records])
    assert [predicates.odd(record, str) is None for record in records] == [True, True, False]
    assert predicates.keeps("len(messages) >= 2", records[:2], str) == [False, True]


def test_numbers_that_are_none_are_absent_and_not_odd() -> None:
    records = [{"score": 1.0}, {"score": float("nan")}, {"score": 3}, {"score": decimal.Decimal("NaN")}, {}]
    predicates = Predicates(["score > 0"], [records])
    assert [predicates.odd(record, str) for record in records] == [None] * 5
    assert predicates.keeps("score > 0", records, str) == [True, False, True, False, False]


@pytest.mark.parametrize("arguments", [{"": 1}, {"name": 1, "Name": 2}])
def test_keys_that_no_struct_can_have_break_no_filter(arguments: dict[str, int]) -> None:
    records = [CHATS[0], {"messages": [{"role": "user", "content": "hi", "arguments": arguments}] * 2}]
    assert keeps("len(messages) >= 2", records) == [False, True]


LARGE = 2**60
"""Identifiers from here on differ by less than floating point tells apart."""


@pytest.mark.capability("Filter large identifiers exactly, whatever one odd record holds")
@pytest.mark.parametrize("odd", [0.5, 2.0**60, 2**100 + 1, -3])
@pytest.mark.parametrize("batch_rows", [1, 3, 100])
def test_one_number_does_not_change_the_type_of_the_others(odd: float, batch_rows: int) -> None:
    records = [{"id": LARGE + i, "n": [{"id": LARGE + i}], "several": [i, LARGE + i]} for i in range(20)]
    mixed = [*records, {"id": odd, "n": [{"id": odd}, {"id": 1}], "several": [odd]}]
    for predicate in ("id % 8 = 3", "n[1].id % 8 = 3", "several[-1] % 8 = 3"):
        expected = [(LARGE + i) % 8 == 3 for i in range(20)]
        assert keeps(predicate, records, batch_rows) == expected
        assert keeps(predicate, mixed, batch_rows) == [*expected, odd % 8 == 3]
    written = [f"id::VARCHAR = '{LARGE + 4}'", "score > 0.75 AND id % 2 = 0"]
    scored = [{**record, "score": 1 if i % 2 else 0.5} for i, record in enumerate(records)]
    assert keeps(written[0], mixed, batch_rows).count(True) == 1
    assert keeps(written[1], [*scored, {"id": 0.5, "score": 0.5}], batch_rows).count(True) == 0


def test_a_number_that_no_type_holds_is_odd() -> None:
    records = [{"id": i} for i in range(5)] + [{"id": 10**60}]
    predicates = Predicates(["id % 2 = 1"], [records])
    assert [predicates.odd(record, str) is None for record in records] == [True] * 5 + [False]
    assert predicates.keeps("id % 2 = 1", records[:5], str) == [False, True, False, True, False]


def test_a_drift_without_a_majority_is_an_error_that_names_record_and_key() -> None:
    records: list[Any] = [{"meta": {"tags": ["a"]}}, {"meta": {"tags": "a, b"}}, {"meta": None}]
    predicates = Predicates(["len(meta.tags) > 1"], [records])
    with pytest.raises(DataError, match=r"'meta\.tags'.*a list 1 times, text 1 times.*it is text in d\.jsonl, line 2"):
        predicates.odd(records[1], lambda: "d.jsonl, line 2")
    assert predicates.odd(records[2], str) is None


def test_what_no_predicate_names_may_drift() -> None:
    records: list[Any] = [{"id": 1, "videos": ["a"]}, {"id": "x", "videos": []}, {"id": [1], "videos": ["b"]}]
    predicates = Predicates(["len(videos) > 0"], [records])
    assert [predicates.odd(record, str) for record in records] == [None] * 3
    assert predicates.keeps("len(videos) > 0", records, str) == [True, False, True]
