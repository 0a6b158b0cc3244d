"""What a stage tells reaches the run directory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError

from postlude.manifest.alarms import AlarmRule
from postlude.runs import Run
from postlude.telemetry import events
from postlude.telemetry.recorder import Recorder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path / "run"))


def test_everything_reaches_the_run_directory(run: Run) -> None:
    with Recorder(run, "sft") as recorder:
        for step in (1, 2):
            recorder.metrics({"step": step, "loss": 0.1 + step})
            recorder.examples(step, 0, [(f"chats:{step}", "chats", 0.5, 3)])
        recorder.event("evaluation", step=2, name="held_out", loss=1.5)
        recorder.event("step_skipped", step=3, loss=float("nan"), grad_norm={"policy": float("inf")})
        recorder.flush()
        stage = run.stage("sft")
        assert stage.metrics.read() == [{"step": 1, "loss": 1.1}, {"step": 2, "loss": 2.1}]
        assert stage.read_examples()["example_id"].to_pylist() == ["chats:1", "chats:2"]
        written = events.read(run.events)
        assert [event.kind for event in written] == ["evaluation", "step_skipped"]
        assert {event.stage for event in written} == {"sft"}


def test_ranks_that_do_not_lead_write_losses_only(run: Run) -> None:
    with Recorder(run, "sft", rank=1) as recorder:
        recorder.metrics({"step": 1})
        recorder.event("evaluation", step=1, name="x", loss=1.0)
        recorder.examples(1, 0, [("chats:1", "chats", 0.5, 3)])
    assert run.stage("sft").metrics.read() == run.events.read() == []
    assert len(run.stage("sft").read_examples()) == 1


def test_a_stage_that_goes_back_tells_its_alarms_once(run: Run) -> None:
    rules = [AlarmRule(name="spike", metric="loss", above=5.0, quiet=2)]

    def live(*steps: int, rules: Sequence[AlarmRule] = rules) -> list[tuple[str, int | None]]:
        with Recorder(run, "sft", alarms=lambda: {0: rules}) as recorder:
            for step in steps:
                recorder.metrics({"step": step, "loss": 9.0 if step in (3, 8) else 1.0})
        return [(event["kind"], event["step"]) for event in run.events.read()]

    assert live(1, 2, 3, 4, 5, 6, rules=[]) == [], "a build without rules"
    assert live(7) == [("alarm", 3), ("alarm_over", 5)], "told of what stands there"
    told = live(8, 9, 10)
    assert told == [("alarm", 3), ("alarm_over", 5), ("alarm", 8), ("alarm_over", 10)]
    run.stage("sft").metrics.cut(lambda line: line["step"] <= 2)
    assert live(*range(3, 11)) == told


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
