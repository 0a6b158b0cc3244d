"""A small manifest of stages that do not train, over a model of some thousand random weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from postlude.data.tokenizer import load_tokenizer
from postlude.manifest.schema import ModelFrom, NewModel, TokenizerFrom
from postlude.model.export import write_model
from postlude.model.load import load_model
from postlude.runs import Run
from postlude.workflow.run import run
from postlude.workflow.validate import Report, validate

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_random_model(folder: Path, seed: int, scalar: bool = False, **config: Any) -> str:
    """A Hugging Face directory with random weights and the tokenizer of bytes."""
    tokenizer = load_tokenizer(TokenizerFrom(bytes=True))
    start = ModelFrom(new=NewModel(architecture="llama", config={**SHAPE, **config}))
    model = load_model(start, None, tokenizer, seed=seed)
    if scalar:
        model.add_scalar_head(seed)
    write_model(model, tokenizer, folder, {})
    return str(folder)


def outcomes(rollouts: Iterable[Mapping[str, Any]]) -> dict[int, Counter[str]]:
    """What the rollouts of a stage tell of each issued prompt, by its number: how often it was trained or dropped."""
    counts: dict[int, Counter[str]] = {}
    for issue, _, outcome in {(line["issue"], line["step"], line["outcome"]) for line in rollouts if "outcome" in line}:
        counts.setdefault(issue, Counter())[outcome] += 1
    return counts


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two random models, and one with a head that scores."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "one": write_random_model(folder / "one", 1),
        "two": write_random_model(folder / "two", 2),
        "judge": write_random_model(folder / "judge", 3, scalar=True),
    }


class Project:
    """A manifest as a tree, to be changed by a test before it runs."""

    def __init__(self, folder: Path, models: dict[str, str]) -> None:
        self.folder, self.models = folder, models
        self.path = folder / "small.yaml"
        self.data: dict[str, Any] = {"asked": self.written("asked", [chat(f"{n}+{n}?", str(2 * n)) for n in range(20)])}
        self.stages: dict[str, Any] = {}
        self.manifest: dict[str, Any] = {
            "name": "small",
            "seed": 3,
            "run_dir": str(folder / "runs"),
            "data": self.data,
            "stages": self.stages,
        }

    def written(self, name: str, records: Iterable[Any], format: Any = "messages") -> dict[str, Any]:
        """Write records, and say how they are read."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return {"source": {"path": str(path)}, "format": format}

    def generate(self, **keys: Any) -> dict[str, Any]:
        """A stage that generates."""
        model = {"path": self.models["one"]}
        base = {"recipe": "generate", "model": model, "data": {"asked": 1.0}, "max_tokens": 6, "threads": 1}
        return {**base, **keys}

    def train(self, **keys: Any) -> dict[str, Any]:
        """A stage that trains."""
        base = {"recipe": "sft", "model": {"path": self.models["one"]}, "steps": 2, "threads": 1}
        return {**base, "batch": {"tokens": 256, "block": 128}, **keys}

    def write(self) -> str:
        self.path.write_text(json.dumps(self.manifest, indent=1))
        return str(self.path)

    def run(self, *overrides: str) -> int:
        return run(self.write(), list(overrides), inline="compute" not in self.manifest)

    def validate(self) -> Report:
        return validate(self.write(), [])

    @property
    def directory(self) -> Run:
        return Run(f"{self.manifest['run_dir']}/{self.manifest['name']}")

    def artifact(self, stage: str) -> Path:
        return Path(self.directory.stage(stage).artifact)

    def report(self, stage: str) -> dict[str, Any]:
        return json.loads((self.artifact(stage) / "report.json").read_text())

    def records(self, stage: str) -> list[dict[str, Any]]:
        """What a stage made."""
        return [json.loads(line) for line in (self.artifact(stage) / "data.jsonl").open()]


def unending_template(question: str) -> str:
    """A chat template of ours that does not come to its end where a message is this question."""
    stays = "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    return (
        f"{{%- for message in messages %}}{{% if message.content == {question!r} %}}{stays}{{% endif %}}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def chat(question: str, answer: str) -> dict[str, Any]:
    """A record of the format ``messages``."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def project(tmp_path: Path, models: dict[str, str]) -> Project:
    return Project(tmp_path, models)
