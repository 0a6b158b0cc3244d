"""A package beside ours brings a recipe, an objective, a format, a filter, a sink and a provider, checked as ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from postlude.cluster.providers.base import provider_of
from postlude.errors import ComputeError
from postlude.manifest.load import load
from postlude.manifest.lock import read_lock
from postlude.manifest.problem import ManifestError
from postlude.runs import Run
from postlude.workflow.run import run

SCRIPTS = ["User: What is {n} and {n}?\nGuide: It is {m}.", "User: And {n}?\nGuide: That one is {n}, friend."]


@pytest.fixture
def manifest(tmp_path: Path) -> dict:
    with (tmp_path / "scripts.jsonl").open("w") as file:
        for n in range(60):
            file.write(json.dumps({"script": SCRIPTS[n % 2].format(n=n, m=2 * n)}) + "\n")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "name": "own",
        "run_dir": str(tmp_path / "runs"),
        "data": {
            "scripts": {
                "source": {"path": str(tmp_path / "scripts.jsonl")},
                "format": {"name": "dialogue", "assistant": "Guide"},
                "filters": [{"name": "mentions", "word": "What"}],
            }
        },
        "compute": {
            "provider": {"name": "labelled", "labels": {"rack": "seven"}},
            "pools": {"train": {"workers": 2, "labels": {"rack": "seven"}}},
        },
        "sinks": [{"name": "lines", "path": str(tmp_path / "lines.txt")}],
        "stages": {
            "tune": {
                "recipe": "confident_sft",
                "loss": {"name": "confidence_penalty", "beta": 0.2},
                "model": {"new": {"architecture": "llama", "config": shape}},
                "tokenizer": {"bytes": True},
                "data": {"scripts": 1.0},
                "steps": 3,
                "batch": {"tokens": 512, "block": 256},
                "threads": 1,
            }
        },
    }


@pytest.mark.capability("Components of one's own through entry points: recipe, objective, format, filter, sink")
def test_a_run_made_of_somebody_elses_components(manifest: dict, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps(manifest))
    assert run(str(path), [], inline=True) == 0
    lines = (tmp_path / "runs/own/stages/tune/metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["entropy"] > 0 for line in lines)
    assert (tmp_path / "lines.txt").read_text().splitlines() == [f"tune {step}" for step in (1, 2, 3)]


@pytest.mark.long
@pytest.mark.capability("A provider of one's own brings the machines of a run")
@pytest.mark.capability("A kind of stage of one's own: one file and an entry point")
def test_a_run_of_somebody_elses_stages_on_somebody_elses_nodes(manifest: dict, tmp_path: Path) -> None:
    """A kind of stage, a loss akin to DPO, a provider and a sink, a file each."""
    path = tmp_path / "own.yaml"
    pairs = [{"prompt": f"{n} and {n}?", "chosen": f"It is {2 * n}.", "rejected": "No idea."} for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    manifest["data"]["pairs"] = {"source": {"path": str(tmp_path / "pairs.jsonl")}, "format": "preference"}
    keys = {"batch": {"tokens": 512, "block": 256}, "threads": 1, "steps": 2}
    loss = {"name": "exponential", "ceiling": 4.0}
    manifest["stages"] |= {
        "prefer": {"recipe": "dpo", "loss": loss, "model": {"from": "tune"}, "data": {"pairs": 1.0}, **keys},
        "count": {"recipe": "tally", "data": {"scripts": 1.0}, "words": ["What", "friend"], "threads": 1},
    }
    path.write_text(json.dumps(manifest))

    def postlude(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "postlude", "run", str(path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    refused = postlude("compute.pools.train.labels={rack: eight}")
    assert refused.returncode == 4, refused.stderr
    assert "label rack=eight" in refused.stderr
    done = postlude()
    assert done.returncode == 0, done.stderr
    own = Run(str(tmp_path / "runs/own"))
    assert [event["workers"] for event in own.events.read() if event["kind"] == "group_formed"] == [2, 2, 2]
    told = (tmp_path / "lines.txt").read_text().splitlines()
    assert sorted(told) == sorted(["tune 1", "tune 2", "tune 3", "prefer 1", "prefer 2", "count 1", "count 2"])
    (first, _) = own.stage("prefer").metrics.read()
    assert first["loss"] == pytest.approx(1.0)  # policy and reference are the same yet
    report = json.loads(Path(own.stage("count").artifact, "report.json").read_text())
    assert report["words"] == {"What": 30, "friend": 0}
    assert report["records"] == 30
    locked = read_lock(own.read_manifest_lock() or "").manifest
    assert locked["compute"]["provider"] == manifest["compute"]["provider"]
    with pytest.raises(ComputeError, match="takes no command that outlives the terminal"):
        provider_of(load(path.read_text(), "own.yaml").manifest.compute).submit(own, [])


@pytest.mark.parametrize(
    ("place", "key", "nearest"),
    [
        (("data", "scripts", "format"), "asistant", "assistant"),
        (("data", "scripts", "filters", 0), "wrod", "word"),
        (("sinks", 0), "pth", "path"),
        (("compute", "provider"), "lables", "labels"),
        (("stages", "tune", "loss"), "betta", "beta"),
        (("stages", "tune"), "lossy", "loss"),
    ],
)
def test_an_unknown_key_of_theirs_is_an_error_with_its_place(manifest: dict, place, key: str, nearest: str) -> None:
    part = manifest
    for step in place:
        part = part[step]
    part[key] = 1
    with pytest.raises(ManifestError) as error:
        load(json.dumps(manifest, indent=1), "own.yaml")
    assert key in str(error.value)
    assert nearest in str(error.value)
    assert "own.yaml:" in str(error.value)
