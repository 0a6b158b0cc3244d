"""The source ``path``: what is read is what plain readers read, whatever the container and the order."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from postlude.data.records import Records, Unreadable
from postlude.data.sources import files, tables
from postlude.data.sources.path import Path as PathSource
from postlude.data.sources.text import JsonArray
from postlude.errors import DataError

CONTAINERS = ["jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "parquet", "csv", "csv.gz", "tsv", "tsv.zst"]

texts = st.text(st.characters(codec="utf-8"), max_size=12)
"""Any text, so also line ends of every kind, quotes and what looks like JSON."""
row_lists = st.lists(st.fixed_dictionaries({"id": texts, "said": texts}), min_size=1, max_size=25)


def write(path: Path, rows: list[dict[str, str]], group_rows: int = 4) -> None:
    """Write rows as the name of the file says, with the plainest tool for it."""
    kind = path.name.split(".")[1]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group_rows)
        return
    if kind == "jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif kind == "json":
        content = json.dumps(rows, ensure_ascii=False, indent=1)
    else:
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        content = file.getvalue()
    packed = content.encode()
    if path.suffix == ".gz":  # in two members, as appending makes them
        packed = gzip.compress(packed[: len(packed) // 2]) + gzip.compress(packed[len(packed) // 2 :])
    elif path.suffix == ".zst":
        half = len(packed) // 2
        packed = b"".join(zstandard.ZstdCompressor().compress(part) for part in (packed[:half], packed[half:]))
    path.write_bytes(packed)


def opened(path: Path | str | list[str], stream: bool | None, cache: Path) -> Records:
    return PathSource(path=str(path) if isinstance(path, Path) else path, stream=stream).open(str(cache))


def all_rows(records: Records) -> list[Any]:
    return [row for file in records.files for group in file for row in records.read(group)]


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "GROUP_ROWS", 4)


@pytest.mark.capability("Read JSON lines (plain, gzip, Zstandard), JSON arrays, Parquet, CSV and TSV")
@pytest.mark.parametrize("container", CONTAINERS)
@settings(max_examples=12, deadline=None)
@given(rows=row_lists, data=st.data())
def test_any_rows_in_any_order_are_those_that_were_written(
    container: str, rows: list[dict[str, str]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    path = folder / f"data.{container}"
    write(path, rows)
    for stream in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "GROUP_ROWS", 4)
            records = opened(path, stream, folder / "cache")
        assert all_rows(records) == rows
        assert sum(records.groups) == records.rows == len(rows)
        if stream:
            assert max(records.groups) <= 4
            assert records.seekable == (container.count(".") == 0)
        else:
            assert (records.groups, records.files, records.seekable) == ([len(rows)], [[0]], True)
        starts = [sum(records.groups[:group]) for group in range(len(records.groups))]
        for _ in range(4):
            group = data.draw(st.integers(0, len(records.groups) - 1))
            wanted = data.draw(st.lists(st.integers(0, records.groups[group] - 1), max_size=6))
            assert records.read(group, wanted) == [rows[starts[group] + row] for row in wanted]


@pytest.mark.parametrize("name", ["gsm8k/train.jsonl", "toolcall_sft/glaive_toolcall_en_demo.json", "game24/24.csv"])
def test_real_files_read_as_the_datasets_package_reads_them(name: str, shared_data: Path, tmp_path: Path) -> None:
    import datasets

    path = str(shared_data / name)
    if name.endswith(".csv"):
        with open(path, newline="") as file:
            text = datasets.Features(dict.fromkeys(next(csv.reader(file)), datasets.Value("string")))
        theirs = datasets.Dataset.from_csv(path, features=text, cache_dir=str(tmp_path / "hf"))
    else:
        theirs = datasets.Dataset.from_json(path, cache_dir=str(tmp_path / "hf"))
    for stream in (False, True):
        assert all_rows(opened(path, stream, tmp_path / "cache")) == theirs.to_list()


def test_parquet_keeps_the_types_that_pyarrow_reads(tmp_path: Path) -> None:
    table = pa.table(
        {
            "nested": [[{"role": "user", "n": 1}], None, []],
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
            "when": pa.array([0, 1, None], pa.timestamp("us", "UTC")),
            "share": [0.1, float("inf"), None],
            "raw": [b"\xff", b"", None],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    expected = pq.read_table(tmp_path / "a.parquet").to_pylist()
    for stream in (False, True):
        assert all_rows(opened(tmp_path / "a.parquet", stream, tmp_path / "cache")) == expected


def test_batches_with_dictionaries_of_their_own_become_one_arrow_file(tmp_path: Path) -> None:
    values = [[f"kind {part} {i % 3}" for i in range(700)] for part in range(4)]
    batches = [pa.record_batch({"kind": pa.array(part).dictionary_encode()}) for part in values]
    tables.write_arrow(str(tmp_path / "a.arrow"), batches[0].schema, batches)
    records = tables.ArrowRows(str(tmp_path / "a.arrow"), "a", "")
    assert records.read(0) == [{"kind": value} for part in values for value in part]


# --- which files --------------------------------------------------------------------------------------------


def test_files_folders_patterns_and_lists(tmp_path: Path, small_groups: None) -> None:
    (tmp_path / "deep" / "_temporary").mkdir(parents=True)
    for number, name in enumerate(("b.jsonl", "a.csv", "deep/c.parquet", "deep/d.jsonl.gz", "deep/_temporary/e.jsonl")):
        write(tmp_path / name, [{"id": f"{number}-{row}"} for row in range(6)])
    (tmp_path / "README.md").write_text("not data")

    def ids(path: Path | str | list[str], stream: bool) -> list[str]:
        return [row["id"].partition("-")[0] for row in all_rows(opened(path, stream, tmp_path / "cache"))][::6]

    for stream in (False, True):
        assert ids(tmp_path, stream) == ["1", "0", "2", "3"]
        assert ids(f"{tmp_path}/*.*[lv]", stream) == ["1", "0"]
        assert ids([f"{tmp_path}/deep/d.jsonl.gz", f"{tmp_path}/b.jsonl"], stream) == ["3", "0"]
    records = opened(tmp_path, True, tmp_path / "cache")
    assert records.files == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert not records.seekable
    assert "d.jsonl.gz, line 6" in records.where(7, 1)


def test_small_local_files_are_read_at_random_and_large_or_remote_ones_as_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    rows = [{"id": str(i)} for i in range(5000)]
    write(tmp_path / "a.jsonl", rows)
    assert len(opened(tmp_path / "a.jsonl", None, tmp_path / "cache").groups) == 1
    monkeypatch.setattr(files, "RANDOM_ACCESS_BYTES", (tmp_path / "a.jsonl").stat().st_size - 1)
    assert len(opened(tmp_path / "a.jsonl", None, tmp_path / "cache").groups) == 2
    fsspec.filesystem("memory").pipe_file("/postlude-test/a.jsonl", (tmp_path / "a.jsonl").read_bytes())
    for stream, groups in ((None, 2), (False, 1)):
        records = opened("memory://postlude-test/a.jsonl", stream, tmp_path / "cache")
        assert len(records.groups) == groups
        assert all_rows(records) == rows


@pytest.mark.parametrize("container", ["jsonl", "jsonl.zst", "csv.gz", "parquet"])
def test_remote_files_in_every_container(container: str, tmp_path: Path, small_groups: None) -> None:
    import fsspec

    rows = [{"id": f"{i}\nß"} for i in range(10)]
    write(tmp_path / f"a.{container}", rows)
    fsspec.filesystem("memory").pipe_file(f"/postlude-remote/a.{container}", (tmp_path / f"a.{container}").read_bytes())
    for stream in (False, True):
        records = opened(f"memory://postlude-remote/*.{container}", stream, tmp_path / "cache")
        assert all_rows(records) == rows


def test_a_remote_cache_folder_stands_for_one_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    write(tmp_path / "a.jsonl", [{"id": "1"}])
    records = PathSource(path=str(tmp_path / "a.jsonl")).open("memory://bucket/cache")
    assert all_rows(records) == [{"id": "1"}]
    assert list((tmp_path / "own" / "postlude").rglob("index-*"))


# --- streams, copies, caches --------------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("stream", [False, True])
def test_records_are_pickled_and_read_from_threads(
    container: str, stream: bool, tmp_path: Path, small_groups: None
) -> None:
    rows = [{"id": str(i)} for i in range(30)]
    write(tmp_path / f"a.{container}", rows)
    records = opened(tmp_path / f"a.{container}", stream, tmp_path / "cache")
    all_rows(records)
    again = pickle.loads(pickle.dumps(records))
    assert all_rows(again) == rows
    assert again.fingerprint == records.fingerprint
    wrong: list[int] = []

    def read(seed: int) -> None:
        for turn in range(12):
            group = (seed * 5 + turn * 3) % len(records.groups)
            start = sum(records.groups[:group])
            if records.read(group) != rows[start : start + records.groups[group]]:
                wrong.append(group)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_fingerprint_and_what_is_cached_follow_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    for stream in (False, True):
        write(path, [{"id": "old"}])
        before = opened(path, stream, tmp_path / "cache")
        assert opened(path, stream, tmp_path / "cache").fingerprint == before.fingerprint
        write(path, [{"id": "new"}, {"id": "newer"}])
        after = opened(path, stream, tmp_path / "cache")
        assert after.fingerprint != before.fingerprint
        assert all_rows(after) == [{"id": "new"}, {"id": "newer"}]
    assert not list((tmp_path / "cache").glob("*.unfinished"))


def test_a_json_array_is_cut_right_wherever_a_chunk_of_it_ends(tmp_path: Path) -> None:
    content = '\ufeff [ {"a": "]},\\"[ü"} ,\n{"b": [1, {"c": 12}]},17, "x", {"d": 1e5}]\n'.encode()
    whole = [piece[2] for piece in JsonArray("a").pieces(io.BytesIO(content))]
    assert [json.loads(raw) for raw in whole] == json.loads(content.decode("utf-8-sig"))
    for chunk_bytes in range(1, len(content)):
        pieces = list(JsonArray("a", chunk_bytes).pieces(io.BytesIO(content)))
        assert [piece.raw for piece in pieces] == whole
        assert all(content[piece.start :].startswith(piece.raw) for piece in pieces)


def test_no_more_than_a_group_of_a_stream_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(files, "GROUP_ROWS", 500)
    row = {"id": "x" * 4000}
    for container in ("jsonl", "jsonl.gz", "parquet"):
        write(tmp_path / f"a.{container}", [row] * 4_000, group_rows=500)
        records = opened(tmp_path / f"a.{container}", True, tmp_path / "cache")
        tracemalloc.start()
        for group in range(len(records.groups)):
            records.read(group, [0, 1])
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 4_000 * 4000 / 2


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.capability("A broken JSON line is named by file and line")
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("stream", [False, True])
def test_rows_that_cannot_be_read_are_told_apart_and_placed(suffix: str, stream: bool, tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"id": 1}',
        b"",
        b'{"id": 2',
        b'{"id": "\xff"}',
        b"[1, 2]",
        b'{"id": "\\ud83d"}',
        b"[" * 100_000,
        b'{"id": "\\ud83d\\ude00"}\r',
        b"   ",
        b'{"id": 3},',
        b'{"id": 4}',
    ]
    content = b"\n".join(lines)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    records = opened(path, stream, tmp_path / "cache")
    rows = records.read(0)
    assert [row for row in rows if not isinstance(row, Unreadable)] == [{"id": 1}, {"id": "😀"}, {"id": 4}]
    reasons = {records.where(0, i): row.reason for i, row in enumerate(rows) if isinstance(row, Unreadable)}
    wanted = {
        3: "not JSON",
        4: "not UTF-8",
        5: "found a list",
        6: "surrogate",
        7: "nested too deeply",
        10: "not JSON",
    }
    assert list(reasons) == [f"{path}, line {line}" for line in wanted]
    for reason, expected in zip(reasons.values(), wanted.values(), strict=True):
        assert expected in reason


def test_rows_of_csv_that_do_not_fit_the_header_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,"two\nlines, ""quoted"""\n2\n3,\xff\n4,5,6\n\n7,"x"y\n8,9\n10,"never closed\n')
    for stream in (False, True):
        records = opened(path, stream, tmp_path / "cache")
        rows = records.read(0)
        assert rows[0] == {"id": "1", "text": 'two\nlines, "quoted"'}
        assert rows[5] == {"id": "8", "text": "9"}
        bad = {records.where(0, i): row.reason for i, row in enumerate(rows) if isinstance(row, Unreadable)}
        assert list(bad) == [f"{path}, line {line}" for line in (4, 5, 6, 8, 10)]
        assert "1 values where the header names 2" in bad[f"{path}, line 4"]
        assert "not UTF-8" in bad[f"{path}, line 5"]


def test_csv_values_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("id\tn\tempty\n007\t1e5\t\nNA\ttrue\tnull\n")
    rows = all_rows(opened(tmp_path / "a.tsv", None, tmp_path / "cache"))
    assert rows == [{"id": "007", "n": "1e5", "empty": ""}, {"id": "NA", "n": "true", "empty": "null"}]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "holds no record"),
        ("a.jsonl", b"\n\n", "holds no record"),
        ("a.json", b" [] ", "holds no record"),
        ("a.csv", b"id,text\n", "holds no record"),
        ("a.csv", b"id,id\n1,2\n", "'id' more than once"),
        ("a.json", b'[{"a": 1},\n {"a": }]', "breaks at line 2, column 8"),
        ("a.json", b'[{"a": 1}\n {"a": 2}]', "expected ','"),
        ("a.json", b'[{"a": 1}] x', "after the array"),
        ("a.parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "cannot be decompressed"),
        ("a.jsonl.gz", b"plain", "cannot be decompressed"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(b'{"a": 1}\n' * 99)[:-3], "cannot be decompressed"),
        ("a.jsonl.zst", b"plain text, not packed", "cannot be decompressed"),
        ("a.txt", b"text", "of no kind that is known"),
        ("a.parquet.gz", b"text", "of no kind that is known"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_files_that_hold_no_records(name: str, content: bytes, expected: str, stream: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        opened(tmp_path / name, stream, tmp_path / "cache")
    assert expected in str(refused.value)
    assert str(tmp_path / name) in str(refused.value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("chat.jsonl", "Did you mean 'chats.jsonl'?"),
        ("nowhere/at/all.jsonl", "There is no file"),
        ("*.parquet", "No file matches the pattern"),
        ("empty", "holds no data file"),
    ],
)
def test_missing_files(path: str, expected: str, tmp_path: Path) -> None:
    write(tmp_path / "chats.jsonl", [{"id": "1"}])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as refused:
        opened(f"{tmp_path}/{path}", None, tmp_path / "cache")
    assert expected in str(refused.value)
    assert f"{tmp_path}/{path}" in str(refused.value)
