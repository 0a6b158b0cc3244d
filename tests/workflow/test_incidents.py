"""What failed, how the run went on, and what it cost."""

from __future__ import annotations

from typing import Any

from postlude.runs.schemas import EventLine
from postlude.storage import Journal
from postlude.telemetry.events import Event, typed
from postlude.workflow.incidents import incidents


def happened(*entries: dict[str, Any]) -> list[Event]:
    """Events, one each ten seconds."""
    timed = [{"time": f"2026-01-01T00:{n // 6:02}:{n % 6}0.000+00:00", **entry} for n, entry in enumerate(entries)]
    return typed(Journal("events.jsonl", EventLine), timed)


BEGIN = {"kind": "run_started", "host": "a", "pid": 1}
STAGE = {"kind": "stage_started", "stage": "sft"}
END = {"kind": "run_finished"}


def test_a_worker_that_failed_costs_time_and_steps() -> None:
    failure = {"kind": "worker_failure", "stage": "sft", "what": "process", "reason": "killed", "rank": 1, "host": "b"}
    recovery = {"kind": "recovery", "stage": "sft", "attempt": 2, "pause_seconds": 1.0}
    told = happened(BEGIN, STAGE, failure, failure, recovery, {**STAGE, "from_step": 40}, END)
    [found] = incidents(told, lambda stage, time: 47 if (stage, time) == ("sft", told[2].time) else None)
    assert found.what == "process failure: rank 1 on b: killed"
    assert found.recovered == "the workers are started again, attempt 2; sft went on after step 40"
    assert (found.seconds, found.steps_again) == (30.0, 7)
    assert incidents(told)[0].steps_again is None
    [open_one] = incidents(told[:3])
    assert (open_one.recovered, open_one.seconds) == (None, None)


def test_a_process_that_was_killed_could_not_say_so() -> None:
    [found] = incidents(happened(BEGIN, STAGE, BEGIN, {**STAGE, "from_step": 10}, END))
    assert found.what == "the process that worked on the run ended without a word"
    assert (found.recovered, found.seconds) == ("sft went on after step 10", 20.0)
    assert incidents(happened(BEGIN, STAGE, END, BEGIN, END)) == []


def test_what_was_asked_for_or_failed_is_told_once() -> None:
    stop = {"kind": "run_interrupted", "reason": "signal 15"}
    failure = {"kind": "failure", "stage": "sft", "error": "no memory", "step": 3}
    found = incidents(happened(BEGIN, STAGE, stop, BEGIN, STAGE, failure, BEGIN, STAGE, END))
    assert [(each.what, each.recovered, each.seconds) for each in found] == [
        ("interrupted: signal 15", "sft began anew", 20.0),
        ("no memory", "sft began anew", 20.0),
    ]


def test_what_is_over_at_once() -> None:
    still = {"kind": "stood_still", "stage": "sft", "seconds": 3.5, "reason": "it slept"}
    skipped = {"kind": "step_skipped", "stage": "sft", "step": 9}
    unusable = {"kind": "checkpoint_skipped", "stage": "sft", "step": 8, "reason": "damaged"}
    engine = {"kind": "engine_died", "stage": "sft", "engine": "e", "reason": "gone"}
    found = incidents(happened(BEGIN, STAGE, still, skipped, unusable, engine, END))
    assert [each.seconds for each in found] == [3.5, None, None, None]
    assert all(each.recovered for each in found)
