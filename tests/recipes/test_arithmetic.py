"""Sums that stand in GSM8K's solutions, answered by a small model that was first taught to add, partly wrong."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from postlude.runs import Run
from postlude.workflow.run import run
from recipes.conftest import chat

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}
PLAIN = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def sums(file: Path) -> list[tuple[int, int]]:
    """The different sums of numbers below a hundred that the solutions of a split add up, in their order."""
    found = [
        (int(one), int(other))
        for line in file.open()
        for one, other in re.findall(r"<<(\d{1,2})\+(\d{1,2})=\d+>>", json.loads(line)["answer"])
    ]
    return list(dict.fromkeys(found))


def lessons(held_out: set[tuple[int, int]]) -> list[dict[str, Any]]:
    """Every other sum of two numbers below a hundred, a third of them wrong."""
    rng = random.Random(0)
    pairs = [(a, b) for a in range(100) for b in range(100) if (a, b) not in held_out]
    return [chat(f"{a}+{b}=", str(a + b + rng.choice((0, 0, 0, 0, 1, 2)))) for a, b in pairs]


class Course:
    """A run with a stage that is taught, to which stages are added that practise."""

    def __init__(self, folder: Path, shared: Path) -> None:
        held_out = sums(shared / "gsm8k" / "test.jsonl")[:150]
        practised = [one for one in sums(shared / "gsm8k" / "train.jsonl") if one not in set(held_out)]
        self.folder, self.data = folder, {}
        self._write("lessons", lessons(set(held_out)))
        self._write("practised", [chat(f"{a}+{b}=", str(a + b)) for a, b in practised])
        self._write("unseen", [chat(f"{a}+{b}=", str(a + b)) for a, b in held_out])
        self.stages: dict[str, Any] = {
            "sft": {
                "recipe": "sft",
                "model": {"new": {"architecture": "llama", "config": SHAPE}},
                "tokenizer": {"bytes": True},
                "data": {"lessons": 1.0},
                "steps": 600,
                "threads": 1,
                "batch": {"tokens": 2048, "block": 256},
                "optimizer": {"name": "adamw", "lr": 3e-3},
                "schedule": {"name": "cosine", "warmup_steps": 20},
            }
        }

    def practise(self) -> dict[str, Any]:
        return {
            "recipe": "grpo",
            "model": {"from": "sft"},
            "data": {"practised": 1.0},
            "steps": 40,
            "threads": 1,
            "batch": {"tokens": 16384, "block": 256},
            "optimizer": {"name": "adamw", "lr": 5e-4},
            "schedule": "constant",
            "rollout": {"prompts": 32, "max_tokens": 6},
            "group": 8,
            "reward": [{"function": "exact_match"}],
            "evaluate": {"data": {"unseen": 1.0}, "samples": 4, "temperature": 1.0},
        }

    def run(self, name: str, seed: int) -> Run:
        manifest = {"name": name, "seed": seed, "run_dir": str(self.folder), "data": self.data, "stages": self.stages}
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(manifest))
        assert run(str(path), [], inline=True) == 0
        return Run(str(self.folder / name))

    def _write(self, name: str, records: list[dict[str, Any]]) -> None:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        self.data[name] = {"source": {"path": str(path)}, "format": "messages", "template": PLAIN}


@pytest.mark.long
@pytest.mark.capability("Practice raises the held-out accuracy on GSM8K's sums, whatever the seed")
def test_practice_raises_the_share_of_right_answers(shared_data, tmp_path):
    course = Course(tmp_path, shared_data)
    taught = course.run("taught", 1).stage("sft").artifact
    for seed in (1, 2, 3):
        course.stages = {"rl": {**course.practise(), "model": {"path": taught}}}
        done = course.run(f"practised-{seed}", seed)
        told = [event["metrics"] for event in done.events.read() if event["kind"] == "evaluation"]
        print(f"seed {seed}: {told[0]['reward']:.3f} -> {told[-1]['reward']:.3f}")
        assert told[-1]["reward"] > told[0]["reward"] + 0.1
