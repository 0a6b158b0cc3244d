"""Adapters through the recipes: chains of stages, checkpoints, DPO against the base, and the same stage on ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

import meshes
from postlude.errors import UserError
from postlude.manifest.load import load
from postlude.manifest.schema import ModelFrom
from postlude.model.load import load_causal
from postlude.workflow import models as commands
from ranks import run_ranks

pytestmark = pytest.mark.capability("Adapters: LoRA, rsLoRA, DoRA")
LORA = {"rank": 4}


def metrics(project, stage: str) -> list[dict[str, Any]]:
    return list(project.directory.stage(stage).metrics.read())


def weights(place) -> dict[str, torch.Tensor]:
    return load_causal(ModelFrom(path=str(place)), str(place), None, seed=0, dtype=torch.float32).state_dict()


def test_a_chain_of_adapters_is_trained_on_merged_and_exported(project, tmp_path) -> None:
    train = project.train
    project.stages |= {
        "first": train(data={"asked": 1.0}, adapter=LORA, optimizer={"lr": 1e-2}, checkpoint={"every": 1}),
        "on": train(data={"asked": 1.0}, model={"from": "first"}, adapter={"continue": True}, optimizer={"lr": 1e-2}),
        "whole": train(data={"asked": 1.0}, model={"from": "on"}, optimizer={"lr": 1e-9}, max_grad_norm=1e-9),
        "top": train(data={"asked": 1.0}, model={"from": "first"}, adapter={"rank": 2}, optimizer={"lr": 1e-2}),
        "said": project.generate(model={"from": "on"}),
    }
    assert project.run() == 0
    for stage in ("first", "on", "top"):
        assert {path.suffix for path in project.artifact(stage).glob("*.safetensors")} == {".safetensors"}
        assert [path.name for path in project.artifact(stage).glob("*.safetensors")] == ["adapter_model.safetensors"]
    lineage = json.loads((project.artifact("on") / "lineage.json").read_text())
    assert lineage["base"]["place"] == project.models["one"]
    # What is whole began with the adapter merged, and hardly moved.
    merged = weights(project.artifact("on"))
    for name, tensor in weights(project.artifact("whole")).items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(tensor, weights(project.models["one"])[name]) for name, tensor in merged.items())

    checkpoint = project.directory.stage("first").checkpoints()[0].uri
    held = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    kept = [name for name in held if name.startswith("policy.model.")]
    assert kept
    assert all(".lora_" in name for name in kept)

    name = f"{project.directory.uri}/on"
    commands.export(name, str(tmp_path / "peft"))
    targets = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)  # PEFT's own order differs from process to process
    assert len(targets) > 3
    commands.export(name, str(tmp_path / "merged"), merge=True)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for key, tensor in merged.items():
        assert torch.equal(exported[key], tensor), key
    with pytest.raises(UserError, match="Export it with --merge"):
        commands.export(f"{project.directory.uri}/top", str(tmp_path / "top"))
    commands.export(f"{project.directory.uri}/top", str(tmp_path / "top"), merge=True)
    assert commands.verify(str(project.artifact("on"))).same


def prefer(project) -> None:
    """Let the project have pairs of answers, and nothing else."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n}?"}],
            "chosen": [{"role": "assistant", "content": f"yes {n}"}],
            "rejected": [{"role": "assistant", "content": f"no {n * n}"}],
        }
        for n in range(12)
    ]
    project.data.clear()
    project.data["pairs"] = project.written("pairs", rows, "preference")


def test_the_reference_of_an_adapted_policy_is_its_base(project) -> None:
    prefer(project)
    stage = project.train(recipe="dpo", data={"pairs": 1.0}, adapter=LORA, optimizer={"lr": 1e-2}, steps=4)
    shutil.copytree(project.models["one"], project.folder / "copy")
    project.stages |= {"off": stage, "apart": {**stage, "reference": {"path": str(project.folder / "copy")}}}
    assert project.run() == 0
    lines = metrics(project, "off")
    for line, expected in zip(lines, metrics(project, "apart"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_scoring_head_is_trained_beside_an_adapter(project) -> None:
    prefer(project)
    project.stages["judge"] = project.train(
        recipe="reward", data={"pairs": 1.0}, adapter=LORA, optimizer={"lr": 1e-2}, steps=4
    )
    assert project.run() == 0
    names = {path.name for path in project.artifact("judge").glob("*.safetensors")}
    assert names == {"adapter_model.safetensors", "scalar_head.safetensors"}
    lines = metrics(project, "judge")
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.long
def test_an_adapter_on_a_packed_base_resumes_bitwise_and_is_one_of_the_base_itself(project, tmp_path) -> None:
    prefer(project)
    keys = {"recipe": "dpo", "data": {"pairs": 1.0}, "optimizer": {"lr": 1e-2}, "steps": 4, "checkpoint": {"every": 2}}
    project.stages["tune"] = project.train(adapter={**LORA, "base": "nf4"}, **keys)
    tree = load(Path(project.write()).read_text(), "small.yaml").tree
    for run, pauses in (("calm", [False]), ("paused", [True, False])):
        for pause in pauses:
            run_ranks("meshes:work_on_stage", meshes.StageOnMesh(tree, str(tmp_path / run), {}, pause), 1)
    calm, paused = (
        [json.loads(line) for line in (tmp_path / run / "stages/tune/metrics.jsonl").open()]
        for run in ("calm", "paused")
    )
    exact = ("loss", "grad_norm", "step", "tokens")
    assert [[line[key] for key in exact] for line in paused] == [[line[key] for key in exact] for line in calm]
    assert calm[-1]["loss"] < calm[0]["loss"]
    adapter = tmp_path / "calm/stages/tune/model"
    assert [path.name for path in adapter.glob("*.safetensors")] == ["adapter_model.safetensors"]
    base, merged = weights(project.models["one"]), weights(adapter)
    assert merged.keys() == base.keys()
    assert torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["sft", "dpo", "reward"])
def test_ranks_that_share_a_model_adapt_it_as_one_and_resume_bitwise(project, recipe, tmp_path) -> None:
    if recipe != "sft":
        prefer(project)
    data = {"asked": 1.0} if recipe == "sft" else {"pairs": 1.0}
    keys = {"adapter": LORA, "optimizer": {"lr": 1e-2}, "steps": 4, "checkpoint": {"every": 2}}
    project.stages["tune"] = project.train(recipe=recipe, data=data, parallel={"shard": True}, **keys)
    tree = load(Path(project.write()).read_text(), "small.yaml").tree

    def worked(run: str, ranks: int, parallel: dict[str, Any], pause: bool = False) -> list[dict[str, Any]]:
        task = meshes.StageOnMesh(tree, str(tmp_path / run), parallel, pause)
        run_ranks("meshes:work_on_stage", task, ranks)
        return [json.loads(line) for line in (tmp_path / run / "stages/tune/metrics.jsonl").open()]

    exact = ("loss", "grad_norm", "step", "tokens")
    alone, sharded = worked("alone", 1, {}), worked("sharded", 2, {})
    assert len(worked("paused", 2, {}, pause=True)) == 2
    again, divided = worked("paused", 2, {}), worked("divided", 2, {"tensor": 2})
    assert [[line[key] for key in exact] for line in again] == [[line[key] for key in exact] for line in sharded]
    for lines in (sharded, divided):
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in alone], rel=1e-5)
    for run in ("sharded", "divided"):
        ours, theirs = (tmp_path / one / "stages/tune/model" for one in (run, "alone"))
        assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
