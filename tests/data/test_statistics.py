"""Statistics: the counts of a pass, and a measurement that tells what the loader will then do."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from postlude.data.document import Document, Unit
from postlude.data.loader import Loader
from postlude.data.measure import measure
from postlude.data.statistics import SHOWN, Dropped, SourceStatistics
from postlude.errors import DataError

PACKING = {"seed": 3, "block": 64, "window": 4}


def lengths(rows, seed=0, dropped=0.1):
    """So many rows of skewed lengths, some dropped and some of two units."""
    random = np.random.default_rng(seed)
    drawn = np.clip(random.lognormal(2.3, 0.8, (rows, 2)).astype(int), 1, 64).tolist()
    kinds = random.random(rows)
    return [() if kind < dropped else tuple(pair) if kind > 0.9 else (pair[0],) for kind, pair in zip(kinds, drawn)]


def one_epoch(sources, weights):
    with Loader(sources, weights, blocks_per_step=4, epochs=1, **PACKING) as loader:
        return [block for step in loader for block in step.blocks]


def tell(statistics):
    console = Console(width=200)
    with console.capture() as captured:
        for table in statistics.tables():
            console.print(table)
    return captured.get()


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_lengths_are_summed_up_as_numpy_does(values):
    counted = SourceStatistics("s", len(values))
    for i, value in enumerate(values):
        counted.add([Unit((Document(f"s:{i}", "s", np.zeros(value, int), {"weight": np.ones(value)}),))])
    assert counted.units == len(values)
    assert counted.tokens == sum(values)
    assert counted.mean_tokens == pytest.approx(np.mean(values))
    assert counted.trained_tokens == sum(values) - len(values)  # never the first of a document
    for percent in (1, 5, 50, 90, 99, 100):
        assert counted.percentile(percent) == np.percentile(values, percent, method="inverted_cdf")
    bins = counted.histogram()
    assert [units for _, _, units in bins] == [sum(a <= value <= b for value in values) for a, b, _ in bins]
    assert sum(units for _, _, units in bins) == len(values)
    assert all(b + 1 == a for (_, b, _), (a, _, _) in pairwise(bins))


def test_what_is_dropped_is_counted_with_the_first_ids():
    counted = SourceStatistics("s", 9)
    for i in range(7):
        counted.drop("too long", f"s:{i}")
    counted.drop("nothing to train on", "s:7")
    assert counted.dropped["too long"] == Dropped(7, [f"s:{i}" for i in range(SHOWN)])
    assert str(counted.dropped["nothing to train on"]) == "1, such as s:7"


def test_an_empty_count_is_told_without_fail():
    counted = SourceStatistics("s", 3)
    assert counted.to_json()["lengths"] == {
        "mean": 0.0, "p5": 0, "p50": 0, "p90": 0, "p99": 0, "longest": 0, "histogram": []
    }  # fmt: skip
    assert (counted.trained_share, counted.truncated_share) == (0.0, 0.0)


@pytest.mark.capability("Statistics of the data before training: lengths, trained share, drops, packing fill")
def test_a_whole_measurement_is_what_the_loader_then_does(made_up_source):
    weights = {"large": 2.0, "small": 1.0}
    rows = {"large": [lengths(900), lengths(700, 1)], "small": [lengths(100, 2)]}

    def sources():
        return {name: made_up_source(name, groups, seekable=False) for name, groups in rows.items()}

    measured = measure(read := sources(), weights, **PACKING)
    blocks = one_epoch(sources(), weights)
    tokens = sum(len(unit) for block in blocks for unit in block)
    assert not measured.sampled
    assert measured.blocks_per_epoch == len(blocks)
    assert measured.tokens_per_epoch == tokens
    assert measured.fill == tokens / (len(blocks) * 64)
    assert measured.repeats == {"large": pytest.approx(1.0), "small": pytest.approx(8.0)}
    for name, groups in rows.items():
        counted = measured.sources[name]
        assert sorted(read[name].reads) == [(g, row) for g, group in enumerate(groups) for row in range(len(group))]
        assert counted.lengths == Counter(length for group in groups for row in group for length in row)
        assert counted.dropped["made up to be dropped"].count == sum(not row for group in groups for row in group)
        assert counted.read == counted.records == sum(map(len, groups))
        assert counted.trained_tokens == sum(length // 2 for group in groups for row in group for length in row)


def test_a_sample_comes_near(made_up_source):
    weights = {"large": 2.0, "small": 1.0}
    rows = {"large": [lengths(12_000)], "small": [lengths(50, 99)]}
    whole = measure({n: made_up_source(n, g) for n, g in rows.items()}, weights, **PACKING)
    part = {"large": [rows["large"][0][::10]], "small": rows["small"]}
    sources = {name: made_up_source(name, groups) for name, groups in part.items()}
    sampled = measure(sources, weights, **PACKING, rows={"large": 12_000})
    assert sampled.sampled
    assert {name: source.read for name, source in sampled.sources.items()} == {"large": 1200, "small": 50}
    assert sampled.records_per_epoch == whole.records_per_epoch
    assert sampled.repeats == whole.repeats
    assert sampled.tokens_per_epoch == pytest.approx(whole.tokens_per_epoch, rel=0.1)
    assert sampled.blocks_per_epoch == pytest.approx(whole.blocks_per_epoch, rel=0.1)
    assert sampled.fill == pytest.approx(whole.fill, abs=0.04)


def test_nothing_to_train_on_is_an_error_here_too(made_up_source):
    with pytest.raises(DataError, match="dropped as made up to be dropped"):
        measure({"a": made_up_source("a", [[()] * 9])}, {"a": 1.0}, **PACKING)


def test_json_and_tables_tell_the_same(made_up_source):
    source = made_up_source("[chats]", [lengths(500)])
    source.statistics.truncated, source.statistics.tokens_cut = 5, 1234
    source.statistics.filtered["len(messages) > 1"] = Dropped(3, ["[chats]:a"])
    measured = measure({"[chats]": source}, {"[chats]": 1.0}, **PACKING)
    told = json.loads(json.dumps(measured.to_json()))
    chats = told["sources"]["[chats]"]
    assert chats["records"] == chats["read"] == 500
    assert chats["filtered"] == {"len(messages) > 1": {"count": 3, "examples": ["[chats]:a"]}}
    assert chats["dropped"]["made up to be dropped"]["examples"][0].startswith("[chats]:0-")
    assert chats["passes_per_epoch"] == 1.0
    assert told["packing"]["fill"] == measured.fill
    text = tell(measured)
    for said in (
        "[chats]",
        f"{chats['tokens']:,}",
        f"{chats['trained_share']:.1%}",
        "(-1,234)",
        f"{measured.fill:.2%}",
        "3 records",
        "len(messages) > 1",
        f"{chats['dropped']['made up to be dropped']['count']} examples",
        "blocks of 64",
    ):
        assert said in text
