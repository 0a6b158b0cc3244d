"""A named data set: limit, filters, identities, bad records."""

from __future__ import annotations

import json
import pickle
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postlude.data import dataset as dataset_module
from postlude.data.dataset import Dataset
from postlude.data.example import Record, Text
from postlude.data.filters.filter import Content, Filter
from postlude.data.records import record_json
from postlude.data.sources import files
from postlude.data.sources.sequential import Sequential
from postlude.errors import DataError
from postlude.manifest.component import register
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import DatasetConfig


@register("filters", "polite_in_tests")
class Polite(Filter):
    """The example of the documentation."""

    words: list[str] = ["please"]

    def reason_to_drop(self, record: Record) -> str | None:
        return None if any(word in record["text"] for word in self.words) else "not polite"


@register("filters", "rising_in_tests")
class Rising(Filter):
    """Keeps what is greater than all before: only right in file order, over one pass."""

    def start(self, read: Callable[[Record], Content]) -> Callable[[Record], str | None]:
        highest = [-1]

        def judge(record: Record) -> str | None:
            if record["n"] <= highest[0]:
                return "not above the highest so far"
            highest[0] = record["n"]
            return None

        return judge


def make(folder: Path, rows: Sequence[Any], name: str = "a.jsonl", sample: int | None = None, **keys: Any) -> Dataset:
    """A data set of rows: objects, or bytes that stand as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    content = b"".join(line + b"\n" for line in lines)
    if not (folder / name).exists() or (folder / name).read_bytes() != content:
        (folder / name).write_bytes(content)
    stream = keys.pop("stream", None)
    config = DatasetConfig.model_validate(
        {"source": {"path": str(folder / name), "stream": stream}, "format": "text", **keys}
    )
    return Dataset("rows", config, str(folder / "cache"), sample)


def counted_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[str]:
    """A list that grows by one entry with each call of a method."""
    calls: list[str] = []
    original = getattr(owner, name)

    def method(self: Any, *arguments: Any) -> Any:
        calls.append(name)
        return original(self, *arguments)

    monkeypatch.setattr(owner, name, method)
    return calls


def texts(dataset: Dataset) -> list[str]:
    """The texts of all the examples, in file order."""
    found = []
    for group, rows in enumerate(dataset.groups):
        for row in dataset.examples(group, range(rows)):
            for _, example in row:
                assert isinstance(example, Text)
                found.append(example.pieces[0][0])
    return found


ROWS: list[dict[str, Any]] = [
    {"id": i, "n": (i * 7) % 10, "text": f"text {i}{' please' if i % 3 else ''}"} for i in range(25)
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups and batches so small that there are several of each."""
    monkeypatch.setattr(files, "GROUP_ROWS", 4)
    monkeypatch.setattr(dataset_module, "BATCH_ROWS", 3)


def test_without_filters_nothing_is_read_in_advance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make(tmp_path, ROWS)
    assert dataset.groups == [25]
    assert (dataset.files, dataset.seekable, dataset.dropped) == ([[0]], True, {})
    assert texts(dataset) == [row["text"] for row in ROWS]
    monkeypatch.setattr(dataset._records, "read", None)
    limited = make(tmp_path, ROWS, limit=7)
    monkeypatch.setattr(limited._records, "read", None)
    assert limited.groups == [7]


def test_limit_and_sample(tmp_path: Path, small: None) -> None:
    for stream, groups in ((False, [10]), (True, [4, 4, 2, 0, 0, 0, 0])):
        assert make(tmp_path, ROWS, limit=10, stream=stream).groups == groups
        assert texts(make(tmp_path, ROWS, limit=10, stream=stream)) == [row["text"] for row in ROWS[:10]]
    assert texts(make(tmp_path, ROWS, sample=4)) == [ROWS[i]["text"] for i in (0, 8, 16, 24)]
    assert texts(make(tmp_path, ROWS, sample=4, limit=10)) == [ROWS[i]["text"] for i in (0, 3, 6, 9)]
    assert texts(make(tmp_path, ROWS, sample=5, stream=True)) == [row["text"] for row in ROWS[:5]]
    assert make(tmp_path, ROWS, sample=99).groups == [25]
    assert [make(tmp_path, ROWS, sample=n).rows for n in (4, 99)] == [25, 25]
    assert make(tmp_path, ROWS, sample=5, filters=["n <> 0"]).rows == 20, "four of five, of 25"


FILTERS: list[tuple[Any, Callable[[dict[str, Any]], bool]]] = [
    ("n >= 3", lambda row: row["n"] >= 3),
    ("polite_in_tests", lambda row: "please" in row["text"]),
    ({"name": "polite_in_tests", "words": ["1"]}, lambda row: "1" in row["text"]),
    ({"name": "length", "max_words": 2}, lambda row: len(row["text"].split()) <= 2),
    ("id % 2 = 0", lambda row: row["id"] % 2 == 0),
]


@pytest.mark.capability("Filters tell what they dropped, with counts and examples")
@settings(max_examples=8, deadline=None)
@given(
    chosen=st.lists(st.sampled_from(FILTERS), min_size=1, max_size=3),
    stream=st.booleans(),
    limit=st.none() | st.integers(1, 30),
    name=st.sampled_from(["a.jsonl"]),
)
def test_filters_keep_the_rows_that_a_loop_keeps(
    chosen: list[Any], stream: bool, limit: int | None, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("filters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "GROUP_ROWS", 4)
        patch.setattr(dataset_module, "BATCH_ROWS", 3)
        left, counts = ROWS[:limit], []
        for _, keep in chosen:
            counts.append(len(left))
            left = [row for row in left if keep(row)]
        keys: dict[str, Any] = {"filters": [one for one, _ in chosen], "limit": limit, "stream": stream}
        if not left:
            with pytest.raises(DataError, match="leave no record: dropped"):
                make(folder, ROWS, name, **keys)
            return
        dataset = make(folder, ROWS, name, **keys)
        assert texts(dataset) == [row["text"] for row in left]
        assert sum(one.count for one in dataset.dropped.values()) == len(ROWS[:limit]) - len(left)
        assert all(len(one.examples) == min(one.count, 5) for one in dataset.dropped.values())
        assert len(dataset.groups) == (7 if stream else 1)


def test_a_filter_with_a_memory_sees_one_pass_in_file_order(tmp_path: Path, small: None) -> None:
    expected, highest = [], -1
    for row in ROWS:
        if row["n"] > highest:
            expected.append(row["text"])
            highest = row["n"]
    for stream in (False, True):
        dataset = make(tmp_path, ROWS, filters=["rising_in_tests"], stream=stream)
        assert texts(dataset) == expected
        [(reason, dropped)] = dataset.dropped.items()
        assert reason == "rising_in_tests: not above the highest so far"
        assert dropped.count == 25 - len(expected)


def test_what_was_kept_is_remembered_until_something_changes(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(tmp_path, ROWS, filters=["n >= 3", "dedupe"], stream=True)
    passes = counted_calls(monkeypatch, Dataset, "_pass")
    again = make(tmp_path, ROWS, filters=["n >= 3", "dedupe"], stream=True)
    assert (texts(again), again.dropped, again.fingerprint) == (texts(first), first.dropped, first.fingerprint)
    assert not passes
    for change in ({"filters": ["n >= 4"]}, {"limit": 20}, {"key": "id"}, {"sample": 9}, {"stream": False}):
        keys: dict[str, Any] = {"filters": ["n >= 3", "dedupe"], "stream": True, **change}
        changed = make(tmp_path, ROWS, **keys)
        assert changed.fingerprint != first.fingerprint
    assert len(passes) == 5
    other = make(tmp_path, ROWS[:-1], filters=["n >= 3", "dedupe"], stream=True)
    assert other.fingerprint != first.fingerprint
    assert len(passes) == 6


def test_the_code_of_a_plugin_is_part_of_what_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    code = (
        "from postlude.data.filters.filter import Filter\n"
        "class Short(Filter):\n"
        "    def reason_to_drop(self, record):\n"
        "        return 'long' if len(record['text']) > {limit} else None\n"
    )
    plugin = tmp_path / "plugins" / "postlude_test_plugin.py"
    plugin.parent.mkdir()
    monkeypatch.syspath_prepend(str(plugin.parent))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    rows = [{"text": "a" * length} for length in range(1, 9)]
    for limit in (3, 5):
        plugin.write_text(code.format(limit=limit))
        sys.modules.pop("postlude_test_plugin", None)
        importlib.invalidate_caches()
        short = importlib.import_module("postlude_test_plugin").Short
        config = make(tmp_path, rows).format  # a component is taken as it is, where one is built in Python
        built = DatasetConfig.model_construct(
            source=DatasetConfig.model_validate(
                {"source": {"path": str(tmp_path / "a.jsonl")}, "format": "text"}
            ).source,
            format=config,
            filters=[short()],
        )
        assert Dataset("rows", built, str(tmp_path / "cache")).groups == [limit]


# --- identities ---------------------------------------------------------------------------------------------


@pytest.mark.capability("Example identities are stable")
def test_identities(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": "x1", "text": "a"}, {"text": "b", "id": 2}]
    keyed = make(tmp_path, rows, key="id")
    assert [example[0][0] for example in keyed.examples(0, [0, 1])] == ["rows:x1", "rows:2"]
    plain = make(tmp_path, rows)
    ids = [example[0][0] for example in plain.examples(0, [0, 1])]
    assert ids == [f"rows:{plain.identity(row).removeprefix('rows:')}" for row in rows]
    assert len(set(ids)) == 2
    assert all(len(one.removeprefix("rows:")) == 16 for one in ids)
    # Neither the order of the keys, nor the place, nor the container is part of a record's identity.
    swapped = make(tmp_path, [rows[1], {"text": "a", "id": "x1"}], "b.jsonl")
    assert [example[0][0] for example in swapped.examples(0, [1, 0])] == ids
    assert plain.identity({"b": [1, None, "ü"], "a": 0.5}) == "rows:7299289dfb6ba3b5"  # written down once


@settings(max_examples=30)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: Any) -> None:
    one = record_json({"a": value, "b": {"c": 1, "d": value}}, canonical=True)
    assert one == record_json({"b": {"d": value, "c": 1}, "a": value}, canonical=True)
    json.loads(one)


def test_several_examples_of_a_record_are_numbered(tmp_path: Path) -> None:
    replies = [{"role": "assistant", "text": text, "rank": i} for i, text in enumerate("ab")]
    rows = [
        {"id": 7, "prompt": {"role": "prompter", "text": "q", "replies": replies}},
        {"id": 8, "prompt": {"role": "prompter", "text": "q", "replies": replies[:1]}},
    ]
    dataset = make(tmp_path, rows, key="id", format={"name": "tree", "paths": "all"})
    assert [[name for name, _ in row] for row in dataset.examples(0, [0, 1])] == [["rows:7/0", "rows:7/1"], ["rows:8"]]


# --- bad records --------------------------------------------------------------------------------------------


BAD = [
    {"id": 1, "text": "a"},
    b'{"id": 2',
    {"id": 3, "txt": "c"},
    b'{"text": "\xff"}',
    {"text": "no id"},
    {"id": 6, "text": "f"},
]


@pytest.mark.parametrize("filters", [[], ["dedupe"], ["id IS NULL OR id > 0", "dedupe"]])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_record_stops_with_its_place(filters: list[str], stream: bool, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        texts(make(tmp_path, BAD, filters=filters, stream=stream))
    assert "a.jsonl, line 2): it is not JSON" in str(refused.value)
    assert "on_bad_record: skip" in str(refused.value)
    with pytest.raises(
        DataError, match=r"a.jsonl, line 1, id 3\): it has no column 'text'. Did you|a.jsonl, line 1, id 3"
    ):
        texts(make(tmp_path, BAD[2:], key="id", filters=filters, stream=stream))
    with pytest.raises(DataError, match="it has no 'id', which 'key' says identifies it"):
        texts(make(tmp_path, BAD[4:], key="id", stream=stream))


@pytest.mark.capability("Bad records can be skipped and counted")
@pytest.mark.parametrize("filters", [[], ["dedupe"], ["id IS NULL OR id > 1"]])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_records_are_counted_once(filters: list[str], stream: bool, tmp_path: Path, small: None) -> None:
    dataset = make(tmp_path, BAD, key="id", on_bad_record="skip", filters=filters, stream=stream)
    expected = ["f"] if "id IS NULL OR id > 1" in filters else ["a", "f"]
    assert texts(dataset) == expected
    assert texts(dataset) == expected
    bad = dataset.dropped["bad record"]
    assert bad.count == 4
    assert sorted(bad.examples)[0][0].endswith("a.jsonl, line 2")
    assert any("which 'key' says identifies it" in reason for _, reason in bad.examples)
    if filters == []:
        assert dataset.examples(0, [0, 1]) == [[("rows:1", Text([("a", 1.0)]))], []]


def test_nothing_left(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        make(tmp_path, ROWS, filters=["n > 5", {"name": "length", "min_words": 50}])
    assert "leave no record: dropped 15 by 'n > 5', 10 by 'length: fewer than 50 words'" in str(refused.value)
    with pytest.raises(DataError, match="dropped 2 by 'bad record'"):
        make(tmp_path, [b"x", b"y"], filters=["dedupe"], on_bad_record="skip")
    with pytest.raises(DataError, match="No record has the column 'm'"):
        make(tmp_path, ROWS, filters=["m > 5"])


def test_the_name_of_a_filter_that_needs_keys(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"'length' needs keys of its own: .*at least one bound"):
        make(tmp_path, ROWS, filters=["length"])


# --- processes and threads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_data_set_is_pickled_and_read_from_two_threads(stream: bool, tmp_path: Path, small: None) -> None:
    dataset = make(tmp_path, BAD * 5, on_bad_record="skip", filters=["dedupe"], stream=stream)
    again = pickle.loads(pickle.dumps(dataset))
    assert texts(again) == texts(dataset)
    assert (again.groups, again.dropped, again.fingerprint) == (dataset.groups, dataset.dropped, dataset.fingerprint)
    dataset = make(tmp_path, BAD * 20, on_bad_record="skip", stream=stream)
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(texts(dataset))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [["a", "no id", "f"] * 20] * 3
    assert dataset.dropped["bad record"].count == 60


def test_a_compressed_stream_is_read_once_through_by_the_filters(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    config = DatasetConfig.model_validate(
        {"source": {"path": str(tmp_path / "a.jsonl.gz"), "stream": True}, "format": "text", "filters": ["dedupe"]}
    )
    rewinds = counted_calls(monkeypatch, Sequential, "_rewind")
    dataset = Dataset("rows", config, str(tmp_path / "cache"))
    assert texts(dataset) == [row["text"] for row in ROWS]
    assert not dataset.seekable
    assert len(rewinds) == 2  # once for each time through
