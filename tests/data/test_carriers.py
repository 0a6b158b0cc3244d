"""Records mean the same whatever carries them."""

from __future__ import annotations

import csv
import decimal
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from postlude.data.encode import Encoder
from postlude.data.example import Conversation
from postlude.data.formats.messages import Messages
from postlude.data.records import Records
from postlude.data.sources.hub import Hub
from postlude.data.sources.path import Path as PathSource
from postlude.data.sources.query import Query
from postlude.data.sources.tables import ArrowRows, write_arrow
from postlude.data.tokenizer import load_tokenizer
from postlude.manifest.schema import TokenizerFrom

CALLS = "{{ m.tool_calls | tojson if m.tool_calls }}"
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}" + CALLS + "<|im_end|>{% endfor %}"
"""The arguments of calls come out as they stand, in their order."""
TEXTS = ["3F2504E0-4F89-41D3-9A0C-0305E82C3301", "2024-01-01", "007", '"quoted"', "ü\n", "{}", "null", "1e3"]


def random_record(draw: random.Random) -> dict[str, Any]:
    def said(role: str) -> dict[str, Any]:
        return {"role": role, "content": draw.choice(TEXTS) + str(draw.randrange(99))}

    values = [draw.choice(TEXTS), draw.randrange(-9, 9), True, [draw.choice(TEXTS)], {"deep": draw.choice(TEXTS)}]
    arguments = {f"key{draw.randrange(9)}": draw.choice(values) for _ in range(draw.randrange(1, 3))}
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    calling = [{"role": "assistant", "content": "", "tool_calls": [call]}, said("tool")]
    return {"messages": [said("user"), *(calling if draw.random() < 0.5 else []), said("assistant")]}


@pytest.mark.capability("Read one record as the same conversation from JSON, Parquet, CSV, the hub or a query")
def test_random_records_are_the_same_conversations_in_every_carrier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    draw = random.Random(7)
    records = [random_record(draw) for _ in range(2000)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "hub").mkdir()
    for name in ("a.jsonl", "hub/train.jsonl"):
        (tmp_path / name).write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(records))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    texts = [json.dumps(record["messages"]) for record in records]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["messages"], *([text] for text in texts)])
    pq.write_table(pa.table({"messages": pa.array(texts).cast(pa.json_())}), tmp_path / "a.parquet")
    cache = str(tmp_path / "cache")
    names = ("a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.parquet")
    carried = {name: PathSource(path=str(tmp_path / name)).open(cache) for name in names}
    carried["hub"] = Hub(hub=str(tmp_path / "hub")).open(cache)
    carried["query"] = Query(query=f"SELECT * FROM '{tmp_path}/a.jsonl'").open(cache)
    encoder = Encoder(load_tokenizer(TokenizerFrom(bytes=True)), template=TEMPLATE, block=100_000)
    seen = {name: list(_seen(rows, encoder)) for name, rows in carried.items() if name != "query"}
    for name, conversations in seen.items():
        assert conversations == seen["a.jsonl"], name
    # A query has an order of its own; so has each column that is a struct: that of its type.
    assert sorted(_seen(carried["query"], encoder, True)) == sorted(_seen(carried["a.jsonl"], encoder, True))


def _seen(rows: Records, encoder: Encoder, sort_keys: bool = False) -> Iterator[tuple[str, bytes, bytes]]:
    """Of each record its conversation, tokens and masks."""
    for record in rows.read(0):
        (example,) = Messages().parse(record)  # type: ignore[arg-type]
        messages = json.dumps(example.messages, sort_keys=sort_keys)  # type: ignore[union-attr]
        (encoded,) = encoder.encode([("one", Conversation(json.loads(messages)))], "carried")
        (document,) = encoded.documents
        assert document.trained.any()
        yield messages, document.tokens.tobytes(), document.trained.tobytes()


CALLED: list[dict[str, Any]] = [
    {"city": "Rome", "at": {"hour": 9}},
    {"amount": 3, "to": "EUR", "at": {"day": "2024-01-01"}},
]
PROPERTIES: list[dict[str, Any]] = [{"city": {"type": "string"}}, {"amount": {"type": "integer", "minimum": 1}}]
CALLING: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"{number}?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
            {"role": "tool", "content": "done"},
            {"role": "assistant", "content": "It is."},
        ],
        "tools": [{"name": "f", "parameters": {"type": "object", "properties": properties}}],
    }
    for number, (arguments, properties) in enumerate(zip(CALLED, PROPERTIES, strict=True))
]
"""What a table of structs fills up with nulls: the keys of one function's arguments beside those of another's."""


def conversations_of(rows: Records) -> list[Any]:
    parsed = [Messages().parse(record)[0] for record in rows.read(0)]  # type: ignore[arg-type]
    return sorted(json.dumps([one.messages, one.tools], sort_keys=True) for one in parsed)  # type: ignore[union-attr]


@pytest.mark.parametrize("carrier", ["random", "stream", "query", "hub"])
def test_what_a_table_fills_up_is_absent(carrier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "hub").mkdir()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in CALLING))
    table = str(tmp_path / "hub" / "train.parquet")
    pq.write_table(pa.Table.from_pylist(CALLING), table)
    cache = str(tmp_path / "cache")
    rows = {
        "random": lambda: PathSource(path=table, stream=False).open(cache),
        "stream": lambda: PathSource(path=table, stream=True).open(cache),
        "query": lambda: Query(query=f"SELECT * FROM '{table}'").open(cache),
        "hub": lambda: Hub(hub=str(tmp_path / "hub")).open(cache),
    }[carrier]()
    assert conversations_of(rows) == conversations_of(PathSource(path=str(tmp_path / "a.jsonl")).open(cache))


@pytest.mark.parametrize("stream", [False, True])
def test_maps_and_views_are_what_they_hold(stream: bool, tmp_path: Path) -> None:
    kinds = {
        "pairs": pa.map_(pa.string(), pa.list_(pa.int64())),
        "deep": pa.map_(pa.string(), pa.struct([("x", pa.map_(pa.int64(), pa.string()))])),
        "said": pa.string_view(),
        "raw": pa.binary_view(),
        "two": pa.list_(pa.string(), 2),
        "exact": pa.decimal128(38, 0),
        "share": pa.decimal128(8, 2),
    }
    rows: list[dict[str, Any]] = [
        {
            "pairs": [("a", [1]), ("b", [])],
            "deep": [("k", {"x": [(7, "ü")]})],
            "said": "a text of more than twelve characters",
            "raw": b"\x00\xff",
            "two": ["x", "y"],
            "exact": decimal.Decimal(2**70),
            "share": decimal.Decimal("0.25"),
        },
        {},
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({name: pa.array([row.get(name) for row in rows], kinds[name]) for name in kinds}), path)
    records = PathSource(path=str(path), stream=stream).open(str(tmp_path / "cache"))
    as_json = {"pairs": {"a": [1], "b": []}, "deep": {"k": {"x": {"7": "ü"}}}, "exact": 2**70, "share": 0.25}
    assert records.read(0) == [{**rows[0], **as_json}, dict.fromkeys(kinds)]


def test_views_of_arrow_are_read_one_by_one(tmp_path: Path) -> None:
    message = pa.struct([("role", pa.string_view()), ("content", pa.string_view())])
    kinds = [
        pa.string_view(),
        pa.binary_view(),
        pa.list_view(pa.string_view()),
        pa.large_list_view(pa.int64()),
        pa.list_(message),
        pa.map_(pa.string_view(), pa.list_view(pa.string_view())),
        pa.list_(pa.string_view(), 1),
    ]
    said = {"role": "user", "content": "more than twelve characters"}
    values: list[list[Any]] = [
        ["a", None, "b" * 20],
        [b"x", b"", None],
        [["y"], [], None],
        [[1], None, [2, 3]],
        [[said], None, []],
        [[("k", ["v", None])], [], None],
        [["z"], None, ["u"]],
    ]
    arrays = [pa.array(own, kind) for own, kind in zip(values, kinds, strict=True)]
    batch = pa.record_batch(arrays, names=list("abcdefg"))
    path = str(tmp_path / "a.arrow")
    write_arrow(path, batch.schema, [batch])
    rows = [dict(zip("abcdefg", row, strict=True)) for row in zip(*values, strict=True)]
    for row in rows:
        row["f"] = None if row["f"] is None else dict(row["f"])
    assert ArrowRows(path, "a", "one").read(0, [2, 0, 1]) == [rows[2], rows[0], rows[1]]


NUMBERS: list[dict[str, Any]] = [
    {"id": 2**70, "n": [{"x": 3}], "score": 4, "said": "3F2504E0-4F89-41D3-9A0C-0305E82C3301"},
    {"id": 7, "n": [{"x": 0.5}], "score": 3.5, "said": "2024-01-01"},
    {"id": -(2**64), "n": [{"x": 2**66}, {"x": None}], "score": None, "said": "007"},
]


def test_numbers_of_json_are_the_same_in_a_query_and_in_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in NUMBERS))
    read = Query(query=f"SELECT * FROM '{path}'").open(str(tmp_path / "cache")).read(0)
    lines = PathSource(path=str(path)).open(str(tmp_path / "cache")).read(0)
    assert sorted(map(str, lines)) == sorted(str(record) for record in NUMBERS)
    floats = [{**record, "score": None if record["score"] is None else float(record["score"])} for record in NUMBERS]
    assert sorted(map(str, read)) == sorted(str(record) for record in floats)


TEXTS_OF_CSV = {
    "identifier": ["3F2504E0-4F89-41D3-9A0C-0305E82C3301", "00000000-0000-0000-0000-000000000000"],
    "day": ["2024-01-01", "2024-12-31"],
    "zeros": ["007", "42"],
    "large": ["123456789012345678901234567890123456789012345", "1"],
    "version": ["1.10", "1.9"],
    "scientific": ["1e3", "2"],
    "yes": ["True", "false"],
    "odd": [" 5", "6"],
}


@pytest.mark.capability("Read texts in CSV as texts in queries, too: identifiers, dates, leading zeros")
@pytest.mark.parametrize("named", [True, False])
def test_texts_of_csv_stay_texts_in_a_query(named: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    numbers = {"n": ["5", "-12"], "x": ["4", "3.5"], "is": ["true", "false"], "wide": [str(2**62), "0"]}
    columns = {**TEXTS_OF_CSV, **numbers}
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
    tables = {"t": str(path)} if named else {}
    table = "t" if named else f"'{path}'"
    query = Query.model_validate({"query": f"SELECT *, n + 1 AS more FROM {table}", "tables": tables})
    rows = query.open(str(tmp_path / "cache")).read(0)
    typed = {"n": [5, -12], "x": [4.0, 3.5], "is": [True, False], "wide": [2**62, 0], "more": [6, -11]}
    expected = [dict(zip(both, row, strict=True)) for both in [{**columns, **typed}] for row in zip(*both.values())]
    assert sorted(map(str, rows)) == sorted(map(str, expected))


def test_what_an_earlier_version_made_of_json_is_made_anew_and_the_rest_stays(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": {"a": 1}}\n{"x": "b"}\n')
    (tmp_path / "b.csv").write_text("x\n007\n")
    cache = tmp_path / "cache"
    for name, before, now in (("a.jsonl", '{"a":1}', [{"x": "b"}, {"x": {"a": 1}}]), ("b.csv", 7, [{"x": 7}])):
        query = Query(query=f"SELECT * FROM '{tmp_path}/{name}'")
        made = query.open(str(cache))
        schema = pa.schema([("x", pa.string() if name == "a.jsonl" else pa.int64())])
        batch = pa.record_batch([pa.array([before], schema.field("x").type)], schema=schema)
        write_arrow(str(cache / f"query-{made.fingerprint}.arrow"), schema, [batch])
        again = query.open(str(cache))
        assert again.fingerprint == made.fingerprint
        assert sorted(map(str, again.read(0))) == sorted(map(str, now))
