"""A pipeline of many recipes, killed and changed: fine-tuning, a judge, preferences, distillation, fine-tuning."""

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
    return {decision.stage: decision.describe() for decision in dry_run(manifest, overrides, **selection).decisions}


@pytest.mark.long
@pytest.mark.capability("A killed pipeline keeps what is finished, resumes what is not, and ends bitwise undisturbed")
def test_a_pipeline_killed_in_its_third_stage_ends_as_if_undisturbed(pipeline, tmp_path):
    calm = {**pipeline, "run_dir": str(tmp_path / "calm")}
    assert run(written(tmp_path, calm), [], inline=True) == 0
    manifest, there = written(tmp_path, pipeline), opened(pipeline)
    command = [sys.executable, "-m", "postlude", "run", manifest, "--inline"]
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
    assert run(manifest, [], inline=True) == 0
    assert kept == {name: Path(there.stage(name).artifact, "lineage.json").stat().st_mtime_ns for name in STAGES[:2]}
    assert result(there) == result(opened(calm))


@pytest.mark.capability(
    "A changed stage, and what hangs on it, runs again as a new revision; --dry-run says so and why"
)
def test_a_changed_stage_and_what_hangs_on_it_run_again(pipeline, tmp_path):
    pipeline["stages"]["third"]["steps"] = 4
    manifest, there = written(tmp_path, pipeline), opened(pipeline)
    assert run(manifest, [], inline=True) == 0
    assert set(actions(manifest).values()) == {"keep"}
    before, lock = result(there), storage.read_text(there.manifest_lock)
    change = "fourth.optimizer.lr=2e-3"
    plan = dry_run(manifest, [change])
    assert [(d.stage, d.describe()) for d in plan.work] == [
        ("fourth", "run again as revision 2"),
        ("fifth", "run again as revision 2"),
    ]
    assert "stages.fourth.optimizer.lr: 0.001 -> 0.002" in plan["fourth"].reasons
    assert plan["fifth"].reasons == ["the input fourth is a new revision"]
    assert json.loads(json.dumps(plan.to_json()))["stages"][3]["action"] == "run again"
    assert storage.read_text(there.manifest_lock) == lock, "a dry run writes nothing"
    assert run(manifest, [change], inline=True) == 0
    after = result(there)
    assert [before[name] == after[name] for name in STAGES] == [True, True, True, False, False]
    aside = Path(there.uri, "revisions", "fourth", "0001")
    assert (aside / "model" / "lineage.json").exists()
    assert (aside / "metrics.jsonl").exists()
    assert set(actions(manifest, change).values()) == {"keep"}
