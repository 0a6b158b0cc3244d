"""Alarms of a run are shown by ``status`` until they are over and a person knows of them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from postlude.errors import UserError
from postlude.manifest.load import load
from postlude.manifest.lock import dump_lock, lock
from postlude.runs import Run
from postlude.telemetry import events
from postlude.workflow.acknowledge import acknowledge
from postlude.workflow.status import status

MANIFEST = b"""
name: small
data:
  chats: {source: {path: chats.jsonl}, format: messages}
stages:
  sft: {recipe: sft, model: {path: nowhere}, data: {chats: 1.0}, steps: 4}
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(str(tmp_path / "small"))
    run.write_manifest_lock(dump_lock(lock(load(MANIFEST, "small.yaml"))))
    for name, rule in (("loss spike", "loss spike"), ("groups all alike", "groups all alike"), ("set aside", None)):
        events.record(run.events, "alarm", "sft", what=name, reason="it is so", rule=rule, step=7)
    over = {"what": "loss spike", "rule": "loss spike", "reason": "loss is 2", "step": 30}
    events.record(run.events, "alarm_over", "sft", **over)
    return run


def shown(run: Run) -> list[tuple[str, bool, bool]]:
    alarms = status(run.uri).to_json()["open_alarms"]
    return [(alarm["what"], alarm["over"] is not None, alarm["acknowledged"]) for alarm in alarms]


def test_status_shows_what_stands(run: Run) -> None:
    assert shown(run) == [("loss spike", True, False), ("groups all alike", False, False), ("set aside", False, False)]
    console = Console(file=io.StringIO(), width=200)
    console.print(status(run.uri).render())
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "alarm, sft, step 7, loss spike: it is so, over since step 30" in out
    assert "alarm, sft, step 7, groups all alike: it is so" in out


def test_what_is_acknowledged_goes_once_it_is_over(run: Run) -> None:
    assert acknowledge(run.uri, ["loss spike"]) == "acknowledged: loss spike"
    assert [what for what, *_ in shown(run)] == ["groups all alike", "set aside"]
    assert acknowledge(run.uri, []) == "acknowledged: groups all alike; set aside"
    assert shown(run) == [("groups all alike", False, True)]
    assert acknowledge(run.uri, []) == "acknowledged: none was left"
    over = {"what": "groups all alike", "rule": "groups all alike", "reason": "", "step": 90}
    events.record(run.events, "alarm_over", "sft", **over)
    assert shown(run) == []


def test_a_name_that_no_alarm_has_is_told_with_the_nearest(run: Run) -> None:
    with pytest.raises(UserError, match="'loss spike'"):
        acknowledge(run.uri, ["los spike"])
