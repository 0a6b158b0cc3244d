"""Columns have what the lines tell, however they are read, and a curve hides no spike."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postlude import storage
from postlude.runs import columns as module
from postlude.runs.columns import Columns, thin
from postlude.runs.schemas import MetricsLine
from postlude.storage import reader

told = st.one_of(
    st.floats(),
    st.floats(width=32),
    st.integers(-(2**60), 2**60),
    st.booleans(),
    st.none(),
    st.sampled_from(["NaN", "Infinity", "-Infinity", "a text", "1.5", "2026-01-01", [1.0], {"a": 1}]),
)
lines_of_a_run = st.lists(
    st.tuples(st.integers(1, 3), st.dictionaries(st.sampled_from(["loss", "reward", "tokens", "note"]), told)),
    max_size=30,
)


def standing(lines: list[dict]) -> list[dict]:
    """The lines that stand, told the plain way: a line takes away those at its step and behind."""
    kept: list[dict] = []
    for line in lines:
        kept = [before for before in kept if before["step"] < line["step"]]
        kept.append(line)
    return kept


def expected(lines: list[dict], name: str) -> list[tuple[int, float]]:
    numbers = [(line["step"], line.get(name)) for line in standing(lines)]
    return [(step, float(value)) for step, value in numbers if isinstance(value, int | float)]


def same(pairs: list[tuple[int, float]], others: list[tuple[int, float]]) -> bool:
    texts = [[(step, repr(value)) for step, value in each] for each in (pairs, others)]
    return texts[0] == texts[1]


@pytest.mark.parametrize("few_bytes", [0, 2**30], ids=["with pyarrow", "line by line"])
@settings(deadline=None, max_examples=80)
@given(lives=st.lists(lines_of_a_run, max_size=4), back=st.integers(0, 5), cut=st.integers(0, 40))
def test_columns_have_what_the_lines_tell(few_bytes: int, lives: list, back: int, cut: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEW_BYTES", few_bytes)
        patch.setattr(module, "BLOCK_ROWS", 8)
        patch.setattr(reader, "BLOCK_BYTES", 150)
        patch.setattr(reader, "MARK_BYTES", 100)
        journal = storage.Journal(f"/dev/shm/columns-{os.getpid()}.jsonl", MetricsLine)
        storage.remove(journal.uri)
        columns, step = Columns(journal), 0
        for number, life in enumerate(lives):
            for rise, metrics in life:
                step += rise
                journal.append({"step": step, **metrics})
            step = max(0, step - back)
            if number == 1:
                left = iter(range(cut))
                journal.cut(lambda line, left=left: next(left, None) is not None)
            columns.update()
            lines = journal.read()
            assert columns.steps.tolist() == [line["step"] for line in standing(lines)]
            for name in ("loss", "reward", "tokens", "note"):
                steps, values = columns.column(name)
                assert values.dtype == np.float64
                assert same(list(zip(steps.tolist(), values.tolist(), strict=True)), expected(lines, name))
                assert (name in columns.names) or not len(steps)
        storage.remove(journal.uri)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("no JSON", storage.CorruptError),
        ("{}", storage.CorruptError),
        ('{"step": 1.5}', storage.CorruptError),
        ('{"step": 1} {"step": 2}', storage.CorruptError),
        ('{"step": 1, "schema": 2}', storage.NewerSchema),
        ("", storage.CorruptError),
    ],
)
def test_a_line_that_cannot_be_read_is_named_in_a_long_file(tmp_path: Path, line: str, error: type) -> None:
    file = tmp_path / "metrics.jsonl"
    before = "".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(1, 5001))
    file.write_text(f"{before}{line}\n{before}")
    with pytest.raises(error, match=r"metrics\.jsonl', line 5001,"):
        Columns(storage.Journal(str(file), MetricsLine)).update()


def test_what_stands_before_a_damaged_line_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 30)
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in (1, 2, 3, 2)))
    columns = Columns(storage.Journal(str(file), MetricsLine))
    columns.update()
    with file.open("a") as more:
        more.write('{"step": 3, "loss": 7.5}\n{"step": 4, "loss": 8.5}\nno JSON\n')
    for _ in range(2):
        with pytest.raises(storage.CorruptError, match="line 7"):
            columns.update()
        assert columns.steps.tolist() == [1, 2, 3, 4]
        assert columns.column("loss")[1].tolist() == [0.5, 1.0, 7.5, 8.5]


@pytest.mark.parametrize("version", [1, 2])
def test_long_files_of_every_version_are_read_by_pyarrow(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = type("Later", (MetricsLine,), {"version": version})
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": step, **({"schema": 2} if version == 2 and step > 50 else {})} for step in range(20_000)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(storage.Journal, "entries", None)
    columns = Columns(storage.Journal(str(file), schema))
    columns.update()
    assert columns.steps.tolist() == list(range(20_000))
    assert columns.names == []


# --- curves ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 10**9), st.floats()), max_size=200),
    st.integers(1, 40),
    st.integers(0, 10**9),
    st.integers(0, 10**10),
)
def test_a_curve_has_the_extremes_of_every_pixel_column(
    points: list[tuple[int, float]], width: int, first: int, length: int
) -> None:
    steps = np.cumsum([rise for rise, _ in points], dtype=np.int64)
    values = np.array([value for _, value in points], np.float64)
    last = first + length
    curve = thin(steps, values, width, first, last)
    assert np.all(np.diff(curve.steps) > 0)
    by_column: dict[int, list[tuple[int, float]]] = {}
    for step, value in zip(steps.tolist(), values.tolist(), strict=True):
        if first <= step <= last:
            by_column.setdefault((step - first) * width // (last + 1 - first), []).append((step, value))
    drawn = dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))
    odd = curve.not_finite.tolist()
    for column in by_column.values():
        finite = {step: value for step, value in column if math.isfinite(value)}
        inside = {step: drawn.pop(step) for step, _ in column if step in drawn}
        assert inside.items() <= finite.items()
        assert len(inside) <= 2
        if finite:
            assert {min(finite.values()), max(finite.values())} == set(inside.values())
        first_odd = [step for step, value in column if not math.isfinite(value)][:1]
        assert odd[: len(first_odd)] == first_odd
        del odd[: len(first_odd)]
    assert not drawn
    assert not odd


def test_a_spike_of_one_step_is_seen_at_every_zoom(tmp_path: Path) -> None:
    file, spike = tmp_path / "metrics.jsonl", 61_803
    lines = ({"step": step, "loss": 9.0 if step == spike else 1.0} for step in range(1, 100_001))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = Columns(storage.Journal(str(file), MetricsLine))
    columns.update()
    for half in (100_000, 10_000, 500, 3):
        for width in (1, 390, 1440):
            curve = columns.curve("loss", width, max(1, spike - half), min(100_000, spike + half))
            assert curve.values.max() == 9.0
            assert curve.steps[curve.values.argmax()] == spike
            assert len(curve.values) <= 2 * width
    assert columns.curve("loss", 10).steps[0] == 1
    assert not len(columns.curve("reward", 10).steps)


def test_a_metric_that_is_never_told_has_an_empty_curve(tmp_path: Path) -> None:
    columns = Columns(storage.Journal(str(tmp_path / "metrics.jsonl"), MetricsLine))
    assert not columns.update()
    assert [len(part) for part in vars(columns.curve("loss", 10)).values()] == [0, 0, 0]
    with pytest.raises(ValueError, match="column"):
        columns.curve("loss", 0)
