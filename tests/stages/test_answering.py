"""One way from a prompt to a scored answer: the engines, environments and rewards of ``generate`` and ``evaluate``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from postlude.manifest.problem import ManifestError
from stages.conftest import Project

EXTERNAL = {"name": "native", "apart": True}
AGAIN = {"name": "ask_again", "times": 2}
LATER_KEYS = {"engine", "engine_seconds", "environment", "turns", "context", "reward_workers", "reward_seconds"}


def generated(project: Project, name: str, **keys: Any) -> list[dict[str, Any]]:
    """What a stage ``answers`` with these keys makes, in a run of its own."""
    project.manifest |= {"name": name, "run_dir": str(project.folder / name)}
    project.stages["answers"] = project.generate(**keys)
    assert project.run() == 0
    return project.records("answers")


def evaluated(project: Project, name: str, models: Sequence[str] = ("one", "two"), **keys: Any) -> dict[str, Any]:
    """The report of an evaluation by generation with these keys, in a run of its own."""
    project.manifest |= {"name": name, "run_dir": str(project.folder / name)}
    generation = {"data": {"asked": 1.0}, "max_tokens": 6, "reward": [{"function": "number"}], **keys}
    places = {model: {"path": project.models[model]} for model in models}
    project.stages["answers"] = {"recipe": "evaluate", "models": places, "generation": generation, "threads": 1}
    assert project.run() == 0
    return project.report("answers")["models"]


@pytest.mark.capability("generate and evaluate by an engine in a process of its own")
def test_an_external_engine_answers_as_the_model_itself(project):
    judge = {"model": {"path": project.models["judge"]}}
    keys = {"samples": 3, "concurrency": 12, "temperature": 0.7, "reward": [judge]}
    here, there = (generated(project, f"run-{n}", engine=e, **keys) for n, e in enumerate(("native", EXTERNAL)))
    assert here == there
    assert len(here) == 60
    keys = {"samples": 4, "temperature": 1.0}
    here, there = (evaluated(project, f"eval-{n}", engine=e, **keys) for n, e in enumerate(("native", EXTERNAL)))
    assert here == there
    assert here["one"]["generation"]["asked"]["pass_at_4"] >= here["one"]["generation"]["asked"]["pass_at_1"]


@pytest.mark.capability("generate and evaluate over several turns, with an environment")
@pytest.mark.parametrize("engine", ["native", pytest.param(EXTERNAL, marks=pytest.mark.long)])
def test_an_environment_answers_between_the_turns(project, engine):
    records = generated(project, "turns", engine=engine, environment=AGAIN, max_tokens=12, samples=2, keep="best")
    assert len(records) == 20
    for record in records:
        roles = [message["role"] for message in record["completion"]]
        assert roles == ["assistant", "user"] * (len(roles) // 2) + ["assistant"]
        assert record["messages"] == [*record["prompt"], *record["completion"]]
        said = [message["content"] for message in record["completion"] if message["role"] == "assistant"]
        assert record["rewards"] == {"ask_again": record["reward"]}
        assert record["reward"] <= len(said)
        assert [m["content"] for m in record["completion"] if m["role"] == "user"] == [
            f"Number {n + 1}. Again?" for n in range(len(said) - 1)
        ]
    assert any(len(record["completion"]) > 1 for record in records)
    report = evaluated(project, "measured", engine=engine, environment=AGAIN, max_tokens=12, reward=[])
    assert set(report["one"]["generation"]["asked"]["rewards"]) == {"ask_again"}


def test_text_that_is_continued_is_continued_after_the_reply_too(project):
    project.data["asked"] = project.written("asked", [{"text": f"{n} is"} for n in range(16)], "text")
    records = generated(project, "text", environment=AGAIN, max_tokens=200)
    longer = [record for record in records if "Again?" in record["completion"]]
    assert longer
    assert all("Number 1. Again?" in record["completion"] for record in longer)


def test_a_run_that_knew_no_engines_goes_on(project):
    """Keys that came later do not change what a stage is where they have their default or are deadlines."""
    generated(project, "before")
    identity = Path(project.directory.stage("answers").identity_uri)
    known = json.loads(identity.read_text())["config"]
    assert not [key for key in known if set(key.split(".")) & LATER_KEYS]
    project.stages["answers"] = project.generate(engine="native", reward_seconds=7, engine_seconds=30)
    assert project.run() == 0
    assert json.loads(identity.read_text())["revision"] == 1
    project.stages["answers"] = project.generate(engine=EXTERNAL)
    assert project.run() == 0
    assert json.loads(identity.read_text())["revision"] == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"turns": 3}, "'turns' needs an 'environment'"),
        ({"engine": "vlm"}, "Did you mean 'vllm'"),
        ({"environment": "nowhere"}, "not among the environments"),
    ],
)
def test_keys_that_cannot_be_are_told(project, keys, message):
    project.stages["answers"] = project.generate(**keys)
    error = project.validate().error
    assert isinstance(error, ManifestError)
    assert message in str(error)


def test_the_preflight_needs_no_engine(project):
    project.stages["answers"] = project.generate(engine={"name": "vllm", "python": "/nowhere"}, environment=AGAIN)
    report = project.validate()
    assert report.error is None
    assert report.stages[0].trial.made["records"] == 4


def with_wide_heads(model: Path, folder: Path, size: int = 32) -> Path:
    """The same function of token ids with attention heads of ``size`` dimensions, as vLLM wants them on a CPU: zeros
    stand in the new ones. Each pair of dimensions keeps its rotary frequency, ``theta ** (-2 i / size)`` for the i-th,
    and queries are scaled so that their products, divided by the root of ``size``, stay what they were.
    """
    config = json.loads((model / "config.json").read_text())
    old = config["head_dim"]
    places = [i * size // old for i in range(old // 2)]
    places += [place + size // 2 for place in places]
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        part = name.split(".")[-2]
        if part in ("q_proj", "k_proj", "v_proj"):
            wide = torch.zeros(len(tensor) // old, size, tensor.shape[1])
            wide[:, places] = tensor.view(-1, old, tensor.shape[1]) * ((size / old) ** 0.5 if part == "q_proj" else 1.0)
            tensors[name] = wide.flatten(0, 1)
        elif part == "o_proj":
            wide = torch.zeros(len(tensor), tensor.shape[1] // old, size)
            wide[:, :, places] = tensor.view(len(tensor), -1, old)
            tensors[name] = wide.flatten(1)
    shutil.copytree(model, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"head_dim": size}))
    return folder


def told(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What was answered; and rewards, which two kernels compute, to the digits that both have."""
    return [
        (
            record["id"],
            record["completion"],
            record["ended"],
            record["completion_tokens"],
            round(record.get("reward", 0), 4),
        )
        for record in records
    ]


@pytest.mark.long
@pytest.mark.capability("generate and evaluate by vLLM")
def test_vllm_answers_with_the_tokens_of_the_native_engine(project, shared_data, vllm):
    """A published model, its likeliest tokens: over two turns and with a reward model, and plainly where it is
    evaluated."""
    published = shared_data / "models/stories260K_hf"
    stories = with_wide_heads(published, project.folder / "stories")
    project.models = {**project.models, "two": str(stories)}
    openings = ["Once upon a time", "The dog", "Lily was", "One day a boy named Tim", "There was a little"]
    project.data["asked"] = project.written("asked", [{"text": text} for text in openings], "text")
    judge = {"model": {"path": project.models["judge"]}}
    keys = {"temperature": 0.0, "max_tokens": 40, "reward": [judge], "environment": {**AGAIN, "times": 1}}
    wide, engine = {"model": {"path": str(stories)}}, {"name": "vllm", "options": vllm.options}
    published_says = generated(project, "published", model={"path": str(published)}, **keys)
    native = generated(project, "native", **wide, **keys)
    served = generated(project, "vllm", **wide, engine=engine, **keys)
    assert told(native) == told(served) == told(published_says)
    assert len(native) == len(openings)
    word = {"function": {"name": "regex", "pattern": "[a-m]"}}
    reports = [
        evaluated(project, f"report-{n}", ["two"], engine=each, temperature=0.0, max_tokens=24, reward=[word])
        for n, each in enumerate(("native", engine))
    ]
    assert reports[0] == reports[1]
