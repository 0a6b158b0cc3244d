"""A run with rules for alarms, killed and taken up again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from postlude.workflow.amend import amend

PROGRAM = "import pathlib, sys; print(sys.stdin.read(), file=pathlib.Path(sys.argv[1]).open('a'))"
LATE = {"name": "late", "metric": "step", "above": 2.0}


@pytest.mark.capability("Alarms are told once, and at the same steps when a killed run comes to them again")
def test_a_killed_run_tells_an_alarm_at_its_step_once(project, tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    project.manifest["alarms"] = [LATE]
    project.manifest["notify"] = [{"command": [sys.executable, "-c", PROGRAM, str(sent)], "deadline_seconds": 60.0}]
    assert project("run", "MANIFEST").exit_code == 0
    undisturbed, lines = project.told("alarm"), project.lines()
    assert [(alarm["what"], alarm["step"], alarm["stage"]) for alarm in undisturbed] == [("late", 3, "sft")]
    project.as_if_killed(keep=2)
    assert project("run", "MANIFEST").exit_code == 0
    assert project.told("stage_started")[-1]["from_step"] == 2
    assert project.told("alarm") == undisturbed
    assert project.lines() == lines
    assert [json.loads(line)["what"] for line in sent.read_text().split("\n") if line] == ["late"]
    assert project.told("notifications_dropped") == []
    assert project("acknowledge", "RUN", "late").exit_code == 0
    (alarm,) = project("status", "RUN", "--json").json["open_alarms"]
    assert (alarm["what"], alarm["acknowledged"], alarm["over"]) == ("late", True, None)


def test_rules_may_come_to_a_run_that_was_begun_without(project) -> None:
    assert project("run", "MANIFEST").exit_code == 0
    project.as_if_killed(keep=2)
    project.manifest["alarms"] = [LATE]
    assert project("run", "MANIFEST").exit_code == 0
    assert project.told("stage_started")[-1]["from_step"] == 2
    assert [(alarm["what"], alarm["step"]) for alarm in project.told("alarm")] == [("late", 3)]


@pytest.mark.capability("Rules for alarms are amended while a stage runs, and hold from the same steps in a replay")
def test_rules_are_amended_from_a_step_on(project, after_step) -> None:
    def told() -> list[tuple[str, str, int]]:
        return [(one["kind"], one["what"], one["step"]) for one in project.events if one["kind"] in kinds]

    def amends(assignment: str) -> Callable[[], object]:
        return lambda: amend(project.run.uri, "sft", assignment)

    kinds = ("alarm", "alarm_over")
    project.stage["steps"] = 8
    project.manifest["alarms"] = [{"name": "early", "metric": "step", "above": 0.0}]
    other = "alarms=[{name: late, metric: step, above: 2, quiet: 1}, {name: early, metric: step, off: true}]"
    with after_step(3, amends(other)):
        assert project("run", "MANIFEST").exit_code == 0
    begun = [("alarm", "early", 1), ("alarm_over", "early", 4), ("alarm", "late", 4)]
    assert told() == begun
    project.as_if_killed(keep=2)
    with after_step(6, amends("alarms.0.above=9")):
        assert project("run", "MANIFEST").exit_code == 0
    assert told() == [*begun, ("alarm_over", "late", 7)]
    calm = project.lines()
    project.as_if_killed(keep=2)
    assert project("run", "MANIFEST").exit_code == 0
    assert told() == [*begun, ("alarm_over", "late", 7)]
    assert project.lines() == calm
