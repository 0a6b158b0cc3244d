"""A graph of stages: what runs and why, revisions, take-over, selection, stages side by side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from postlude import storage
from postlude.runs import Run, artifact_digest, revisions, walk

FIELDS = ("step", "loss", "lr", "grad_norm", "tokens", "trained_tokens")


@pytest.fixture
def chain(project) -> Any:
    """Five stages of one step each: b and c start from a, d from c, e from d."""
    project.stage |= {"steps": 1}
    first = {**project.stage}
    later = {key: value for key, value in first.items() if key not in ("model", "tokenizer")}
    project.manifest["stages"] = {"a": first} | {
        name: {**later, "model": {"from": need}} for name, need in (("b", "a"), ("c", "a"), ("d", "c"), ("e", "d"))
    }
    return project


def actions(project, *arguments: str) -> dict[str, str]:
    done = project("run", "MANIFEST", "--dry-run", "--json", *arguments)
    assert done.exit_code == 0, done.err
    return {stage["stage"]: stage["action"] for stage in done.json["stages"]}


def reasons(project, stage: str) -> list[str]:
    told = project("run", "MANIFEST", "--dry-run", "--json").json["stages"]
    return next(one["reasons"] for one in told if one["stage"] == stage)


def results(run: Run) -> dict[str, Any]:
    return {
        name: (
            artifact_digest(run.stage(name).artifact),
            [{field: line[field] for field in FIELDS} for line in run.stage(name).metrics.read()],
        )
        for name in "abcde"
    }


def times(run: Run) -> dict[str, int]:
    """When the weights of each stage were written."""
    return {name: Path(run.stage(name).artifact, "model.safetensors").stat().st_mtime_ns for name in "abcde"}


@pytest.mark.capability("A finished stage that was changed runs again as a new revision, with what hangs on it")
def test_a_changed_stage_and_what_hangs_on_it_run_again_and_nothing_else(chain) -> None:
    assert set(actions(chain).values()) == {"run"}
    assert not chain.run.exists(), "a dry run writes nothing"
    assert not Path(chain.manifest["run_dir"]).exists()
    assert chain("run", "MANIFEST").exit_code == 0
    assert set(actions(chain).values()) == {"keep"}
    before = times(chain.run)
    chain.manifest["stages"]["d"]["optimizer"] = {"lr": 5e-3}
    assert actions(chain) == {"a": "keep", "b": "keep", "c": "keep", "d": "run again", "e": "run again"}
    assert reasons(chain, "d") == ["stages.d.optimizer.lr: 0.01 -> 0.005"]
    assert reasons(chain, "e") == ["the input d is a new revision"]
    old = artifact_digest(chain.run.stage("d").artifact)
    assert chain("run", "MANIFEST").exit_code == 0
    assert {name for name, time in times(chain.run).items() if time != before[name]} == {"d", "e"}
    (earlier,) = revisions(chain.run, "d")
    assert artifact_digest(earlier.artifact) == old
    assert earlier.metrics.read()
    assert len(earlier.read_examples())
    storage.verify(earlier.artifact)
    assert not earlier.checkpoints()
    status = {stage["stage"]: stage for stage in chain("status", "RUN", "--json").json["stages"]}
    assert [status[name]["revision"] for name in "abcde"] == [1, 1, 1, 2, 2]
    assert status["e"]["needs"] == ["d"]
    assert set(actions(chain).values()) == {"keep"}


def test_status_draws_the_graph_and_lineage_leads_back_to_the_data(chain) -> None:
    assert chain("run", "MANIFEST").exit_code == 0
    shown = chain("status", "RUN").out
    for line in ("a ", "├─ b", "└─ c", "   └─ d", "      └─ e"):
        assert f"\n{line}" in shown
    ancestor = walk(chain.run, "e")
    names = []
    while ancestor is not None and ancestor.place is not None:
        names.append(ancestor.stage)
        assert artifact_digest(ancestor.place) == ancestor.artifact_sha256
        assert str(chain.chats) in ancestor.files["data.chats"]
        ancestor = ancestor.parents[0] if ancestor.parents else None
    assert names == ["e", "d", "c", "a"]


@pytest.mark.capability("A stage with an equal fingerprint is taken over from another run")
def test_what_another_run_finished_is_taken_over(chain) -> None:
    assert chain("run", "MANIFEST").exit_code == 0
    first = chain.run
    chain.manifest["name"] = "second"
    chain.manifest["stages"]["e"]["steps"] = 2
    assert actions(chain) == {"a": "take over", "b": "take over", "c": "take over", "d": "take over", "e": "run"}
    assert chain("run", "MANIFEST").exit_code == 0
    assert [event["run"] for event in chain.told("stage_taken_over")] == ["small"] * 4
    assert times(chain.run)["d"] == times(first)["d"]
    weights = [Path(run.stage("a").artifact, "model.safetensors") for run in (first, chain.run)]
    assert weights[0].samefile(weights[1]), "linked, not copied"
    lineage = json.loads(Path(chain.run.stage("a").artifact, "lineage.json").read_text())
    assert lineage["run"] == "small", "the lineage is that of the run that trained it"
    assert chain.run.stage("a").metrics.read() == first.stage("a").metrics.read()
    status = {stage["stage"]: stage for stage in chain("status", "RUN", "--json").json["stages"]}
    assert [status[name]["taken_over_from"] for name in "abcde"] == ["small"] * 4 + [None]
    assert set(actions(chain).values()) == {"keep"}


def test_a_stage_that_was_amended_is_not_taken_over(chain) -> None:
    chain.manifest["stages"] = {"a": {**chain.manifest["stages"]["a"], "steps": 3}}
    assert chain("run", "MANIFEST").exit_code == 0
    chain.run.stage("a").amendments.append({"id": 0, "assignment": "optimizer.lr=0.5"})
    chain.manifest["name"] = "second"
    assert actions(chain) == {"a": "take over"}, "asked for but never applied"
    Run(f"{chain.manifest['run_dir']}/small").stage("a").amendments.append({"applied": 0, "from_step": 2})
    assert actions(chain) == {"a": "run"}


def test_a_touched_file_is_the_same_and_a_changed_one_is_told(chain) -> None:
    assert chain("run", "MANIFEST").exit_code == 0
    chain.chats.touch()
    assert set(actions(chain).values()) == {"keep"}
    chain.chats.write_text(chain.chats.read_text().replace("Say 7.", "Say it."))
    assert set(actions(chain).values()) == {"run again"}
    assert reasons(chain, "a") == ["the files of data.chats changed: other content in chats.jsonl"]


def test_an_unfinished_stage_refuses_its_own_change_but_not_a_new_revision_of_its_input(chain) -> None:
    assert chain("run", "MANIFEST", "--until", "c").exit_code == 0
    stage = chain.run.stage("c")
    storage.discard(stage.artifact)
    stage.enter("interrupted")
    assert actions(chain)["c"] == "resume"
    chain.manifest["stages"]["c"]["optimizer"] = {"lr": 0.5}
    refused = chain("run", "MANIFEST")
    assert refused.exit_code == 2
    assert "stages.c.optimizer.lr: 0.01 -> 0.5" in refused.err
    chain.manifest["stages"]["c"].pop("optimizer")
    chain.manifest["stages"]["c"]["optimizer"] = {"lr": 0.01}
    chain.manifest["stages"]["a"]["optimizer"] = {"lr": 0.5}
    assert actions(chain) == {"a": "run again", "b": "run", "c": "run again", "d": "run", "e": "run"}
    assert chain("run", "MANIFEST").exit_code == 0
    assert set(actions(chain).values()) == {"keep"}


def test_selection(chain) -> None:
    assert list(actions(chain, "--until", "d")) == ["a", "c", "d"]
    assert list(actions(chain, "--stage", "d")) == ["a", "c", "d"]
    unfinished = chain("run", "MANIFEST", "--dry-run", "--from", "d")
    assert unfinished.exit_code == 2
    assert "not finished" in unfinished.err
    assert chain("run", "MANIFEST").exit_code == 0
    assert actions(chain, "--from", "c") == {"c": "run again", "d": "run again", "e": "run again"}
    assert actions(chain, "--from", "c", "--until", "d") == {"c": "run again", "d": "run again"}
    for options, said in (
        (("--from", "b", "--until", "e"), "does not hang on"),
        (("--from", "cc"), "no stage 'cc'"),
        (("--stage", "a", "--until", "b"), "stands alone"),
    ):
        wrong = chain("run", "MANIFEST", *options)
        assert wrong.exit_code == 2
        assert said in wrong.err
    expected = results(chain.run)
    assert chain("run", "MANIFEST", "--from", "c", "--until", "c").exit_code == 0
    assert actions(chain) == {"a": "keep", "b": "keep", "c": "keep", "d": "run again", "e": "run again"}
    assert chain("run", "MANIFEST").exit_code == 0
    assert results(chain.run) == expected, "the same again, bit for bit"


@pytest.mark.capability("The artifacts that a stage needs are verified before it begins")
def test_a_damaged_input_is_told_before_any_work(chain) -> None:
    assert chain("run", "MANIFEST", "--until", "c").exit_code == 0
    weights = Path(chain.run.stage("c").artifact, "model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = chain("run", "MANIFEST")
    assert done.exit_code == 1
    for said in ("'d'", "'c'", "model.safetensors", "--from c"):
        assert said in done.err
    assert not chain.run.stage("b").has_begun(), "before any work"


@pytest.mark.long
@pytest.mark.capability("Independent stages on different pools run side by side")
def test_stages_on_two_pools_overlap_and_come_out_the_same(chain, monkeypatch) -> None:
    # Each waits in its first step until the other has started: one after the other, the wait would not end well.
    alone = chain.manifest
    chain.manifest["stages"] = {name: chain.manifest["stages"][name] for name in "abc"}
    assert chain("run", "MANIFEST").exit_code == 0
    expected = {name: artifact_digest(chain.run.stage(name).artifact) for name in "abc"}
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    chain.manifest = {
        **alone,
        "run_dir": f"{alone['run_dir']}-beside",
        "plugins": ["meeting"],
        "compute": {"pools": {"train": {}, "other": {}}},
    }
    chain.manifest["stages"]["c"]["pool"] = "other"
    done = chain("run", "MANIFEST")
    assert done.exit_code == 0, done.err
    kinds = [(event["kind"], event["stage"]) for event in chain.events if event.get("stage") in ("b", "c")]
    started = [kinds.index(("stage_started", name)) for name in "bc"]
    finished = [kinds.index(("stage_finished", name)) for name in "bc"]
    assert max(started) < min(finished)
    assert {name: artifact_digest(chain.run.stage(name).artifact) for name in "abc"} == expected


@pytest.mark.long
def test_a_stage_that_fails_lets_the_other_come_to_its_end(chain) -> None:
    chain.manifest["stages"] = {name: chain.manifest["stages"][name] for name in "abc"}
    chain.manifest["compute"] = {"pools": {"train": {}, "other": {}}}
    chain.manifest["stages"]["c"] |= {"pool": "other", "optimizer": {"name": "sgd", "lr": 1e38}}
    chain.manifest["stages"]["c"] |= {"max_grad_norm": None, "max_skipped_steps": 1, "steps": 9}
    done = chain("run", "MANIFEST")
    assert done.exit_code == 1
    assert chain.run.stage("b").is_done()
    assert chain.run.stage("c").status().state == "failed"


# --- killed in the middle -----------------------------------------------------------------------------------


def tree_of(folder: str) -> dict[str, tuple[int, bytes]]:
    return {
        str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in Path(folder).rglob("*") if file.is_file()
    }


@pytest.mark.long
@pytest.mark.capability("A pipeline killed in its middle ends bitwise as the undisturbed one")
def test_a_pipeline_killed_in_its_third_stage_ends_as_the_undisturbed_one(chain) -> None:
    chain.manifest["stages"]["b"]["model"] = {"from": "a"}
    chain.manifest["stages"]["c"]["model"] = {"from": "b"}
    for stage in chain.manifest["stages"].values():
        stage |= {"steps": 30, "checkpoint": {"every": 4}}
    runs = chain.manifest["run_dir"]
    assert chain("run", "MANIFEST").exit_code == 0
    expected = results(chain.run)
    chain.manifest["run_dir"] = f"{runs}-shaken"  # of its own, so that nothing is taken over
    chain.write()
    command = [sys.executable, "-m", "postlude", "run", str(chain.path)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    third = Path(chain.run.stage("c").uri, "metrics.jsonl")
    while process.poll() is None and not (third.exists() and third.read_text().count("\n") >= 14):
        time.sleep(0.005)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not chain.run.stage("c").has_artifact()
    kept = {name: tree_of(chain.run.stage(name).uri) for name in "ab"}
    assert actions(chain) == {"a": "keep", "b": "keep", "c": "resume", "d": "run", "e": "run"}
    assert chain("run", "MANIFEST").exit_code == 0
    assert {name: tree_of(chain.run.stage(name).uri) for name in "ab"} == kept
    assert chain.told("stage_started")[-3]["from_step"] > 0
    assert results(chain.run) == expected
