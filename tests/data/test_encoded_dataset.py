"""A data set as the loader draws from it: every row in its place, and everything that is lost counted."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from postlude.data.dataset import Dataset
from postlude.data.document import Document, Unit
from postlude.data.encode import Encoded, Encoder
from postlude.data.encoded_dataset import EncodedDataset
from postlude.data.example import BadRecord
from postlude.data.loader import Loader
from postlude.data.measure import measure
from postlude.errors import DataError
from postlude.manifest.schema import DatasetConfig

PACKING = {"seed": 1, "block": 128, "window": 8}


def each_alone(documents):
    return tuple(Unit((document,)) for document in documents)


def document(example_id, length):
    return Document(example_id, "s", np.arange(length), {"weight": np.ones(length)})


class MadeUpEncoder:
    """An example is its own outcome."""

    def encode(self, examples, source):
        assert source == "s"
        return [example for _, example in examples]


def made_up(rows, on_bad_record="stop", dropped=()):
    dataset = SimpleNamespace(
        name="s", rows=len(rows), groups=[len(rows)], files=[[0]], seekable=True, dropped=dict(dropped),
        examples=lambda group, positions: [rows[position] for position in positions],
    )  # fmt: skip
    return EncodedDataset(dataset, MadeUpEncoder(), each_alone, on_bad_record), dataset


def test_rows_keep_their_places_and_what_is_lost_is_counted():
    rows = [
        [("s:0", Encoded((document("s:0", 5),)))],
        [],
        [("s:2/0", Encoded(dropped="too long")), ("s:2/1", Encoded((document("s:2/1", 3),), truncated=4))],
        [("s:3", Encoded((document("s:3", 2), document("s:3", 7))))],
        [("s:4", Encoded(dropped="too long"))],
    ]
    source, dataset = made_up(rows)
    dataset.dropped["bad record"] = SimpleNamespace(count=2, examples=[("data.jsonl, line 3", "not JSON")])
    units = source.units(0, [3, 1, 2, 4, 0])
    assert [[d.example_id for u in row for d in u.documents] for row in units] == [
        ["s:3", "s:3"], [], ["s:2/1"], [], ["s:0"],
    ]  # fmt: skip
    counted = source.statistics
    assert (counted.records, counted.read, counted.units, counted.tokens) == (5, 5, 4, 17)
    assert (counted.truncated, counted.tokens_cut) == (1, 4)
    assert (counted.dropped["too long"].count, counted.dropped["too long"].examples) == (2, ["s:2/0", "s:4"])
    assert counted.filtered["bad record"].examples == ["data.jsonl, line 3"]


def test_an_example_that_cannot_be_encoded_stops_or_is_counted():
    rows = [[("s:0", Encoded((document("s:0", 5),)))], [("s:1", Encoded(error=BadRecord("its roles are odd.")))]]
    stopping, _ = made_up(rows)
    with pytest.raises(DataError, match=r"'s:1' cannot be used: its roles are odd\. .*data\.s\.on_bad_record to skip"):
        stopping.units(0, [0, 1])
    skipping, _ = made_up(rows, "skip")
    assert [len(row) for row in skipping.units(0, [0, 1])] == [1, 0]
    assert [dropped.examples for dropped in skipping.statistics.dropped.values()] == [["s:1"]]


@pytest.fixture(scope="module")
def gsm8k(shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()[:400]
    (folder / "gsm8k.jsonl").write_text("\n".join(lines))
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen2.5")
    config = DatasetConfig.model_validate(
        {
            "source": {"path": str(folder / "gsm8k.jsonl")},
            "format": {"name": "prompt_completion", "prompt": "question", "completion": "answer"},
            "filters": ["length(question) < 300"],
            "truncate": "drop",
        }
    )

    def source():
        dataset = Dataset("gsm8k", config, str(folder / "cache"))
        encoder = Encoder(tokenizer, block=PACKING["block"], truncate="drop")
        return EncodedDataset(dataset, encoder, each_alone)

    return source, [json.loads(line) for line in lines], tokenizer


def test_real_records_are_packed_once_an_epoch_and_measured_as_packed(gsm8k):
    source, records, tokenizer = gsm8k
    read = source()
    with Loader({"gsm8k": read}, {"gsm8k": 1.0}, blocks_per_step=4, epochs=2, **PACKING) as loader:
        steps = list(loader)
    measured = measure({"gsm8k": source()}, {"gsm8k": 1.0}, **PACKING)
    fitting = []
    for record in (record for record in records if len(record["question"]) < 300):
        prompt = tokenizer(record["question"] + record["answer"])["input_ids"]
        if len(prompt) + 1 <= PACKING["block"]:
            fitting.append([*prompt, tokenizer.eos_token_id])
    assert 50 < len(fitting) < len(records)
    for epoch in (0, 1):
        packed = [d for step in steps if step.epoch == epoch for b in step.blocks for unit in b for d in unit.documents]
        assert sorted(document.tokens.tolist() for document in packed) == sorted(fitting)
        assert len({document.example_id for document in packed}) == len(packed)
    blocks = [block for step in steps if step.epoch == 0 for block in step.blocks]
    assert (measured.blocks_per_epoch, measured.tokens_per_epoch) == (len(blocks), sum(map(len, fitting)))
    counted = measured.sources["gsm8k"]
    assert counted.units == len(fitting)
    assert counted.dropped["longer than the block"].count == counted.records - len(fitting)
    assert sum(dropped.count for dropped in counted.filtered.values()) == len(records) - counted.records
    assert read.statistics.read == 2 * counted.read
