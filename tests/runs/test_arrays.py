"""Columns of pyarrow are read as pyarrow reads them, and nothing that reads a run imports pandas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import given
from hypothesis import strategies as st

from postlude.runs import Run, examples
from postlude.runs.arrays import joined_texts, numbers, text_scalar

KINDS: dict[Any, st.SearchStrategy[Any]] = {
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.float64(): st.floats(),
    pa.bool_(): st.booleans(),
    pa.string(): st.text(max_size=5),
}
READ = """
import sys

asked = []

class Heard:
    def find_spec(self, name, *_):
        asked.append(name)

sys.meta_path.insert(0, Heard())
from postlude.runs import Run, columns
from postlude.runs.losses import Losses
from postlude.runs.samples import Rollouts
from postlude.runs.workers import Workers

columns._FEW_BYTES = 0
stage = Run(sys.argv[1]).stage("policy")
told = columns.Columns(stage.metrics)
assert told.update() and [len(told.column(name)[0]) for name in told.names] == [20, 20, 10]
losses = Losses(stage.examples)
assert losses.update() and losses.ranked("worst", 9) and losses.ranked("forgotten", 9) == [] and losses.by_source()
assert losses.containing("a") == ["a:1"] and losses.history("a:1").losses.tolist() == [1.5]
assert Rollouts(stage.rollouts).update() is Workers(stage.readings).update() is False
assert "pyarrow.parquet" in asked and "pandas" not in asked
"""


@st.composite
def columns(draw: st.DrawFn, kinds: tuple[Any, ...] = tuple(KINDS), nulls: bool = True) -> pa.ChunkedArray:
    """A column of parts, of which each begins somewhere in its buffers."""
    kind = draw(st.sampled_from(kinds))
    value = KINDS[kind] | st.none() if nulls else KINDS[kind]
    parts = draw(st.lists(st.lists(value, max_size=9), max_size=3))
    return pa.chunked_array([pa.array(part, kind)[draw(st.integers(0, len(part))) :] for part in parts], kind)


@given(columns(tuple(KINDS)[:4]))
def test_numbers_are_those_of_the_column(column: pa.ChunkedArray) -> None:
    for each in (column, *column.chunks):
        found = numbers(each)
        expected = each.to_pylist()
        assert len(found) == len(expected)
        told = [place for place, value in enumerate(expected) if value is not None]
        assert np.array_equal(found[told], [expected[place] for place in told], equal_nan=True)


@given(columns((pa.string(),), nulls=False), st.text(max_size=2))
def test_texts_are_those_of_the_column(column: pa.ChunkedArray, text: str) -> None:
    assert [bytes(joined_texts(part)).decode() for part in column.chunks] == [
        "".join(p.to_pylist()) for p in column.chunks
    ]
    assert pc.equal(column, text_scalar(text)).to_pylist() == [value == text for value in column.to_pylist()]


def test_nothing_that_reads_a_run_imports_pandas(tmp_path: Path) -> None:
    stage = Run(str(tmp_path)).stage("policy")
    for step in range(1, 21):
        stage.metrics.append({"step": step, "loss": 0.5, "correct": step % 2 == 0, **({"odd": 1} if step % 2 else {})})
    writer = examples.ExamplesWriter(stage.examples)
    writer.write(1, 0, [("a:1", "a", 3.0, 2), ("b:2", "b", 1.0, 1)])
    writer.flush()
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
