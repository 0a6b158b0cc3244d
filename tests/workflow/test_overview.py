"""A folder of runs at a glance: what is there, what cannot be told, and what two manifests do not share."""

from __future__ import annotations

from pathlib import Path

import pytest

from dashboard.conftest import make_steps, new_run
from postlude.runs import Run
from postlude.storage import Journal, NotFound
from postlude.telemetry import events
from postlude.workflow.overview import Overview


def test_a_run_at_a_glance(tmp_path: Path) -> None:
    run = new_run(tmp_path, "one")
    overview = Overview(str(tmp_path))
    brief = overview.brief("one")
    assert brief is not None
    assert (brief.state, brief.states, brief.stage, brief.loss) == (
        "pending",
        {"sft": "pending", "more": "pending"},
        None,
        None,
    )
    with run.hold():
        run.stage("sft").enter("running")
        make_steps(run, range(1, 101))
        events.record(run.events, "alarm", "sft", what="it", reason="so", step=3)
        brief = overview.brief("one")
    assert brief is not None
    assert (brief.state, brief.stage, brief.step, brief.progress) == ("running", "sft", 100, 0.25)
    assert (brief.loss, brief.alarms, brief.checkpoint, brief.trouble) == (0.05, 1, None, None)
    assert brief.changed_at is not None


def test_a_folder_is_told_as_it_is(tmp_path: Path) -> None:
    assert Overview(str(tmp_path)).names() == []
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").write_text("")
    new_run(tmp_path, "Alpha")
    new_run(tmp_path, "<b>beta")
    overview = Overview(str(tmp_path))
    assert overview.names() == ["<b>beta", "Alpha"]
    assert overview.names("ALPH") == ["Alpha"]
    assert overview.names("none") == []
    assert overview.brief("gone") is None
    with pytest.raises(NotFound, match="no folder"):
        Overview(str(tmp_path / "nowhere")).names()


def test_a_damaged_or_newer_run_is_told_beside_the_others(tmp_path: Path) -> None:
    for name in ("sound", "damaged", "newer"):
        new_run(tmp_path, name)
    Path(Run(str(tmp_path / "damaged")).manifest_lock).write_text("hash: x\n")
    Journal(Run(str(tmp_path / "newer")).events.uri).append({"time": "", "kind": "alarm", "schema": 99})
    briefs = {name: Overview(str(tmp_path)).brief(name) for name in ("sound", "damaged", "newer")}
    assert {name: brief.state for name, brief in briefs.items() if brief} == {
        "sound": "pending", "damaged": "damaged", "newer": "newer"
    }  # fmt: skip
    assert all((brief.trouble is None) == (name == "sound") for name, brief in briefs.items() if brief)


def test_the_difference_of_two_manifests(tmp_path: Path) -> None:
    one, other = new_run(tmp_path, "one", lr=1e-4), new_run(tmp_path, "other", lr=3e-4)
    overview = Overview(str(tmp_path))
    assert overview.differences(one, other) == ["stages.sft.optimizer.lr: 0.0001 -> 0.0003"]
    assert overview.differences(one, one) == []
    new_run(tmp_path, "one", lr=3e-4)  # a manifest that has changed since is read anew
    assert overview.differences(one, other) == []
