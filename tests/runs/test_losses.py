"""The index of losses by example tells what all rows say, however the parts were merged and cut meanwhile."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postlude import storage
from postlude.runs import examples, folds
from postlude.runs.losses import Losses

Row = tuple[str, str, float, int]

row_of_a_step = st.tuples(
    st.integers(0, 9),
    st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0, math.nan, math.inf]),
    st.sampled_from([0, 1, 2, 4]),
)
steps_of_a_life = st.lists(st.lists(row_of_a_step, max_size=5), min_size=1, max_size=12)


def rows_of(drawn: Sequence[tuple[int, float, int]]) -> list[Row]:
    return [(f"{'ab'[number % 2]}:{number}", "ab"[number % 2], loss, tokens) for number, loss, tokens in drawn]


def expected(uri: str) -> dict[str, dict]:
    """Told the plain way, of all rows."""
    told: dict[str, dict] = {}
    rows = [row for row in examples.read_examples(uri).to_pylist() if row["tokens"]]
    for row in rows:
        told.setdefault(row["example_id"], {"rows": []})["rows"].append((row["step"], row["loss"] / row["tokens"]))
    for about in told.values():
        finite = [(value, step) for step, value in about["rows"] if not math.isnan(value)]
        about["best"], about["best_step"] = min(finite, default=(math.nan, None))
        about["times"] = len(about["rows"])
        about["first_step"], about["last_step"] = about["rows"][0][0], about["rows"][-1][0]
        for name, step in (("first", about["first_step"]), ("last", about["last_step"])):
            about[name] = [value for at, value in about["rows"] if at == step]
    return told


def assert_told(index: Losses, uri: str) -> None:
    told = expected(uri)
    assert len(index) == len(told)
    for example_id, about in told.items():
        one = index.example(example_id)
        assert one is not None
        assert (one.source, one.times) == (example_id[0], about["times"])
        assert (one.first_step, one.last_step) == (about["first_step"], about["last_step"])
        assert any(np.array_equal(one.first, value, equal_nan=True) for value in about["first"])
        assert any(np.array_equal(one.last, value, equal_nan=True) for value in about["last"])
        assert np.array_equal(one.best, about["best"], equal_nan=True)
        if about["best_step"] is not None:
            assert one.best_step == about["best_step"]
        history = index.history(example_id)
        assert history is not None
        measured = history.tokens > 0
        told_rows = zip(history.steps[measured].tolist(), history.losses[measured].tolist(), strict=True)
        assert sorted(map(repr, told_rows)) == sorted(map(repr, about["rows"]))
        assert (np.diff(history.steps) >= 0).all()
    for source in index.by_source():
        rows = [row for row in examples.read_examples(uri).to_pylist() if row["source"] == source.source]
        assert source.rows == len(rows)
        assert source.not_finite == sum(not math.isfinite(row["loss"]) for row in rows)
        for step, value in zip(source.steps.tolist(), source.losses.tolist(), strict=True):
            inside = [row for row in rows if step <= row["step"] < step + source.width and math.isfinite(row["loss"])]
            assert value == pytest.approx(sum(row["loss"] for row in inside) / sum(row["tokens"] for row in inside))


@settings(deadline=None, max_examples=60)
@given(lives=st.lists(steps_of_a_life, min_size=1, max_size=3), back=st.integers(0, 8), flush=st.integers(1, 4))
def test_the_index_tells_what_the_rows_say(lives: list, back: int, flush: int) -> None:
    uri = f"/dev/shm/losses-{os.getpid()}"
    storage.remove(uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "ROWS_OF_A_PART", 12)
        patch.setattr(examples, "MOST_SMALL_PARTS", 3)
        patch.setattr(folds, "CURVE_POINTS", 6)
        index, step = Losses(uri), 0
        for life in lives:
            writers = [examples.ExamplesWriter(uri, rank) for rank in range(2)]
            for drawn in life:
                step += 1
                for rank, writer in enumerate(writers):
                    writer.write(step, step // 4, rows_of(drawn[rank::2]))
                    if step % flush == 0:
                        writer.flush()
                if step % 3 == 0:
                    index.update()
            for writer in writers:
                writer.flush()
            index.update()
            assert_told(index, uri)
            step = max(0, step - back)
            examples.cut_back(uri, step)
        index.update()
        assert_told(index, uri)
    storage.remove(uri)


def write(uri: str, *steps: Sequence[Row]) -> None:
    writer = examples.ExamplesWriter(uri)
    for step, rows in enumerate(steps, 1):
        writer.write(step, 0, rows)
        writer.flush()


def test_the_worst_and_the_forgotten(place: str) -> None:
    uri = f"{place}/{uuid.uuid4().hex}"
    write(
        uri,
        [("a:learned", "a", 8.0, 2), ("a:hard", "a", 9.0, 1), ("b:kept", "b", 1.0, 1), ("b:lost", "b", math.nan, 1)],
        [("a:learned", "a", 1.0, 2), ("a:hard", "a", 8.0, 1), ("b:kept", "b", 0.5, 1)],
        [("a:learned", "a", 6.0, 2), ("a:hard", "a", 8.5, 1), ("b:kept", "b", 0.75, 1)],
    )
    index = Losses(uri)
    assert index.update()
    assert not index.update()
    assert [each.example_id for each in index.ranked("worst", 9)] == ["b:lost", "a:hard", "a:learned", "b:kept"]
    assert [each.example_id for each in index.ranked("worst", 1, first=1)] == ["a:hard"]
    assert [each.example_id for each in index.ranked("worst", 9, source="b")] == ["b:lost", "b:kept"]
    # Of the bests 0.5, 0.5 and 8 the median is 0.5: what was never learned cannot be forgotten.
    assert median([0.5, 0.5, 8.0]) == 0.5
    forgotten = index.ranked("forgotten", 9)
    assert [(each.example_id, each.best, each.last) for each in forgotten] == [
        ("a:learned", 0.5, 3.0),
        ("b:kept", 0.5, 0.75),
    ]
    assert index.containing("lear") == ["a:learned"]
    assert index.containing("nothing") == []
    assert index.example("a:nobody") is None
    assert index.history("a:nobody") is None


def test_a_damaged_part_is_told_and_the_rest_shown(tmp_path: Path) -> None:
    uri = str(tmp_path / "examples")
    write(uri, [("a:1", "a", 1.0, 1)], [("a:2", "a", 1.0, 1)])
    first = sorted(Path(uri).iterdir())[0]
    first.write_bytes(first.read_bytes()[:-20])
    index = Losses(uri)
    assert index.update()
    assert not index.update()
    assert [first.name in why for why in index.damages] == [True]
    assert [each.example_id for each in index.ranked("worst", 9)] == ["a:2"]


def test_nothing_is_no_zero(tmp_path: Path) -> None:
    index = Losses(str(tmp_path / "examples"))
    assert not index.update()
    assert len(index) == 0
    assert index.by_source() == []
    assert index.ranked("forgotten", 5) == []
