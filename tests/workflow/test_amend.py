"""People amend at once, look before, take back, and are told why not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from postlude import storage
from postlude.runs import Run, Stage
from postlude.telemetry import events
from postlude.training.amendments import Amendments
from postlude.workflow.amend import NotAmendable, Overtaken, amend, look, preview, preview_undo, undo
from postlude.workflow.checkpoint import ask_for_checkpoint


@pytest.fixture
def stopped(project):
    """A run whose stage waits to go on."""
    assert project("run", "MANIFEST").exit_code == 0
    project.as_if_killed(keep=2)
    return project


ASKING = """\
import sys, os, time
from postlude.workflow.amend import Overtaken, amend
run, me, ready = sys.argv[1:]
open(f"{ready}/{me}", "w").close()
while len(os.listdir(ready)) < 3:
    time.sleep(0.01)
overtaken = 0
for number in range(4):
    while True:
        try:
            amend(run, "sft", f"optimizer.lr=0.{me}{number + 1}", by=me)
            break
        except Overtaken as error:
            assert "Nothing was recorded" in str(error)
            overtaken += 1
print(overtaken)
"""


@pytest.mark.capability("Of people who amend at once none overwrites another, and each is told of the others")
def test_of_processes_that_amend_at_once_nothing_is_lost(stopped, tmp_path: Path) -> None:
    """Each asks four times, again when it was overtaken: what the journal holds is every request of each, in order."""
    ready = tmp_path / "ready"
    ready.mkdir()
    command = [sys.executable, "-c", ASKING, stopped.run.uri]
    processes = [
        subprocess.Popen([*command, str(me), str(ready)], stdout=subprocess.PIPE, text=True) for me in range(1, 4)
    ]
    try:
        assert [process.wait(120) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
    requests = stopped.sft.requests().amendments
    for me in "123":
        mine = [each.assignment for each in requests.values() if each.by == me]
        assert mine == [f"optimizer.lr=0.{me}{number + 1}" for number in range(4)]
    assert list(requests) == list(range(12))
    assert {each.by for each in requests.values()} == {"1", "2", "3"}


def test_who_looked_before_is_told_of_what_came_since(stopped) -> None:
    seen = look(stopped.run.uri, "sft").seen
    amend(stopped.run.uri, "sft", "optimizer.lr=0.3", seen=seen, by="one")
    with pytest.raises(Overtaken, match=r"optimizer.lr=0.3 \(one, 20.*Nothing was recorded"):
        amend(stopped.run.uri, "sft", "max_grad_norm=2.0", seen=seen, by="two")
    assert [each.assignment for each in stopped.sft.requests().amendments.values()] == ["optimizer.lr=0.3"]


def test_in_a_bucket_too_the_first_of_one_number_holds_and_the_other_is_told(monkeypatch) -> None:
    """Two writers that have both read the journal before either wrote: the segments say who was first."""
    uri = f"memory://amendments-{os.getpid()}-{time.time_ns()}"
    first, second, trainer = (Stage(uri, "sft") for _ in range(3))
    first.amendments.append({"id": 0, "assignment": "optimizer.lr=0.1", "by": "one"}, sync=True)
    second.amendments.append({"id": 0, "assignment": "optimizer.lr=0.2", "by": "two"}, sync=True)
    at_work = Amendments(trainer)
    assert at_work.due(3) == ["optimizer.lr=0.1"]
    Stage(uri, "sft").amendments.append({"id": 1, "assignment": "optimizer.lr=0.3", "by": "two"}, sync=True)
    assert at_work.due(4) == ["optimizer.lr=0.3"]  # its answer stands in a segment before that of the request
    assert Stage(uri, "sft").applied_amendments() == [[3, "optimizer.lr=0.1"], [4, "optimizer.lr=0.3"]]
    assert Amendments(Stage(uri, "sft")).before(4) == ["optimizer.lr=0.1"]


def test_an_answer_to_what_nobody_asked_is_damage(tmp_path: Path) -> None:
    stage = Stage(str(tmp_path / "sft"), "sft")
    stage.amendments.append({"applied": 0, "from_step": 3}, sync=True)
    with pytest.raises(storage.CorruptError, match="answers the request 0, which is not there"):
        stage.requests()


def test_what_it_would_mean_is_told_before_and_recorded_after(stopped) -> None:
    told = preview(stopped.run.uri, "sft", "optimizer.lr=0.5")
    assert (told.key, told.before, told.after, told.earliest_step, told.holds) == ("optimizer.lr", 0.01, 0.5, 3, "step")
    assert not stopped.sft.requests().amendments
    shown = stopped("amend", "RUN", "sft", "optimizer.lr=0.5", "--dry-run")
    assert "0.01 -> 0.5" in shown.out
    assert stopped("amend", "RUN", "sft", "optimizer.lr=0.5", "--dry-run", "--json").json["earliest_step"] == 3
    assert not stopped.sft.requests().amendments
    amend(stopped.run.uri, "sft", "optimizer.lr=0.5")
    back = preview_undo(stopped.run.uri, "sft")
    assert (back.assignment, back.before, back.after, back.undoes) == ("optimizer.lr=0.01", 0.5, 0.01, 0)
    assert "0.5 -> 0.01" in stopped("amend", "RUN", "sft", "--undo", "0").out
    listed = stopped("amend", "RUN", "sft").out
    assert "undoes 0" in listed
    assert "max_grad_norm" in listed
    assert max(map(len, listed.splitlines())) <= 80
    again = stopped("amend", "RUN", "sft", "--undo", "0")
    assert again.exit_code == 2
    assert "undone already" in again.err
    assert stopped("amend", "RUN", "sft", "--undo", "7").exit_code == 2
    assert stopped("amend", "RUN", "sft", "optimizer.lr=1.0", "--undo", "0").exit_code == 2
    assert stopped("run", "MANIFEST").exit_code == 0
    assert [line["lr"] for line in stopped.lines()][:2] == [0.01, stopped.lines()[1]["lr"]]


def test_what_cannot_be_asked_is_told_with_the_reason(stopped, monkeypatch) -> None:
    uri = stopped.run.uri
    with pytest.raises(Exception, match="has no stage 'sgt', but: sft"):
        amend(uri, "sgt", "optimizer.lr=0.5")
    nothing = stopped("checkpoint", "RUN")
    assert nothing.exit_code == 1
    assert "sft is interrupted" in nothing.err
    with stopped.run.hold():
        started = events.record(stopped.run.events, "run_started", host="a", pid=1)
        assert started.amendments is None
        for ask in (lambda: amend(uri, "sft", "optimizer.lr=0.5"), lambda: ask_for_checkpoint(uri)):
            with pytest.raises(Exception, match="earlier version of postlude"):
                ask()
        assert "earlier version" in str(look(uri, "sft").refusal)
    assert look(uri, "sft").refusal is None
    stopped.sft.enter("done")
    with pytest.raises(NotAmendable, match="is done"):
        amend(uri, "sft", "optimizer.lr=0.5")
    with pytest.raises(Exception, match=r"has no amendment that stands. It has: none"):
        undo(uri, "sft")


def test_without_access_it_is_told_and_looking_still_works(stopped, monkeypatch) -> None:
    def refuse(self, *arguments, **keys):
        raise PermissionError(13, "Permission denied", self.uri)

    monkeypatch.setattr("postlude.storage.journal._LocalLines._lock_file", refuse)
    with pytest.raises(storage.NotWritable, match="may not be written"):
        amend(stopped.run.uri, "sft", "optimizer.lr=0.5")
    assert Run(stopped.run.uri).stage("sft").requests().amendments == {}
    assert look(stopped.run.uri, "sft").seen == 0
