"""What the commands around a run answer: preflight, preview, status, export, amendments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from postlude.manifest.errors import ManifestError, UserError
from postlude.runs import Run
from postlude.workflow.amend import amend
from postlude.workflow.models import export, generate
from postlude.workflow.preview import preview
from postlude.workflow.run import run
from postlude.workflow.status import runs, status
from postlude.workflow.validate import validate


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest whose run is done."""
    folder = tmp_path_factory.mktemp("commands")
    with (folder / "chats.jsonl").open("w") as file:
        for n in range(60):
            said = [{"role": "user", "content": f"And {n}?"}, {"role": "assistant", "content": f"{n} it is."}]
            file.write(json.dumps({"messages": said}) + "\n")
    path = folder / "whole.yaml"
    path.write_text(json.dumps(described(folder, "whole")))
    assert run(str(path), [], inline=True) == 0
    return path


def described(folder: Path, name: str) -> dict[str, Any]:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    chats = {"source": {"path": str(folder / "chats.jsonl")}, "format": "messages"}
    return {
        "name": name,
        "run_dir": str(folder / "runs"),
        "data": {"chats": chats, "held_out": {**chats, "limit": 7}},
        "stages": {
            "sft": {
                "recipe": "sft",
                "model": {"new": {"architecture": "llama", "config": shape}},
                "tokenizer": {"bytes": True},
                "data": {"chats": 1.0},
                "evaluate": {"data": {"held_out": 1.0}},
                "steps": 6,
                "batch": {"tokens": 512, "block": 256},
                "schedule": "constant",
                "threads": 1,
                "checkpoint": {"every": 2, "keep": 9},
            }
        },
    }


@pytest.mark.capability("A preflight without a GPU: data, masks, memory, one small step")
def test_a_preflight_tells_of_data_memory_and_a_step(manifest: Path) -> None:
    report = validate(str(manifest), [], sample=20, synthetic=10)
    assert report.exit_code == 0
    said = json.loads(json.dumps(report.to_json()))
    assert said["ok"]
    (stage,) = said["stages"]
    assert stage["held_out_documents"] == {"held_out": 7}
    assert stage["step"]["memory"]["peak_bytes"] > 0
    assert stage["step"]["loss"] == pytest.approx(stage["step"]["log_vocabulary"], rel=0.2)
    assert stage["synthetic"]["chats"]


@pytest.mark.capability("The packed blocks, each token marked as trained or not")
def test_a_preview_shows_what_is_trained(manifest: Path) -> None:
    said = preview(str(manifest), [], blocks=2).to_json()
    assert len(said["blocks"]) == 2
    document = said["blocks"][0]["documents"][0]
    assert set(document) == {"example_id", "source", "tokens"}
    assert set(document["tokens"][0]) == {"id", "text", "trained"}
    trained = "".join(token["text"] for token in document["tokens"] if token["trained"])
    assert trained.startswith(tuple("0123456789"))
    assert " it is." in trained


def test_status_and_runs_tell_of_a_run_that_is_done(manifest: Path) -> None:
    folder = manifest.parent / "runs"
    said = status(str(folder / "whole")).to_json()
    assert said["state"] == "done"
    assert said["stages"][0]["step"] == said["stages"][0]["last_checkpoint"] == 6
    assert "whole" in [Path(one["run"]).name for one in runs(str(folder)).to_json()["runs"]]
    with pytest.raises(UserError, match="whole"):
        status(str(folder / "whale"))


def test_an_export_is_the_artifact_and_overwrites_nothing(manifest: Path, tmp_path: Path) -> None:
    place = str(manifest.parent / "runs" / "whole" / "sft")
    out = tmp_path / "model"
    export(place, str(out))
    artifact = manifest.parent / "runs/whole/stages/sft/model"
    assert {file.name for file in out.iterdir()} == {file.name for file in artifact.iterdir()} - {"COMMITTED"}
    assert (out / "model.safetensors").read_bytes() == (artifact / "model.safetensors").read_bytes()
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["stage"] == "sft"
    assert set(lineage["data"]) == {"chats"}
    with pytest.raises(UserError, match="there already"):
        export(place, str(out))
    assert "".join(generate(str(out), "And 5?", max_tokens=4, temperature=0.0, seed=0)) is not None


@pytest.mark.capability("Recorded amendments, applied at a named step and replayed by a resume")
def test_an_amendment_holds_from_its_step_on_and_is_replayed(manifest: Path) -> None:
    folder = manifest.parent
    path = folder / "amended.yaml"
    path.write_text(json.dumps(described(folder, "amended")))
    assert run(str(path), [], inline=True) == 0
    stage = Run(str(folder / "runs" / "amended")).stage("sft")

    def rates() -> list[float]:
        return [line["lr"] for line in stage.metrics.read()]

    before = rates()
    stage.enter("interrupted")  # as if it had been killed after its second checkpoint
    stage.cut_back(4)
    with pytest.raises(ManifestError, match="may not change"):
        amend(str(folder / "runs" / "amended"), "sft", "steps=9")
    amend(str(folder / "runs" / "amended"), "sft", "optimizer.lr=0.5")
    assert run(str(path), [], inline=True) == 0
    assert rates() == [*before[:4], 0.5, 0.5]
    stage.enter("interrupted")
    stage.cut_back(2)
    assert run(str(path), [], inline=True) == 0
    assert rates() == [*before[:4], 0.5, 0.5], "the change comes at the same step again"
