"""Records mean the same whatever carries them."""

from __future__ import annotations

import csv
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
