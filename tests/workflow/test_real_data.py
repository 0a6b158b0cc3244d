"""Whole runs on real data: a published model is fine-tuned, raw logs become a new model, a large vocabulary fits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from postlude.manifest.load import load
from postlude.runs import Run
from postlude.stages.stage import open_stage
from postlude.stages.task import StageTask
from postlude.training import checkpoint
from postlude.training.checkpoint import trained_state
from postlude.training.workers import Workers
from postlude.workflow.run import run

TEMPLATE = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + (eos_token if message.role == 'assistant' else '\\n') }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
"""


def gsm8k(shared_data: Path, split: str, **more: Any) -> dict[str, Any]:
    return {
        "source": {"path": str(shared_data / "gsm8k" / f"{split}.jsonl")},
        "format": {"name": "prompt_completion", "prompt": "question", "completion": "answer", "separator": "\n"},
        "filters": ["length(question) < 150"],
        **more,
    }


def trees(shared_data: Path, held_out: bool) -> dict[str, Any]:
    """A hundred trees of messages, of which those whose id begins with a digit below 2 are held out."""
    return {
        "source": {"path": str(shared_data / "oasst_100_trees" / "en_100_tree.jsonl")},
        "format": "tree",
        "key": "message_tree_id",
        "filters": [f"{'' if held_out else 'NOT '}message_tree_id < '2'"],
        "template": TEMPLATE,
    }


def finished(folder: Path, name: str, manifest: dict[str, Any]) -> Run:
    """Run a manifest of one stage, ``tune``, in this process."""
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"name": name, "seed": 1, "run_dir": str(folder / "runs"), **manifest}))
    assert run(str(path), [], inline=True) == 0
    return Run(str(folder / "runs" / name))


def fine_tuning(shared_data: Path, train: dict[str, Any], held_out: dict[str, Any]) -> dict[str, Any]:
    return {
        "data": {"train": train, "held_out": held_out},
        "stages": {
            "tune": {
                "recipe": "sft",
                "model": {"path": str(shared_data / "models" / "stories260K_hf")},
                "data": {"train": 1.0},
                "evaluate": {"data": {"held_out": 1.0}, "limit": 8},
                "steps": 12,
                "batch": {"tokens": 1024, "block": 512, "window": 8},
                "optimizer": {"lr": 3e-3},
                "threads": 1,
            }
        },
    }


def held_out_losses(run: Run) -> list[float]:
    lines = Path(run.uri, "events.jsonl").read_text().splitlines()
    return [event["loss"] for event in map(json.loads, lines) if event["kind"] == "evaluation"]


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.stage("tune").metrics.read()]


def logits_of_last_checkpoint(run: Run, ids: torch.Tensor) -> torch.Tensor:
    """Transformers' own forward pass with the weights of the newest checkpoint: [documents, tokens, vocabulary]."""
    manifest = Path(run.uri).parents[1] / f"{run.name}.yaml"
    opened: Any = open_stage(StageTask(load(manifest.read_text(), str(manifest)).tree, "tune", run.uri, 1), Workers())
    role = opened.models.program.roles["policy"]
    assert role.optimizer is not None
    optimizers = {"policy": role.optimizer.build(list(role.model.named_parameters()))}
    checkpoint.load(run.stage("tune").checkpoints()[0].uri, trained_state({"policy": role}, optimizers), Workers())
    with torch.no_grad(), role.model.eval().plain() as causal:
        return causal(input_ids=ids, use_cache=False).logits[..., : role.model.vocabulary]


def check_artifact(run: Run, text: str) -> None:
    """It loads as any Hugging Face model does, and computes what the last checkpoint computes."""
    artifact = run.stage("tune").artifact
    ids = AutoTokenizer.from_pretrained(artifact)(text, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(artifact).eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(logits, logits_of_last_checkpoint(run, ids))


@pytest.mark.capability("Fine-tune a published model on prompts and completions")
def test_a_published_model_learns_grade_school_mathematics(shared_data: Path, tmp_path: Path) -> None:
    train, held_out = gsm8k(shared_data, "train", limit=300), gsm8k(shared_data, "test", limit=60)
    tuned = finished(tmp_path, "gsm8k", fine_tuning(shared_data, train, held_out))
    before, after = held_out_losses(tuned)
    assert after < before - 1.0
    check_artifact(tuned, "Tom has 3 apples and buys 4 more.")


@pytest.mark.capability("Fine-tune a published model on conversations, with a chat template of one's own")
def test_a_published_model_learns_to_converse(shared_data: Path, tmp_path: Path) -> None:
    manifest = fine_tuning(shared_data, trees(shared_data, held_out=False), trees(shared_data, held_out=True))
    tuned = finished(tmp_path, "oasst", manifest)
    before, after = held_out_losses(tuned)
    assert after < before - 0.3
    check_artifact(tuned, "Once upon a time")
    assert AutoTokenizer.from_pretrained(tuned.stage("tune").artifact).chat_template == TEMPLATE


HISTORIES = """
SELECT user, list({title: title} ORDER BY time, item) AS films
FROM ratings JOIN movies USING (item)
WHERE rating >= 7
GROUP BY user
HAVING count(*) >= 5
"""


def histories(shared_data: Path) -> dict[str, Any]:
    folder = shared_data / "movietweetings_100k"
    tables = {
        "ratings": {
            "path": str(folder / "ratings.dat"),
            "delimiter": "::",
            "columns": {"user": "BIGINT", "item": "VARCHAR", "rating": "INTEGER", "time": "BIGINT"},
        },
        "movies": {
            "path": str(folder / "movies.dat"),
            "delimiter": "::",
            "quote": "",
            "columns": {"item": "VARCHAR", "title": "VARCHAR", "genres": "VARCHAR"},
        },
    }
    return {
        "source": {"query": HISTORIES, "tables": tables},
        "format": {"name": "history", "items": "films", "item": "{title}"},
        "key": "user",
    }


@pytest.mark.capability("Train a new model on the histories in raw interaction logs")
def test_a_new_model_learns_what_is_watched_next(shared_data: Path, tmp_path: Path) -> None:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    trained = finished(
        tmp_path,
        "films",
        {
            "data": {"histories": histories(shared_data)},
            "stages": {
                "tune": {
                    "recipe": "sft",
                    "model": {"new": {"architecture": "llama", "config": size}},
                    "tokenizer": {"train": {"kind": "word", "vocabulary": 2000}},
                    "data": {"histories": 1.0},
                    "epochs": 1,
                    "batch": {"tokens": 2048, "block": 512},
                    "optimizer": {"lr": 3e-3},
                    "threads": 1,
                }
            },
        },
    )
    found = losses(trained)
    assert sum(found[-5:]) / 5 < found[0] - 0.7
    # One token stands for one film, as the histories have them.
    tokenizer = AutoTokenizer.from_pretrained(trained.stage("tune").artifact)
    assert len(tokenizer) == 2000
    assert len(tokenizer("Gravity (2013)\nHer (2013)", add_special_tokens=False).input_ids) == 2
    rows = trained.stage("tune").read_examples().to_pylist()
    users = [row["example_id"] for row in rows]
    assert len(users) == len(set(users)) > 1000
    assert all(row["tokens"] >= 5 for row in rows)


MEASURED = """
import json, sys
import torch, transformers
from postlude.telemetry import hardware
base = hardware.resident_bytes()
hardware.reset_peak()
from postlude.workflow.run import run
assert run(sys.argv[1], [], inline=True) == 0
print(json.dumps({"base": base, "peak": hardware.peak_resident_bytes()}))
"""


@pytest.mark.long
@pytest.mark.capability("Train with a vocabulary of 150,000 tokens in little memory")
def test_a_large_vocabulary_trains_in_little_memory(shared_data: Path, tmp_path: Path) -> None:
    size = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    size |= {"num_key_value_heads": 2, "head_dim": 64}
    manifest = {
        "name": "wide",
        "run_dir": str(tmp_path / "runs"),
        "data": {"train": gsm8k(shared_data, "train", limit=200)},
        "stages": {
            "tune": {
                "recipe": "sft",
                "model": {"new": {"architecture": "qwen3", "config": {**size, "tie_word_embeddings": True}}},
                "tokenizer": {"path": str(shared_data / "tokenizers" / "qwen2.5")},
                "data": {"train": 1.0},
                "steps": 4,
                "batch": {"tokens": 2048, "block": 1024},
                "optimizer": {"lr": 1e-3},
                "threads": 1,
            }
        },
    }
    path = tmp_path / "wide.yaml"
    path.write_text(json.dumps(manifest))
    done = subprocess.run([sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout)
    grown = memory["peak"] - memory["base"]
    print(f"{grown / 2**20:,.0f} MiB above a base of {memory['base'] / 2**20:,.0f} MiB")
    assert grown < 1.5 * 2**30
    trained = Run(str(tmp_path / "runs" / "wide"))
    found = losses(trained)
    assert found[-1] < found[0]
    artifact = trained.stage("tune").artifact
    tokenizer, model = AutoTokenizer.from_pretrained(artifact), AutoModelForCausalLM.from_pretrained(artifact)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 151_665
