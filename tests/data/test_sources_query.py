"""The source ``query``: SQL over raw files, made once."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from postlude.data.records import Records
from postlude.data.sources.query import Query
from postlude.errors import DataError

HISTORIES = """
SELECT user, list({title: title, rating: rating} ORDER BY time, item) AS items, count(*) AS films
FROM ratings JOIN movies USING (item)
WHERE rating >= 7
GROUP BY user
HAVING count(*) >= 5
"""


def movie_tables(folder: Path) -> dict[str, Any]:
    return {
        "ratings": {
            "path": str(folder / "ratings.dat"),
            "delimiter": "::",
            "columns": {"user": "BIGINT", "item": "VARCHAR", "rating": "INTEGER", "time": "BIGINT"},
        },
        "movies": {
            "path": str(folder / "movies.dat"),
            "delimiter": "::",
            "quote": "",
            "columns": {"item": "VARCHAR", "title": "VARCHAR", "genres": "VARCHAR"},
        },
    }


def run(cache: Path, query: str, **tables: Any) -> Records:
    return Query.model_validate({"query": query, "tables": tables}).open(str(cache))


@pytest.mark.capability("Turn raw interaction logs into one history a user with a SQL query in the manifest")
def test_raw_logs_become_histories(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "movietweetings_100k"
    titles = {}
    for line in (folder / "movies.dat").read_text().splitlines():
        item, title, _ = line.split("::")
        titles[item] = title
    events = defaultdict(list)
    for line in (folder / "ratings.dat").read_text().splitlines():
        user, item, rating, time = line.split("::")
        if int(rating) >= 7 and item in titles:
            events[int(user)].append((int(time), item, {"title": titles[item], "rating": int(rating)}))
    expected = {
        user: [item for _, _, item in sorted(films, key=lambda film: film[:2])]
        for user, films in events.items()
        if len(films) >= 5
    }
    records = run(tmp_path, HISTORIES, **movie_tables(folder))
    rows: list[Any] = records.read(0)
    assert [row["user"] for row in rows] == sorted(expected)
    assert {row["user"]: row["items"] for row in rows} == expected
    assert all(row["films"] == len(row["items"]) for row in rows)
    assert records.where(0, 3) == "the query's result, row 4"


def test_the_result_has_one_order_whatever_the_query_gives(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": a, "b": [a % 3, None]} for a in range(4000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for order in ("a", "a DESC", "hash(a)"):
        query = f"SELECT b, a FROM '{tmp_path}/*.parquet' ORDER BY {order}; -- at the end"
        records = run(tmp_path / order, query)
        assert records.read(0) == sorted(({"b": r["b"], "a": r["a"]} for r in rows), key=lambda r: (r["b"][0], r["a"]))
        assert (records.groups, records.seekable) == ([4000], True)
        assert pickle.loads(pickle.dumps(records)).read(0, [3999, 5]) == records.read(0, [3999, 5])


def test_it_is_made_once_and_again_when_a_file_or_the_query_changes(tmp_path: Path) -> None:
    (tmp_path / "named.csv").write_text("x\n1\n")
    (tmp_path / "direct.csv").write_text("x\n1\n")

    def result(more: str = "") -> tuple[Any, str]:
        query = f"SELECT n.x + d.x AS x FROM n, read_csv('{tmp_path}/direct.csv') AS d {more}"
        records = run(tmp_path / "cache", query, n=str(tmp_path / "named.csv"))
        return records.read(0), records.fingerprint

    first = result()
    assert first[0] == [{"x": 2}]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.arrow")}
    assert result() == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.arrow")} == made
    for name in ("named.csv", "direct.csv"):
        before = result()
        (tmp_path / name).write_text("x\n10\n")
        assert result()[0] != before[0]
        assert result()[1] != before[1]
    assert result("WHERE true")[1] != result()[1]


def _open(folder: Path) -> int:
    return run(folder / "cache", "SELECT sum(range) AS s, range % 7 AS k FROM range(2000000) GROUP BY k").rows


def test_of_several_processes_one_makes_it(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_open, [tmp_path] * 2) == [7, 7]
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1
    assert not list((tmp_path / "cache").glob("*.unfinished"))


def test_tables_of_every_form_local_and_remote(tmp_path: Path) -> None:
    import gzip

    import fsspec

    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps([{"x": 2, "rest": [1]}]))
    (tmp_path / "c.log").write_text('2026-01-01|"a|b"|3\n')
    fsspec.filesystem("memory").pipe_file("/postlude-query/d.csv.gz", gzip.compress(b"x;y\n4;5\n"))
    records = run(
        tmp_path / "cache",
        "SELECT x FROM a UNION ALL FROM (SELECT x FROM b) UNION ALL SELECT x FROM c UNION ALL SELECT x FROM d",
        a={"path": [str(tmp_path / "a.parquet")]},
        b={"path": str(tmp_path / "b.json"), "columns": {"x": "INTEGER"}},
        c={
            "path": str(tmp_path / "*.log"),
            "delimiter": "|",
            "quote": '"',
            "columns": {"day": "DATE", "who": "VARCHAR", "x": "INTEGER"},
        },
        d={"path": "memory://postlude-query/d.csv.gz", "delimiter": ";", "header": True},
    )
    assert records.read(0) == [{"x": 1}, {"x": 2}, {"x": 3}, {"x": 4}]


@pytest.mark.parametrize(
    ("query", "tables", "expected"),
    [
        ("SELECT 1 AS a\nFROM range(3)\nWHERE", {}, 'syntax error at or near "WHERE" (line 3)'),
        ("SELECT\n  foo\nFROM t", {}, "LINE 2"),
        ("SELECT * FROM nowhere", {}, "nowhere"),
        ("SELECT 1; SELECT 2", {}, "one SELECT; it holds 2 statements"),
        ("", {}, "one SELECT; it holds 0 statements"),
        ("DELETE FROM t", {}, "Only SELECT"),
        ("SELECT x FROM t WHERE x > 5", {}, "gives no row"),
        ("SELECT CAST(y AS INTEGER) AS y FROM t", {}, "Could not convert"),
        ("SELECT * FROM 's3://bucket/a.csv'", {}, "under 'tables'"),
        ("SELECT * FROM m", {"m": "{folder}/missing.csv"}, "There is no file"),
        ("SELECT * FROM m", {"m": {"path": "{folder}/t.csv", "columns": {"x": "NOTHING"}}}, "The table 'm'"),
        ("SELECT * FROM m", {"m": {"path": "{folder}/t.json", "delimiter": ";"}}, "no use for the key delimiter"),
    ],
)
def test_queries_that_cannot_be_run(query: str, tables: dict[str, Any], expected: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x,y\n1,a\n")
    (tmp_path / "t.json").write_text('{"x": 1}\n')
    located = json.loads(json.dumps({"t": str(tmp_path / "t.csv"), **tables}).replace("{folder}", str(tmp_path)))
    with pytest.raises(DataError) as refused:
        run(tmp_path / "cache", query, **located)
    assert expected in str(refused.value)


def test_keys_of_a_table_are_checked() -> None:
    with pytest.raises(ValidationError, match="delimeter"):
        Query.model_validate({"query": "SELECT 1", "tables": {"t": {"path": "a.csv", "delimeter": ";"}}})
