"""The memory plan against what processes really take, and what it advises."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

from postlude.manifest.adapter import Adapter
from postlude.manifest.compute import Shape
from postlude.model.memory import MIB, Setting, plan, what_fits

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
CONFIGURATIONS = {
    "wide": (
        {"architecture": "llama", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, **HEADS},
        {"batch": {"tokens": 2048, "block": 2048}},
    ),
    "a large vocabulary": (
        {
            "architecture": "qwen3",
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "head_dim": 32,
            "vocab_size": 100_000,
            "tie_word_embeddings": True,
            **HEADS,
        },
        {"batch": {"tokens": 1024, "block": 1024}},
    ),
    "deep": (
        {"architecture": "llama", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16, **HEADS},
        {"batch": {"tokens": 2048, "block": 2048}},
    ),
    "without state": (
        {
            "architecture": "gemma3_text",
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 128,
            "vocab_size": 30_000,
        },
        {"optimizer": {"name": "sgd"}, "batch": {"tokens": 1024, "block": 1024}},
    ),
    "experts, saved while training goes on": (
        {
            "architecture": "qwen3_moe",
            "hidden_size": 256,
            "moe_intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            **HEADS,
        },
        {"checkpoint": {"every": 1}, "batch": {"tokens": 1024, "block": 1024}},
    ),
}


def ran(*arguments: str) -> tuple[bytes, int]:
    """What a command printed, and the most memory that its process had, in bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "postlude", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, printed.decode()
    return printed, used.ru_maxrss * 1024


@pytest.mark.long
@pytest.mark.capability("A memory plan without a GPU and without weights")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_plan_is_what_a_worker_takes(tmp_path, name) -> None:
    shape, keys = CONFIGURATIONS[name]
    shape = dict(shape)
    rows = [{"text": " ".join(str(n * k % 97) for k in range(3, 60))} for n in range(1, 200)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "recipe": "sft",
        "model": {"new": {"architecture": shape.pop("architecture"), "config": shape}},
        "tokenizer": {"bytes": True},
        "data": {"texts": 1.0},
        "steps": 3,
        "threads": 1,
        **keys,
    }
    manifest = {
        "name": "weighed",
        "run_dir": str(tmp_path / "runs"),
        "data": {"texts": {"source": {"path": str(tmp_path / "texts.jsonl")}, "format": "text"}},
        "stages": {"sft": stage},
    }
    path = tmp_path / "weighed.yaml"
    path.write_text(json.dumps(manifest))
    planned = json.loads(ran("validate", str(path), "--json")[0])["stages"][0]["step"]["memory"]
    _, peak = ran("run", str(path), "--inline")
    parts = {part: size // MIB for part, size in planned.items() if part.endswith("_bytes")}
    print(f"{name}: measured {peak // MIB} MiB, planned {parts}")
    assert 0.75 * peak <= planned["peak_bytes"] <= 1.25 * peak


def config(**changes):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 1000, **HEADS}
    return AutoConfig.for_model("llama", **{**shape, **changes})


def test_less_is_kept_the_more_is_computed_again() -> None:
    kept = [plan(config(), Setting(512, kind)).activations_bytes for kind in ("none", "selective", "layer")]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 3


def test_what_is_frozen_has_no_gradient_and_no_state() -> None:
    whole = plan(config(vocab_size=1024), Setting(512))
    adapted = plan(config(vocab_size=1024), Setting(512, adapter=Adapter(rank=2)))
    assert whole.trained == whole.parameters
    assert adapted.gradients_bytes == 4 * adapted.trained < whole.gradients_bytes / 10
    assert adapted.optimizer_bytes == 8 * adapted.trained
    held = Setting(512, adapter=Adapter(rank=2), computed=torch.bfloat16, stored=torch.bfloat16)
    assert plan(config(vocab_size=1024), held).weights_bytes < 0.6 * adapted.weights_bytes


def test_ranks_share_weights_gradients_and_state() -> None:
    whole = plan(config(), Setting(512))
    shared = plan(config(), Setting(512, shape=Shape(1, 4, 1)))
    for part in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
        assert getattr(shared, part) == getattr(whole, part) // 4
    assert shared.gathered_bytes > 0
    assert plan(config(), Setting(512, shape=Shape(1, 1, 2))).activations_bytes == whole.activations_bytes // 2


def test_advice_is_what_fits() -> None:
    setting = Setting(2048)
    peak = plan(config(), setting).peak_bytes
    advice = what_fits(config(), setting, 2, int(0.8 * peak), 0)
    assert any("recompute: layer" in line for line in advice)
    assert not what_fits(config(), setting, 2, 1000, 0)
