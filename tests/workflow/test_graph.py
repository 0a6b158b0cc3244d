"""A graph of stages: what is kept, resumed, run again and taken over, over real runs of tiny models."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from postlude import storage
from postlude.manifest.errors import ManifestError, UserError
from postlude.runs import Run
from postlude.workflow.run import dry_run, run

STAGES = ("first", "second", "third", "fourth", "fifth")
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TIMED = ("seconds", "tokens_per_second", "mfu", "memory_bytes")


@pytest.fixture
def pipeline(tmp_path: Path) -> dict[str, Any]:
    """Fine-tuning, a judge, preference optimisation, distillation into a new student, and fine-tuning of that."""
    with (tmp_path / "pairs.jsonl").open("w") as pairs, (tmp_path / "chats.jsonl").open("w") as chats:
        for n in range(24):
            asked = {"role": "user", "content": f"Say {n}."}
            said = [{"role": "assistant", "content": f"{kind} {n}"} for kind in ("Gladly", "No")]
            pairs.write(json.dumps({"prompt": [asked], "chosen": said[:1], "rejected": said[1:]}) + "\n")
            chats.write(json.dumps({"messages": [asked, said[0]]}) + "\n")
    new = {"new": {"architecture": "llama", "config": SHAPE}}
    return {
        "name": "whole",
        "seed": 3,
        "run_dir": str(tmp_path / "runs"),
        "defaults": {
            "batch": {"tokens": 512, "block": 256},
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "checkpoint": {"every": 2},
            "threads": 1,
            "steps": 4,
        },
        "data": {
            "chats": {"source": {"path": str(tmp_path / "chats.jsonl")}, "format": "messages"},
            "pairs": {"source": {"path": str(tmp_path / "pairs.jsonl")}, "format": "preference"},
        },
        "stages": {
            "first": {"recipe": "sft", "model": new, "tokenizer": {"bytes": True}, "data": {"chats": 1.0}},
            "second": {"recipe": "reward", "model": {"from": "first"}, "data": {"pairs": 1.0}},
            "third": {"recipe": "dpo", "model": {"from": "second"}, "data": {"pairs": 1.0}, "steps": 40},
            "fourth": {
                "recipe": "distill",
                "model": new,
                "tokenizer": {"bytes": True},
                "teacher": {"from": "third"},
                "data": {"chats": 1.0},
            },
            "fifth": {"recipe": "sft", "model": {"from": "fourth"}, "data": {"chats": 1.0}},
        },
    }


def written(folder: Path, manifest: dict[str, Any]) -> str:
    path = folder / f"{manifest['name']}.yaml"
    path.write_text(json.dumps(manifest, indent=1))
    return str(path)


def opened(manifest: dict[str, Any]) -> Run:
    return Run(f"{manifest['run_dir']}/{manifest['name']}")


def result(run: Run) -> dict[str, Any]:
    """What must come out the same: the numbers of every step, and the digests of every weight."""
    found: dict[str, Any] = {}
    for name in STAGES:
        stage = run.stage(name)
        lines = [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in stage.metrics.read()]
        marker = storage.read_marker(stage.artifact)
        weights = {file: digest for file, digest in marker.files.items() if file.endswith(".safetensors")}
        found[name] = (lines, weights)
    return found


def actions(manifest: str, *overrides: str, **selection: Any) -> dict[str, str]:
    return {decision.stage: decision.told for decision in dry_run(manifest, overrides, **selection).decisions}


@pytest.mark.long
@pytest.mark.capability("A killed pipeline keeps what is finished, resumes what is not, and ends bitwise undisturbed")
def test_a_pipeline_killed_in_its_third_stage_ends_as_if_undisturbed(pipeline, tmp_path):
    calm = {**pipeline, "run_dir": str(tmp_path / "calm")}
    assert run(written(tmp_path, calm), []) == 0
    manifest, there = written(tmp_path, pipeline), opened(pipeline)
    command = [sys.executable, "-m", "postlude", "run", manifest]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    aim = random.Random(5).randrange(6, 20)
    while process.poll() is None and len(list(there.stage("third").metrics.read())) < aim:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {name: Path(there.stage(name).artifact, "lineage.json").stat().st_mtime_ns for name in STAGES[:2]}
    told = actions(manifest)
    assert [told[name] for name in STAGES[:2]] == ["keep", "keep"]
    assert told["third"].startswith("resume from step ")
    assert [told[name] for name in STAGES[3:]] == ["run", "run"]
    assert run(manifest, []) == 0
    assert kept == {name: Path(there.stage(name).artifact, "lineage.json").stat().st_mtime_ns for name in STAGES[:2]}
    assert result(there) == result(opened(calm))


@pytest.mark.capability(
    "A changed stage, and what hangs on it, runs again as a new revision; --dry-run says so and why"
)
def test_a_changed_stage_and_what_hangs_on_it_run_again(pipeline, tmp_path):
    pipeline["stages"]["third"]["steps"] = 4
    manifest, there = written(tmp_path, pipeline), opened(pipeline)
    assert run(manifest, []) == 0
    assert set(actions(manifest).values()) == {"keep"}
    before, lock = result(there), storage.read_text(there.manifest_lock)
    change = "fourth.optimizer.lr=2e-3"
    plan = dry_run(manifest, [change])
    assert [(d.stage, d.told) for d in plan.work] == [
        ("fourth", "run again as revision 2"),
        ("fifth", "run again as revision 2"),
    ]
    assert "stages.fourth.optimizer.lr: 0.001 -> 0.002" in plan["fourth"].reasons
    assert plan["fifth"].reasons == ["the input fourth is a new revision"]
    assert json.loads(json.dumps(plan.to_json()))["stages"][3]["action"] == "run again"
    assert storage.read_text(there.manifest_lock) == lock, "a dry run writes nothing"
    assert run(manifest, [change]) == 0
    after = result(there)
    assert [before[name] == after[name] for name in STAGES] == [True, True, True, False, False]
    aside = Path(there.uri, "revisions", "fourth", "0001")
    assert (aside / "model" / "lineage.json").exists()
    assert (aside / "metrics.jsonl").exists()
    assert set(actions(manifest, change).values()) == {"keep"}


@pytest.mark.capability("What another run finished with the same fingerprint is taken over")
def test_what_another_run_has_finished_is_taken_over(pipeline, tmp_path):
    pipeline["stages"] = {name: pipeline["stages"][name] for name in STAGES[:2]}
    assert run(written(tmp_path, pipeline), []) == 0
    other = {**pipeline, "name": "other"}
    manifest = written(tmp_path, other)
    assert actions(manifest, "second.steps=5") == {"first": "take over from whole", "second": "run"}
    assert run(manifest, ["second.steps=5"]) == 0
    one, two = (Path(opened(m).stage("first").artifact) for m in (pipeline, other))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    taken = [event for event in opened(other).events.read() if event["kind"] == "stage_taken_over"]
    assert [(event["stage"], event["run"]) for event in taken] == [("first", "whole")]


def test_a_changed_data_file_makes_what_read_it_run_again(pipeline, tmp_path):
    pipeline["stages"] = {name: pipeline["stages"][name] for name in STAGES[:2]}
    manifest = written(tmp_path, pipeline)
    assert run(manifest, []) == 0
    os.utime(tmp_path / "pairs.jsonl")
    assert set(actions(manifest).values()) == {"keep"}, "a touched file has not changed"
    text = (tmp_path / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(text.replace("Gladly", "Surely"))
    assert actions(manifest) == {"first": "keep", "second": "run again as revision 2"}


def test_a_part_of_the_graph_can_be_chosen(pipeline, tmp_path):
    pipeline["stages"]["third"]["steps"] = 4
    manifest = written(tmp_path, pipeline)
    assert run(manifest, [], until="second") == 0
    assert list(actions(manifest, until="third")) == ["first", "second", "third"]
    assert actions(manifest, until="third")["third"] == "run"
    assert actions(manifest, begin="second", until="third") == {
        "second": "run again as revision 2",
        "third": "run",
    }
    with pytest.raises(ManifestError, match="--from fifth: what it needs is not finished"):
        dry_run(manifest, [], begin="fifth")
    with pytest.raises(ManifestError, match=r"there is no stage 'fith'.*'fifth'"):
        dry_run(manifest, [], until="fith")


@pytest.mark.capability("An artifact that is not what was committed is refused before any work")
def test_a_damaged_artifact_is_named_before_work_begins(pipeline, tmp_path):
    pipeline["stages"] = {name: pipeline["stages"][name] for name in STAGES[:2]}
    manifest, there = written(tmp_path, pipeline), opened(pipeline)
    assert run(manifest, [], until="first") == 0
    weights = Path(there.stage("first").artifact, "model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"'second' needs what the stage 'first' made.*--from first") as refused:
        run(manifest, [])
    assert "model.safetensors" in str(refused.value)
    assert not there.stage("second").has_begun()


@pytest.mark.capability("Stages that do not need each other run side by side where their pools differ")
def test_independent_stages_run_side_by_side_and_come_out_the_same(pipeline, tmp_path):
    base = pipeline["stages"]["first"]
    pipeline["stages"] = {
        name: {**base, "steps": 12, "optimizer": {"lr": lr}} for name, lr in (("a", 1e-3), ("b", 2e-3))
    }
    del pipeline["data"]["pairs"]
    for name, pool in (("one", "train"), ("two", "other")):
        pipeline["name"], pipeline["run_dir"] = name, str(tmp_path / name)
        pipeline["stages"]["b"]["pool"] = pool
        assert run(written(tmp_path, pipeline), []) == 0

    def order(name: str) -> list[tuple[str, str]]:
        events = Run(str(tmp_path / name / name)).events.read()
        return [(e["kind"], e["stage"]) for e in events if e["kind"] in ("stage_started", "stage_finished")]

    assert [kind for kind, _ in order("one")] == ["stage_started", "stage_finished"] * 2
    assert [kind for kind, _ in order("two")] == ["stage_started", "stage_started", "stage_finished", "stage_finished"]
    for stage in ("a", "b"):
        one, two = (Path(Run(str(tmp_path / n / n)).stage(stage).artifact, "model.safetensors") for n in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
