"""A run tells truly what state its stages are in, and is found by what a user types."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from postlude import runs, storage
from postlude.errors import UserError
from postlude.runs import Run

Start = Callable[..., BaseProcess]


def _finish(run: Run, name: str) -> None:
    stage = run.stage(name)
    stage.enter("running")
    with stage.write_artifact() as folder:
        storage.write_text(storage.join(folder, "config.json"), "{}")
    stage.enter("done")


def test_a_run_begins_with_its_manifest_lock(place: str) -> None:
    run = Run(f"{place}/new")
    assert not run.exists()
    assert run.read_manifest_lock() is None
    assert run.stages() == []
    assert run.stage("sft").status() == runs.Status()
    run.write_manifest_lock("name: new\n")
    assert run.read_manifest_lock() == "name: new\n"
    assert [found.name for found in runs.list_runs(place)] == ["new"]


def test_a_stage_is_interrupted_when_nobody_holds_its_run(run: Run) -> None:
    stage = run.stage("sft")
    with run.hold():
        stage.enter("running", fingerprint="abc")
        assert stage.status().state == "running"
        assert run.holder() is not None
    status = stage.status()
    assert status.state == "interrupted"
    assert status.details == {"fingerprint": "abc"}
    stage.enter("failed", reason="diverged")
    assert stage.status().state == "failed"
    assert stage.status().begun_at == status.begun_at
    with pytest.raises(ValueError, match="no state"):
        stage.enter("finished")  # type: ignore[arg-type]


def _work(uri: str, told: Connection) -> None:
    run = Run(uri)
    with run.hold():
        run.stage("sft").enter("running")
        told.send("running")
        time.sleep(600)


@pytest.mark.capability("A killed run shows as interrupted")
def test_a_killed_run_shows_as_interrupted(tmp_path: Path, start: Start) -> None:
    run = Run(str(tmp_path / "run"))
    here, there = multiprocessing.Pipe()
    worker = start(_work, run.uri, there)
    assert here.recv() == "running"
    assert run.stage("sft").status().state == "running"
    with pytest.raises(storage.LockedError, match=f"process {worker.pid}"):
        run.hold()
    worker.kill()
    worker.join()
    assert run.stage("sft").status().state == "interrupted"
    run.hold().release()


def test_stages_come_in_the_order_in_which_they_began(run: Run) -> None:
    for name in ("sft", "judge", "dpo"):
        run.stage(name).enter("running")
        time.sleep(0.002)
    run.stage("sft").enter("done")
    assert [stage.name for stage in run.stages()] == ["sft", "judge", "dpo"]


def test_events_are_kept_in_order(run: Run) -> None:
    for number in range(3):
        run.events.append({"kind": "x", "time": "now", "number": number}, sync=True)
    assert [event["number"] for event in Run(run.uri).events.read()] == [0, 1, 2]


def test_a_cleared_stage_has_not_begun(run: Run) -> None:
    _finish(run, "sft")
    stage = run.stage("sft")
    stage.metrics.append({"step": 1}, sync=True)
    storage.begin(stage.checkpoint_uri(1))
    storage.commit(stage.checkpoint_uri(1), {})
    stage.clear()
    assert stage.status() == runs.Status()
    assert (stage.checkpoints(), stage.metrics.read(), stage.has_artifact()) == ([], [], False)
    assert run.stages() == []


# --- finding --------------------------------------------------------------------------------------------------


def test_a_stage_is_found_by_run_and_name(run: Run) -> None:
    _finish(run, "sft")
    time.sleep(0.002)
    run.stage("dpo").enter("running")
    for typed in (f"{run.uri}/sft", f"{run.uri}/sft/", f"{run.uri}/stages/sft", run.uri, f"{run.uri}/"):
        stage = runs.find(typed)
        assert (stage.name, stage.uri) == ("sft", run.stage("sft").uri)
        assert runs.artifact_of(typed) == stage.artifact
    _finish(run, "dpo")
    assert runs.find(run.uri).name == "dpo"


def test_what_is_no_run_is_left_to_others(place: str) -> None:
    assert runs.artifact_of("Qwen/Qwen3-0.6B") is None
    assert runs.artifact_of(f"{place}/some/model") is None


def test_a_wrong_name_gets_the_nearest(run: Run, place: str) -> None:
    with pytest.raises(UserError, match=r"No stage of the run .* has begun"):
        runs.find(run.uri)
    run.stage("sft").enter("running")
    with pytest.raises(UserError, match=r"no stage 'stf' that has begun. Did you mean 'sft'\?"):
        runs.find(f"{run.uri}/stf")
    with pytest.raises(UserError, match="There is the stage 'sft'"):
        runs.find(f"{run.uri}/rlhf")
    with pytest.raises(UserError, match=r"not a run directory.*Did you mean 'assistant'\?"):
        runs.open_run(f"{place}/asistant")


def test_a_stage_without_an_artifact_says_so(run: Run) -> None:
    run.stage("sft").enter("failed")
    with pytest.raises(UserError, match="has no model yet: it is failed"):
        runs.artifact_of(f"{run.uri}/sft")


def test_the_cache_of_a_run_is_local(run: Run) -> None:
    assert storage.is_local(run.cache)
    assert Run(run.uri).cache == run.cache
    assert Run(run.uri + "2").cache != run.cache
