"""The first step against transformers' own forward over each conversation alone, whatever the blocks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from postlude.manifest.load import load
from postlude.stages.stage import open_stage
from postlude.stages.task import StageTask
from postlude.training import update
from postlude.training.meters import Meters
from postlude.training.trainer import Trainer
from postlude.training.workers import Workers


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("oracle") / "chats.jsonl"
    rng = random.Random(3)
    with path.open("w") as file:
        for number in range(40):
            turns = []
            for _ in range(rng.randint(1, 3)):
                turns.append({"role": "user", "content": " ".join(str(rng.random()) for _ in range(rng.randint(1, 3)))})
                turns.append({"role": "assistant", "content": f"{number} and {rng.random():.3f}"})
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


class _Lines:
    """A journal that keeps the metrics."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def metrics(self, line) -> None:
        self.lines.append(dict(line))

    def examples(self, step, epoch, rows) -> None: ...

    def event(self, kind, **fields) -> None: ...

    def flush(self) -> None: ...

    @property
    def examples_told(self) -> int:
        return 0

    def account(self, examples: int) -> dict[str, Any]:
        return {}


def trainer_of(chats: Path, folder: Path, batch: dict[str, int], **keys: Any) -> Trainer:
    """A trainer whose one step takes all the conversations."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    stage = {
        "recipe": "sft",
        "model": {"new": {"architecture": "qwen3", "config": {**shape, "num_key_value_heads": 2, "head_dim": 8}}},
        "tokenizer": {"bytes": True},
        "data": {"chats": 1.0},
        "epochs": 1,
        "batch": batch,
        **keys,
    }
    manifest = {
        "name": "oracle",
        "data": {"chats": {"source": {"path": str(chats)}, "format": "messages"}},
        "stages": {"sft": stage},
    }
    resolved = load(json.dumps(manifest), "oracle.yaml")
    opened: Any = open_stage(StageTask(resolved.tree, "sft", str(folder), 1), Workers())
    return Trainer(
        opened.config,
        opened.models.program,
        opened.data.loader(),
        opened.parts.workers,
        seed=0,
        precision=opened.models.precision,
        journal=_Lines(),
        meters=Meters(None, opened.parts.workers, opened.models.precision, 1),
    )


def first_step(trainer: Trainer) -> dict[str, Any]:
    trainer.fit()
    (line,) = lines_of(trainer)  # one step was to take everything
    return line


def lines_of(trainer: Trainer) -> list[dict[str, Any]]:
    assert isinstance(trainer.journal, _Lines)
    return trainer.journal.lines


@pytest.mark.capability("The first step's loss and gradient equal transformers' own over each conversation alone")
def test_the_first_step_is_that_of_each_conversation_alone(chats: Path, tmp_path: Path) -> None:
    trainer = trainer_of(chats, tmp_path, {"tokens": 65536, "block": 512})
    with trainer.loader as loader:
        documents = [d for block in next(iter(loader)).blocks for unit in block for d in unit.documents]
    assert len(documents) == 40
    model = trainer.program.roles["policy"].model
    trained = sum(document.trained_tokens for document in documents)
    total = 0.0
    with model.plain() as causal:
        for document in documents:
            tokens, weight = torch.from_numpy(document.tokens), torch.from_numpy(document.streams["weight"])
            logits = causal(input_ids=tokens[None], use_cache=False).logits[0, :-1, : model.vocabulary]
            loss = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none") @ weight[1:] / trained
            loss.backward()
            total += float(loss.detach())
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    line = first_step(trainer_of(chats, tmp_path, {"tokens": 65536, "block": 512}))
    assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert line["trained_tokens"] == trained


@pytest.mark.capability("How far an optimiser's step moves the weights, measured without a bit of them changed")
def test_the_update_is_measured_and_changes_nothing(chats: Path, tmp_path: Path, monkeypatch: Any) -> None:
    batch = {"tokens": 1024, "block": 512}
    trainer = trainer_of(chats, tmp_path, batch)
    before = _weights(trainer)
    with trainer.loader as loader:
        trainer.train(next(iter(loader)))
        moved = _weights(trainer) - before
        ratio = float(moved.double().norm() / before.double().norm())
        assert lines_of(trainer)[0]["update_ratio"] == pytest.approx(ratio, rel=1e-5)
        monkeypatch.setattr(update, "SAMPLED", before.numel() // 7)
        before = _weights(trainer)
        trainer.train(next(iter(loader)))
        ratio = float((_weights(trainer) - before).double().norm() / before.double().norm())
        assert lines_of(trainer)[1]["update_ratio"] == pytest.approx(ratio, rel=0.2), "of every seventh"
    monkeypatch.setattr(update.Sample, "__init__", lambda *_: None)
    monkeypatch.setattr(update.Sample, "moved", lambda *_: None)
    other = trainer_of(chats, tmp_path, batch)
    with other.loader as loader:
        for _ in range(2):
            other.train(next(iter(loader)))
    for line, without in zip(lines_of(trainer), lines_of(other), strict=True):
        assert (line["loss"], line["grad_norm"]) == (without["loss"], without["grad_norm"])
    assert torch.equal(_weights(trainer), _weights(other))


def _weights(trainer: Trainer) -> torch.Tensor:
    model = trainer.program.roles["policy"].model
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])


def test_other_blocks_and_micro_batches_change_nothing_but_rounding(chats: Path, tmp_path: Path) -> None:
    batches = [
        {"tokens": 65536, "block": 512},
        {"tokens": 65536, "block": 1024},
        {"tokens": 65536, "block": 512, "micro": 2048},
    ]
    first, *others = (first_step(trainer_of(chats, tmp_path, batch)) for batch in batches)
    for other in others:
        for key in ("loss", "grad_norm", "tokens", "trained_tokens"):
            assert other[key] == pytest.approx(first[key], rel=1e-6)


def test_recomputing_layers_changes_nothing_but_rounding(chats: Path, tmp_path: Path) -> None:
    batch = {"tokens": 65536, "block": 1024}
    plain = first_step(trainer_of(chats, tmp_path, batch))
    again = first_step(trainer_of(chats, tmp_path, batch, recompute="layer"))
    assert again["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert again["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-6)


@pytest.mark.capability("bf16 and fp16 autocast, with a dynamic loss scale for fp16")
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 5e-3)])
def test_low_precision_is_near_fp32(chats: Path, tmp_path: Path, precision: str, tolerance: float) -> None:
    batch = {"tokens": 65536, "block": 1024}
    exact = first_step(trainer_of(chats, tmp_path, batch))
    rounded = first_step(trainer_of(chats, tmp_path, batch, precision=precision))
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=tolerance)
    assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=5 * tolerance)
    assert not rounded["skipped"]


def test_an_overflow_halves_the_loss_scale_and_changes_no_weight(chats: Path, tmp_path: Path) -> None:
    trainer = trainer_of(chats, tmp_path, {"tokens": 65536, "block": 1024}, precision="fp16")
    weights = [parameter.detach().clone() for parameter in trainer.program.roles["policy"].model.parameters()]
    trainer.scale.scale = 2.0**40
    line = first_step(trainer)
    assert line["skipped"]
    assert trainer.scale.scale == 2.0**39
    assert trainer.totals["skipped_steps"] == 1
    after = trainer.program.roles["policy"].model.parameters()
    assert all(torch.equal(old, new) for old, new in zip(weights, after, strict=True))
