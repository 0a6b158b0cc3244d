"""Sums that stand in GSM8K's solutions: a small model was taught to add for a short while, and then practises."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from postlude.runs import Run
from postlude.workflow.run import run
from stages.conftest import chat

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}
PLAIN = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
NEARNESS = '''
def near(prompt, completion, record):
    """1 for the right number, less by a twentieth for each that it is off."""
    try:
        said = int(completion)
    except ValueError:
        return 0.0
    return max(0.0, 1.0 - abs(said - int(record["reference"])) / 20)
'''
Sum = tuple[int, int]


def sums(file: Path) -> list[Sum]:
    """The different sums of numbers below a hundred that the solutions of a split add up, in their order."""
    found = [
        (int(one), int(other))
        for line in file.open()
        for one, other in re.findall(r"<<(\d{1,2})\+(\d{1,2})=\d+>>", json.loads(line)["answer"])
    ]
    return list(dict.fromkeys(found))


class Course:
    """Data, and runs over them."""

    def __init__(self, folder: Path, shared: Path) -> None:
        self.folder = folder
        unseen = sums(shared / "gsm8k" / "test.jsonl")[:150]
        practised = [one for one in sums(shared / "gsm8k" / "train.jsonl") if one not in set(unseen)]
        lessons = [(a, b) for a in range(100) for b in range(100) if (a, b) not in set(unseen)]
        parts = {"unseen": unseen, "practised": practised, "lessons": lessons}
        self.data = {name: self._written(name, part) for name, part in parts.items()}

    def _written(self, name: str, part: list[Sum]) -> dict[str, Any]:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(chat(f"{a}+{b}=", str(a + b))) + "\n" for a, b in part))
        return {"source": {"path": str(path)}, "format": "messages", "template": PLAIN}

    def run(self, name: str, seed: int, stage: dict[str, Any], *data: str) -> Run:
        manifest = {
            "name": name,
            "seed": seed,
            "run_dir": str(self.folder),
            "data": {one: self.data[one] for one in data},
            "stages": {"only": {"threads": 1, **stage}},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(manifest))
        assert run(str(path), [], inline=True) == 0
        return Run(str(self.folder / name))


@pytest.mark.long
@pytest.mark.capability("Practice raises the held-out reward on GSM8K's sums, whatever the seed")
def test_practice_brings_answers_nearer_to_what_is_right(shared_data, tmp_path, monkeypatch):
    (tmp_path / "nearness.py").write_text(NEARNESS)
    monkeypatch.syspath_prepend(tmp_path)
    course = Course(tmp_path, shared_data)
    taught = {
        "recipe": "sft",
        "model": {"new": {"architecture": "llama", "config": SHAPE}},
        "tokenizer": {"bytes": True},
        "data": {"lessons": 1.0},
        "steps": 200,
        "batch": {"tokens": 2048, "block": 256},
        "optimizer": {"name": "adamw", "lr": 4e-3},
    }
    start = course.run("taught", 1, taught, "lessons").stage("only").artifact
    practice = {
        "recipe": "grpo",
        "model": {"path": start},
        "data": {"practised": 1.0},
        "steps": 60,
        "batch": {"tokens": 16384, "block": 256},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "schedule": "constant",
        "rollout": {"prompts": 32, "max_tokens": 6},
        "group": 8,
        "reward": [{"function": "nearness:near"}],
        "evaluate": {"data": {"unseen": 1.0}, "samples": 4, "temperature": 1.0},
    }
    for seed in (1, 2, 3):
        events = course.run(f"practised-{seed}", seed, practice, "practised", "unseen").events.read()
        told = [event["metrics"]["reward"] for event in events if event["kind"] == "evaluation"]
        print(f"seed {seed}: {told[0]:.3f} before, {told[-1]:.3f} after")
        assert told[-1] > told[0] + 0.1
