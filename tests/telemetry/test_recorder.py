"""What a stage tells reaches the run directory whatever becomes of the sinks."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from postlude.errors import UserError
from postlude.manifest.alarms import AlarmRule
from postlude.manifest.component import lookup
from postlude.runs import Run
from postlude.telemetry import events
from postlude.telemetry.recorder import Recorder
from postlude.telemetry.sinks.sink import OpenSink, Sink


class Kept(OpenSink):
    def __init__(self) -> None:
        self.lines: list[Mapping[str, Any]] = []
        self.events: list[events.Event] = []
        self.closed = False

    def metrics(self, line: Mapping[str, Any]) -> None:
        self.lines.append(line)

    def event(self, event: events.Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed = True


class Breaking(Kept):
    def metrics(self, line: Mapping[str, Any]) -> None:
        super().metrics(line)
        if line["step"] == 2:
            raise ConnectionError("the tracker is gone")


class Into(Sink):
    """A sink that leads to a given object."""

    def open(self, run_uri: str, stage: str) -> OpenSink:
        return _targets[type(self)]


class IntoBreaking(Into):
    pass


_targets: dict[type, Kept] = {}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path / "run"))


def test_everything_reaches_the_run_directory_and_the_sink(run: Run) -> None:
    kept = _targets[Into] = Kept()
    with Recorder(run, "sft", [Into()]) as recorder:
        for step in (1, 2):
            recorder.metrics({"step": step, "loss": 0.1 + step})
            recorder.examples(step, 0, [(f"chats:{step}", "chats", 0.5, 3)])
        recorder.event("evaluation", step=2, name="held_out", loss=1.5)
        recorder.event("step_skipped", step=3, loss=float("nan"), grad_norm={"policy": float("inf")})
        recorder.flush()
        stage = run.stage("sft")
        assert stage.metrics.read() == kept.lines == [{"step": 1, "loss": 1.1}, {"step": 2, "loss": 2.1}]
        assert stage.read_examples()["example_id"].to_pylist() == ["chats:1", "chats:2"]
        written = events.read(run.events)
        assert [event.kind for event in written] == ["evaluation", "step_skipped"]
        assert [repr(event) for event in written] == [repr(event) for event in kept.events]
        assert {event.stage for event in written} == {"sft"}
        assert not kept.closed
    assert kept.closed


def test_ranks_that_do_not_lead_write_losses_only(run: Run) -> None:
    _targets[Into] = Kept()
    with Recorder(run, "sft", [Into()], rank=1) as recorder:
        recorder.metrics({"step": 1})
        recorder.event("evaluation", step=1, name="x", loss=1.0)
        recorder.examples(1, 0, [("chats:1", "chats", 0.5, 3)])
    assert run.stage("sft").metrics.read() == run.events.read() == []
    assert len(run.stage("sft").read_examples()) == 1
    assert not _targets[Into].closed


@pytest.mark.capability("A failing tracker does not stop the run")
def test_a_failing_sink_is_reported_once_and_switched_off(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    kept, breaking = _targets[Into], _targets[IntoBreaking] = Kept(), Breaking()
    with Recorder(run, "sft", [IntoBreaking(), Into()]) as recorder:
        for step in (1, 2, 3, 4):
            recorder.metrics({"step": step})
    steps = [1, 2, 3, 4]
    assert [line["step"] for line in run.stage("sft").metrics.read()] == steps
    assert [line["step"] for line in kept.lines] == steps
    assert [line["step"] for line in breaking.lines] == [1, 2]
    (alarm,) = events.read(run.events)
    assert isinstance(alarm, events.Alarm)
    assert "IntoBreaking" in alarm.what
    assert "the tracker is gone" in alarm.reason
    assert kept.events == [alarm]
    told = capsys.readouterr().err
    assert told.count("Traceback") == told.count("ConnectionError: the tracker is gone") == 1


def test_a_stage_that_goes_back_tells_its_alarms_once(run: Run) -> None:
    rules = [AlarmRule(name="spike", metric="loss", above=5.0, quiet=2)]
    kept = _targets[Into] = Kept()

    def live(*steps: int, rules: Sequence[AlarmRule] = rules) -> list[tuple[str, int | None]]:
        with Recorder(run, "sft", [Into()], alarms=rules) as recorder:
            for step in steps:
                recorder.metrics({"step": step, "loss": 9.0 if step in (3, 8) else 1.0})
        return [(event["kind"], event["step"]) for event in run.events.read()]

    assert live(1, 2, 3, 4, 5, 6, rules=[]) == [], "a build without rules"
    assert live(7) == [("alarm", 3), ("alarm_over", 5)], "told of what stands there"
    told = live(8, 9, 10)
    assert told == [("alarm", 3), ("alarm_over", 5), ("alarm", 8), ("alarm_over", 10)]
    run.stage("sft").metrics.cut(lambda line: line["step"] <= 2)
    assert live(*range(3, 11)) == told
    assert [(event.kind, event.step) for event in kept.events] == told  # type: ignore[attr-defined]


def test_a_wrong_event_is_an_error_where_it_is_made(run: Run) -> None:
    with Recorder(run, "sft") as recorder:
        for kind, fields in (("evaluaton", {}), ("evaluation", {"step": 1}), ("alarm", {"what": 1, "reason": ""})):
            with pytest.raises((ValidationError, KeyError)):
                recorder.event(kind, **fields)
    assert run.events.read() == []


def test_events_from_several_threads_are_all_kept() -> None:
    run = Run("memory://threads/run")
    with Recorder(run, "sft") as recorder:
        threads = [
            threading.Thread(
                target=lambda: [recorder.event("checkpoint_saved", step=step, uri="") for step in range(50)]
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(events.read(Run(run.uri).events)) == 200


# --- TensorBoard ----------------------------------------------------------------------------------------------


def _scalars(folder: Path, name: str) -> dict[int, float]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(folder))
    reader.Reload()
    return {scalar.step: scalar.value for scalar in reader.Scalars(name)}


@pytest.mark.capability("Metrics in TensorBoard")
def test_tensorboard_shows_each_step_once_after_a_resume(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    sink = lookup("sinks", "tensorboard")()
    for steps, loss in ((range(1, 6), 4.0), (range(3, 9), 2.0)):
        with Recorder(run, "sft", [sink]) as recorder:
            for step in steps:
                recorder.metrics({"step": step, "loss": loss, "mfu": None})
            recorder.event("alarm", what="x", reason="y")
    shown = _scalars(tmp_path / "run" / "tensorboard" / "sft", "loss")
    assert shown == {1: 4.0, 2: 4.0, **dict.fromkeys(range(3, 9), 2.0)}


def test_tensorboard_wants_a_local_folder() -> None:
    sink = lookup("sinks", "tensorboard")()
    with pytest.raises(UserError, match="'folder' a local path"):
        Recorder(Run("memory://bucket/run"), "sft", [sink])
