"""Stages whose ranks hold the model together: they resume on any mesh, write what anything loads, and skip as one."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import meshes
from postlude.manifest.load import load
from postlude.runs import Run
from ranks import run_ranks

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EXACT = ("step", "epoch", "progress", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "documents")


def manifest(folder: Path, **stage) -> dict:
    texts = folder / "texts.jsonl"
    if not texts.exists():
        rows = [{"text": " ".join(f"{(n * k) % 97}" for k in range(3, 20))} for n in range(1, 80)]
        texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tune = {
        "recipe": "sft",
        "model": {"new": {"architecture": "qwen3", "config": SHAPE}},
        "tokenizer": {"bytes": True},
        "data": {"texts": 1.0},
        "steps": 6,
        "batch": {"tokens": 256, "block": 64},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 3},
        "parallel": {"shard": True},
        "threads": 1,
        **stage,
    }
    return {
        "name": "sharded",
        "run_dir": str(folder / "runs"),
        "data": {"texts": {"source": {"path": str(texts)}, "format": "text"}},
        "compute": {"pools": {"train": {"workers": 2}}},
        "stages": {"tune": tune},
    }


def work(tree: dict, run: Path, ranks: int, parallel: dict, pause: bool = False) -> list[dict]:
    """Let ranks work on the stage, and return its metrics."""
    resolved = load(json.dumps(tree), "sharded.yaml").tree
    run_ranks("meshes:work_on_stage", meshes.StageOnMesh(resolved, str(run), parallel, pause), ranks)
    return [json.loads(line) for line in (run / "stages/tune/metrics.jsonl").open()]


def exact(lines: list[dict]) -> list[dict]:
    return [{key: line[key] for key in EXACT} for line in lines]


def examples(run: Path) -> Counter:
    """Which examples were trained in which step, and how often."""
    table = Run(str(run)).stage("tune").read_examples().select(["step", "example_id"])
    return Counter(zip(*(column.to_pylist() for column in table.columns), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stage")


@pytest.fixture(scope="module")
def undisturbed(folder) -> list[dict]:
    return work(manifest(folder), folder / "whole", 2, {})


@pytest.fixture(scope="module")
def paused(folder) -> Path:
    """The same stage, left at step 3."""
    assert len(work(manifest(folder), folder / "paused", 2, {}, pause=True)) == 3
    return folder / "paused"


MESHES = {"2x1": (2, {}), "1x1": (1, {}), "1x2": (2, {"tensor": 2}), "2x2": (4, {"tensor": 2})}


@pytest.mark.long
@pytest.mark.capability("A run goes on on another mesh")
@pytest.mark.parametrize("mesh", MESHES)
def test_a_stage_saved_on_2x1_goes_on_on_every_mesh(folder, undisturbed, paused, mesh) -> None:
    ranks, parallel = MESHES[mesh]
    shutil.copytree(paused, folder / mesh)
    lines = work(manifest(folder), folder / mesh, ranks, parallel)
    if mesh == "2x1":
        assert exact(lines) == exact(undisturbed)
    for line, expected in zip(lines, undisturbed, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["update_ratio"] == pytest.approx(expected["update_ratio"], rel=1e-3)
        assert [line[key] for key in ("step", "epoch", "progress", "tokens", "trained_tokens")] == [
            expected[key] for key in ("step", "epoch", "progress", "tokens", "trained_tokens")
        ]
    assert examples(folder / mesh) == examples(folder / "whole")


@pytest.mark.capability("Models larger than one device: FSDP2 and tensor parallelism")
def test_the_artifact_of_ranks_is_that_of_one_process(folder, undisturbed) -> None:
    from transformers import AutoModelForCausalLM

    alone = work(manifest(folder), folder / "alone", 1, {})
    for line, expected in zip(alone, undisturbed, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["update_ratio"] == pytest.approx(expected["update_ratio"], rel=1e-3)
    ours, theirs = (folder / run / "stages/tune/model" for run in ("whole", "alone"))
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for name in ("config.json", "generation_config.json"):
        assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text())
    models = [AutoModelForCausalLM.from_pretrained(path, output_loading_info=True) for path in (ours, theirs)]
    for _, info in models:
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    (one, _), (other, _) = models
    for (name, weight), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.capability("Models larger than one device: FSDP2 and tensor parallelism")
def test_a_kill_while_the_artifact_is_written_leaves_none(folder, undisturbed) -> None:
    run, tree = folder / "killed", load(json.dumps(manifest(folder)), "sharded.yaml").tree
    with pytest.raises(RuntimeError, match="rank 0 died"):
        run_ranks("meshes:work_on_stage", meshes.StageOnMesh(tree, str(run), {}, dies=True), 2)
    assert list(
        run.rglob(".model.new.unfinished/config.json")
    )  # killed in the middle, under no name that is looked for
    assert not Run(str(run)).stage("tune").has_artifact()
    assert not (run / "stages/tune/model").exists()
    work(manifest(folder), run, 2, {})
    ours, theirs = (load_file(folder / name / "stages/tune/model/model.safetensors") for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.capability("fp16 with a loss scale that all ranks share")
@pytest.mark.parametrize(("ranks", "tensor"), [(2, 1), (2, 2)], ids=["2x1", "1x2"])
def test_an_overflow_on_one_rank_skips_the_step_on_all_and_halves_the_scale(tmp_path, ranks, tensor) -> None:
    meshes.write_checkpoints(tmp_path, ("llama",))
    lines = run_ranks("meshes:train_with_overflow", meshes.Overflow(str(tmp_path), "llama", 1, 3, tensor), ranks)
    assert repr(lines[0]) == repr(lines[1])  # a norm that is not a number equals nothing
    assert [line["skipped"] for line in lines[0]] == [False, False, True, False, False]
    assert [line["loss_scale"] for line in lines[0]] == [2.0**16] * 2 + [2.0**15] * 3
    assert lines[0][-1]["loss"] < lines[0][0]["loss"]
