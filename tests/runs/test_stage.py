"""A stage's directory through checkpoints, kills and resumes: every step stands once."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postlude import storage
from postlude.runs import Run, Stage, examples

Start = Callable[..., BaseProcess]


def _commit(stage: Stage, step: int) -> None:
    uri = stage.checkpoint_uri(step)
    storage.begin(uri)
    with storage.open_hashed(storage.join(uri, "weights")) as file:
        file.write(random.Random(step).randbytes(3000))
    storage.commit(uri, {"weights": file.digest}, {"step": step})


def _rows(step: int, rank: int = 0) -> list[tuple[str, str, float, int]]:
    """The losses that a step of the made-up training measures on a rank."""
    chance = random.Random(100 * step + rank)
    return [(f"chats:{step}-{rank}-{row}", "chats", chance.random(), row) for row in range(chance.randrange(4))]


def _expected(last_step: int, ranks: int = 1) -> list[dict]:
    names = ("example_id", "source", "loss", "tokens")
    return [
        {"step": step, "epoch": step // 10, **dict(zip(names, row, strict=True))}
        for step in range(1, last_step + 1)
        for rank in range(ranks)
        for row in _rows(step, rank)
    ]


# --- checkpoints ----------------------------------------------------------------------------------------------


def test_checkpoints_are_those_that_were_committed_newest_first(run: Run) -> None:
    stage = run.stage("sft")
    assert stage.checkpoints() == []
    for step in (5, 100, 20):
        _commit(stage, step)
    storage.write_text(storage.join(stage.checkpoint_uri(200), "weights"), "half")
    assert [checkpoint.step for checkpoint in stage.checkpoints()] == [100, 20, 5]
    assert stage.checkpoints()[0].uri.endswith("/checkpoints/step-00000100")


def test_pruning_keeps_the_newest_and_what_is_in_the_making(run: Run) -> None:
    stage = run.stage("sft")
    for step in (5, 20, 100, 120):
        _commit(stage, step)
    for step in (7, 200):
        storage.write_text(storage.join(stage.checkpoint_uri(step), "weights"), "half")
    stage.prune(2)
    assert [checkpoint.step for checkpoint in stage.checkpoints()] == [120, 100]
    assert storage.list_directory(storage.join(stage.uri, "checkpoints")) == [
        "step-00000100",
        "step-00000120",
        "step-00000200",
    ]
    stage.prune(1)
    assert [checkpoint.step for checkpoint in stage.checkpoints()] == [120]
    with pytest.raises(ValueError, match="newest"):
        stage.prune(0)


# --- losses by example ----------------------------------------------------------------------------------------


@pytest.mark.capability("Loss curves by example")
def test_losses_come_back_exactly_and_cut_at_any_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "ROWS_OF_A_PART", 2)
    stage = run.stage("sft")
    writers = [stage.examples_writer(rank) for rank in range(2)]
    for step in range(1, 31):
        for rank, writer in enumerate(writers):
            for row in _rows(step, rank):
                writer.write(step, step // 10, [row])
        if step % 8 == 0:
            for writer in writers:
                writer.flush()
    assert len(stage.read_examples()) < len(_expected(30, 2)), "nothing was held back"
    for writer in writers:
        writer.flush()
    assert stage.read_examples().to_pylist() == _expected(30, 2)
    for last in (30, 24, 13, 12, 1, 0):
        stage.cut_back(last)
        assert stage.read_examples().to_pylist() == _expected(last, 2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(0, 9)), max_size=8))
def test_any_history_of_resumes_leaves_every_step_once(history: list[tuple[int, bool, int]]) -> None:
    run = Run(f"memory://{os.urandom(4).hex()}")
    stage, done = run.stage("sft"), 0
    for steps, flushed, back in history:
        writer = stage.examples_writer()
        for step in range(done + 1, done + steps + 1):
            writer.write(step, step // 10, _rows(step))
            stage.metrics.append({"step": step, "loss": step / 3}, sync=True)
        if flushed:
            writer.flush()
            done += steps
        done = max(0, done - back)
        stage.cut_back(done)
        assert stage.read_examples().to_pylist() == _expected(done)
        assert stage.metrics.read() == [{"step": step, "loss": step / 3} for step in range(1, done + 1)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 2), st.integers(2, 5), st.integers(1, 30), st.data())
def test_merged_parts_have_the_same_rows_wherever_a_merge_or_a_cut_ends(
    flushes: int, ranks: int, most: int, rows: int, data: st.DataObject
) -> None:
    """Killed before any of its removals, each leaves what reads and is cut as before, or as after."""
    stage = Run(f"memory://{os.urandom(4).hex()}").stage("sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "MOST_SMALL_PARTS", most)
        patch.setattr(examples, "ROWS_OF_A_PART", rows)
        left = data.draw(st.integers(0, 40), label="removals before the kill")
        remove = storage.remove

        def fragile(uri: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            remove(uri)

        patch.setattr(storage, "remove", fragile)
        done = newest = 0
        try:
            for _ in range(flushes):
                writers = [stage.examples_writer(rank) for rank in range(ranks)]
                for step in (done + 1, done + 2):
                    for rank, writer in enumerate(writers):
                        writer.write(step, step // 10, _rows(step, rank))
                for writer in writers:
                    writer.flush()
                done = newest = done + 2
            last = newest = data.draw(st.integers(0, done), label="cut back to")
            stage.cut_back(last)
        except KeyboardInterrupt:
            patch.setattr(storage, "remove", remove)
            last = data.draw(st.integers(0, newest), label="gone on from")
            stage.cut_back(last)
        patch.setattr(storage, "remove", remove)
        assert stage.read_examples().to_pylist() == _expected(last, ranks)
        for writer in [stage.examples_writer(rank) for rank in range(ranks)]:
            for step in range(last + 1, last + 4):
                writer.write(step, step // 10, _rows(step, writer._rank))
            writer.flush()
        assert stage.read_examples().to_pylist() == _expected(last + 3, ranks)


def test_few_parts_are_left_of_many_and_a_cut_reads_one_of_each_rank(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = run.stage("sft")
    folder = storage.join(stage.uri, "examples")
    for rank in range(2):
        writer = stage.examples_writer(rank)
        for step in range(1, 101):
            writer.write(step, step // 10, _rows(step, rank))
            writer.flush()
    assert len(storage.list_directory(folder)) <= 2 * (examples.MOST_SMALL_PARTS + 1)
    assert stage.read_examples().to_pylist() == _expected(100, 2)
    read, reads = storage.read_bytes, []
    monkeypatch.setattr(storage, "read_bytes", lambda uri: reads.append(uri) or read(uri))
    stage.cut_back(95)
    assert len(reads) <= 2 * (examples.MOST_SMALL_PARTS + 1)


def test_the_parts_of_an_earlier_version_are_read_and_merged_by_and_by(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = run.stage("sft")
    writer = stage.examples_writer()
    with monkeypatch.context() as patch:
        patch.setattr(examples, "MOST_SMALL_PARTS", 10**6)
        for step in range(1, 201):
            writer.write(step, step // 10, _rows(step))
            writer.flush()
    folder = storage.join(stage.uri, "examples")
    before = len(storage.list_directory(folder))
    assert before > 100
    for step in range(201, 221):
        writer.write(step, step // 10, _rows(step))
        writer.flush()
    assert len(storage.list_directory(folder)) <= examples.MOST_SMALL_PARTS + 1
    assert stage.read_examples().to_pylist() == _expected(220)


def test_a_stage_without_losses_has_an_empty_table(run: Run) -> None:
    table = run.stage("sft").read_examples()
    assert isinstance(table, pa.Table)
    assert len(table) == 0


# --- kills ----------------------------------------------------------------------------------------------------


def _train(uri: str) -> None:
    """A training without a model: resume, then steps without end and a checkpoint at every fifth."""
    run = Run(uri)
    examples.MOST_SMALL_PARTS = 3
    with run.hold():
        stage = run.stage("sft")
        stage.enter("running")
        step = stage.checkpoints()[0].step if stage.checkpoints() else 0
        stage.cut_back(step)
        writer = stage.examples_writer()
        while True:
            step += 1
            stage.metrics.append({"step": step, "loss": step / 3})
            writer.write(step, step // 10, _rows(step))
            if step % 5 == 0:
                writer.flush()
                _commit(stage, step)
                stage.prune(2)


@pytest.mark.capability("A kill at any moment loses at most the work since the last checkpoint")
def test_a_run_killed_again_and_again_is_whole_after_each_resume(tmp_path: Path, start: Start) -> None:
    run = Run(str(tmp_path / "run"))
    stage = run.stage("sft")
    chance = random.Random(3)
    newest = 0
    for _ in range(12):
        trainer = start(_train, run.uri)
        until = newest + chance.randrange(2) * 5
        while not (checkpoints := stage.checkpoints()) or checkpoints[0].step < until:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.03)
        trainer.kill()
        trainer.join()
        assert stage.status().state == "interrupted"
        before, newest = newest, stage.checkpoints()[0].step
        assert newest >= before
        for checkpoint in stage.checkpoints():
            assert storage.verify(checkpoint.uri).extra["step"] == checkpoint.step
        steps = [line["step"] for line in stage.metrics.read()]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= newest
        assert stage.read_examples().to_pylist()[: len(_expected(newest))] == _expected(newest)
    stage.cut_back(newest)
    assert stage.metrics.read() == [{"step": step, "loss": step / 3} for step in range(1, newest + 1)]
    assert stage.read_examples().to_pylist() == _expected(newest)
