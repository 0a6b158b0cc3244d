"""The recipe distill: its first step against TRL's loss over each conversation alone, its runs, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from postlude import storage
from postlude.data.tokenizer import load_tokenizer
from postlude.manifest.load import load
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import TokenizerFrom
from postlude.manifest.starter import starter
from postlude.runs import Run
from postlude.stages.stage import open_stage
from postlude.stages.task import StageTask
from postlude.training.workers import Workers
from postlude.workflow.run import run
from postlude.workflow.validate import validate

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LARGER = {**SHAPE, "hidden_size": 24, "num_hidden_layers": 2}


@pytest.fixture
def manifest(tmp_path: Path) -> dict[str, Any]:
    """A teacher of its own and a student, in a second or two."""
    with (tmp_path / "chats.jsonl").open("w") as file:
        for n in range(24):
            said = [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n * 7}."}]
            file.write(json.dumps({"messages": said}) + "\n")
    shared = {"tokenizer": {"bytes": True}, "data": {"chats": 1.0}, "threads": 1, "schedule": "constant"}
    batch = {"tokens": 2048, "block": 256}
    return {
        "name": "whole",
        "run_dir": str(tmp_path / "runs"),
        "data": {"chats": {"source": {"path": str(tmp_path / "chats.jsonl")}, "format": "messages"}},
        "stages": {
            "teacher": {
                **shared,
                "recipe": "sft",
                "model": {"new": {"architecture": "llama", "config": LARGER}},
                "batch": {"tokens": 512, "block": 256},
                "optimizer": {"lr": 1e-2},
                "steps": 20,
            },
            "student": {
                **shared,
                "recipe": "distill",
                "model": {"new": {"architecture": "llama", "config": SHAPE}},
                "teacher": {"from": "teacher"},
                "evaluate": {"data": {"chats": 1.0}},
                "batch": batch,
                "optimizer": {"lr": 1e-2},
                "steps": 8,
            },
        },
    }


def start(manifest: dict[str, Any], folder: Path) -> Run:
    path = folder / "whole.yaml"
    path.write_text(json.dumps(manifest, indent=1))
    assert run(str(path), [], inline=True) == 0
    return Run(f"{manifest['run_dir']}/{manifest['name']}")


def lines(run: Run, stage: str = "student") -> list[dict[str, Any]]:
    return list(run.stage(stage).metrics.read())


@pytest.mark.capability("Distillation from a teacher that runs along: forward and reverse KL, generalised JSD")
@pytest.mark.parametrize(
    ("keys", "beta"),
    [
        ({"divergence": "forward_kl"}, 0.0),
        ({"divergence": "reverse_kl", "temperature": 2.0}, 1.0),
        ({"divergence": "jsd", "beta": 0.3, "hard_loss": 0.2}, 0.3),
    ],
)
def test_the_first_step_is_that_of_trl_over_each_conversation_alone(manifest, tmp_path, keys, beta):
    gkd = pytest.importorskip("trl.experimental.gkd")
    manifest["stages"]["student"] |= {**keys, "steps": 1, "max_grad_norm": None}
    done = start(manifest, tmp_path)
    tree = load(json.dumps(manifest), "whole.yaml").tree
    opened: Any = open_stage(StageTask(tree, "student", done.uri, 1), Workers())
    with opened.data.loader() as loader:
        documents = [d for block in next(iter(loader)).blocks for unit in block for d in unit.documents]
    ours, theirs = (opened.models.program.roles[name].model for name in ("policy", "teacher"))
    temperature, hard = keys.get("temperature", 1.0), keys.get("hard_loss", 0.0)
    trained = sum(document.trained_tokens for document in documents)
    total = 0.0
    with ours.plain() as student, theirs.plain() as teacher:
        for document in documents:
            tokens, mask = torch.from_numpy(document.tokens), torch.from_numpy(document.trained)
            logits = student(input_ids=tokens[None], use_cache=False).logits[0, :-1, : ours.vocabulary][mask[1:]]
            with torch.no_grad():
                other = teacher(input_ids=tokens[None], use_cache=False).logits[0, :-1, : theirs.vocabulary][mask[1:]]
            soft = gkd.GKDTrainer.generalized_jsd_loss(
                logits, other, beta=beta, temperature=temperature, reduction="sum"
            )
            likelihood = torch.nn.functional.cross_entropy(logits, tokens[mask], reduction="sum")
            loss = ((1 - hard) * temperature**2 * soft + hard * likelihood) / trained
            loss.backward()
            total += float(loss.detach())
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in ours.parameters() if p.grad is not None]))
    first = lines(done)[0]
    assert first["trained_tokens"] == trained
    assert first["loss"] == pytest.approx(total, rel=1e-4)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_student_comes_nearer_and_held_out_data_tell_so(manifest, tmp_path):
    done = start(manifest, tmp_path)
    steps = lines(done)
    assert steps[-1]["divergence"] < steps[0]["divergence"]
    assert 0 <= steps[-1]["agreement"] <= 1
    assert steps[-1]["hard_loss"] > 0
    held_out = [e["loss"] for e in done.events.read() if e["kind"] == "evaluation" and e["stage"] == "student"]
    assert held_out[-1] < held_out[0]


def test_micro_batches_and_blocks_change_nothing_but_rounding(manifest, tmp_path):
    manifest["stages"]["student"] |= {"steps": 2, "hard_loss": 0.3, "divergence": "jsd"}
    first = lines(start(manifest, tmp_path))
    for number, batch in enumerate(({"tokens": 2048, "block": 512}, {"tokens": 2048, "block": 256, "micro": 1024})):
        manifest["stages"]["student"]["batch"] = batch
        manifest["name"] = f"split-{number}"
        other = lines(start(manifest, tmp_path))
        for key in ("loss", "grad_norm", "divergence", "agreement"):
            assert other[0][key] == pytest.approx(first[0][key], rel=1e-5)


def test_a_frozen_teacher_is_not_trained_and_drops_nothing_out(manifest, tmp_path):
    manifest["stages"]["teacher"]["model"]["new"]["config"] = {**LARGER, "attention_dropout": 0.5}
    done = start(manifest, tmp_path)
    tree = load(json.dumps(manifest), "whole.yaml").tree
    opened: Any = open_stage(StageTask(tree, "student", done.uri, 1), Workers())
    program = opened.models.program
    teacher = program.roles["teacher"].model
    assert not teacher.training
    assert program.roles["policy"].model.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_preflight_takes_small_models_for_both(manifest, tmp_path):
    path = tmp_path / "whole.yaml"
    path.write_text(json.dumps(manifest))
    report = validate(str(path), [])
    assert report.exit_code == 0, report.error
    assert report.stages[1].rehearsal.loss is not None


def test_the_starter_passes_its_preflight_and_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = starter("distill", "little")
    for name, text in begun.files.items():
        storage.write_text(name, text)
    storage.write_text("little.yaml", begun.text)
    assert validate("little.yaml", []).exit_code == 0
    assert run("little.yaml", ["teacher.steps=20", "student.steps=20"], inline=True) == 0
    found = lines(Run("runs/little"))
    assert found[-1]["divergence"] < found[0]["divergence"]


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"beta": 0.5}, "beta is a key of the divergence jsd"),
        ({"divergence": "reverse_kl", "beta": 0.5}, "reverse_kl does not use it"),
        ({"divergence": "jsd", "beta": 1.0}, "less than 1"),
        ({"divergence": "kl"}, "forward_kl"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"hard_loss": 1.0}, "less than 1"),
        ({"teacher": {"path": "a", "from": "teacher"}}, "exactly one of"),
    ],
)
def test_keys_that_mean_nothing_are_refused(manifest, keys, told):
    manifest["stages"]["student"] |= keys
    with pytest.raises(ManifestError, match=told):
        load(json.dumps(manifest), "whole.yaml")


def test_a_teacher_with_another_vocabulary_is_refused_before_work_begins(manifest, tmp_path):
    tokenizer = load_tokenizer(TokenizerFrom(bytes=True))
    tokenizer.save_pretrained(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    config = AutoConfig.for_model("llama", **SHAPE, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    manifest["stages"].pop("teacher")
    manifest["stages"]["student"]["teacher"] = {"path": str(tmp_path / "other")}
    path = tmp_path / "whole.yaml"
    path.write_text(json.dumps(manifest))
    report = validate(str(path), [])
    assert report.exit_code == 2
    assert "the first difference is the token 'a'" in str(report.error)
    with pytest.raises(ManifestError, match="first difference is the token 'a'"):
        run(str(path), [], inline=True)


@pytest.mark.capability("Distil a published model into a smaller one on real data")
def test_a_student_of_a_published_model_comes_nearer_on_held_out_questions(shared_data, tmp_path):
    place = str(shared_data / "models" / "stories260K_hf")

    def questions(split: str, limit: int) -> dict[str, Any]:
        source = {"path": str(shared_data / "gsm8k" / f"{split}.jsonl")}
        return {"source": source, "format": {"name": "text", "field": "question"}, "limit": limit}

    student = {
        "recipe": "distill",
        "model": {"new": {"architecture": "llama", "config": {**SHAPE, "hidden_size": 32}}},
        "tokenizer": {"path": place},
        "teacher": {"path": place},
        "data": {"train": 1.0},
        "evaluate": {"data": {"held_out": 1.0}},
        "steps": 12,
        "batch": {"tokens": 1024, "block": 512, "window": 8},
        "optimizer": {"lr": 1e-2},
        "threads": 1,
    }
    manifest = {"name": "real", "run_dir": str(tmp_path / "runs"), "stages": {"student": student}}
    done = start({**manifest, "data": {"train": questions("train", 200), "held_out": questions("test", 8)}}, tmp_path)
    before, after = (event["loss"] for event in done.events.read() if event["kind"] == "evaluation")
    assert after < before - 0.3
