"""Manifests from end to end: a model learns, answers, is judged, and learns from what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from postlude.data.formats.messages import Messages
from postlude.manifest.starter import starter
from postlude.runs import Run
from postlude.workflow.run import run
from postlude.workflow.validate import validate


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Writes the starter of a recipe; returns its path and its run."""
    monkeypatch.chdir(tmp_path)

    def write(recipe):
        begun = starter(recipe, recipe)
        for path, text in {f"{recipe}.yaml": begun.text, **begun.files}.items():
            (tmp_path / path).write_text(text)
        return tmp_path / f"{recipe}.yaml", Run(str(tmp_path / "runs" / recipe))

    return write


@pytest.mark.long
@pytest.mark.capability("Fine-tuning, rejection sampling and fine-tuning on what was kept, in one manifest")
def test_rejection_sampling_makes_a_model_better(started):
    path, directory = started("generate")
    assert validate(str(path), []).error is None
    assert run(str(path), [], inline=True) == 0
    artifact = directory.stage("answers").artifact
    records = [json.loads(line) for line in Path(artifact, "data.jsonl").read_text().splitlines()]
    report = json.loads(Path(artifact, "report.json").read_text())
    assert 0.02 < report["reward"] < 0.98
    assert len(records) == round(report["reward"] * report["completions"])
    for record in records:
        first, second = (int(word) for word in record["prompt"][0]["content"][:-1].split() if word.isdigit())
        assert str(first + second) in record["completion"][0]["content"]
        assert Messages().parse(record)
    models = json.loads(Path(directory.stage("report").artifact, "report.json").read_text())["models"]
    before, after = (models[name]["generation"]["sums"]["reward"] for name in ("sft", "improved"))
    assert after > before + 0.1


@pytest.mark.long
def test_the_starter_of_an_evaluation_shows_a_model_that_learned(started):
    path, directory = started("evaluate")
    assert validate(str(path), []).error is None
    assert run(str(path), [], inline=True) == 0
    models = json.loads(Path(directory.stage("report").artifact, "report.json").read_text())["models"]
    assert models["later"]["generation"]["sums"]["reward"] > models["early"]["generation"]["sums"]["reward"]
    assert models["later"]["choice"]["choices"]["accuracy"] > models["early"]["choice"]["choices"]["accuracy"]


def test_the_starter_of_a_filter_keeps_what_is_right(started):
    path, directory = started("filter")
    assert validate(str(path), []).error is None
    assert run(str(path), [], inline=True) == 0
    artifact = directory.stage("right").artifact
    records = [json.loads(line) for line in Path(artifact, "data.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [n for n in range(60) if n % 3]


@pytest.mark.long
def test_the_starter_of_a_merge_runs(started):
    path, directory = started("merge")
    assert validate(str(path), []).error is None
    assert run(str(path), [], inline=True) == 0
    models = json.loads(Path(directory.stage("report").artifact, "report.json").read_text())["models"]
    losses = {name: found["held_out"]["even"]["loss"] for name, found in models.items()}
    assert losses["one"] < losses["base"]
    assert losses["merged"] < losses["base"]


def test_pairs_from_the_outputs_of_a_model_that_was_just_trained(project):
    project.stages["sft"] = project.train(data={"asked": 1.0})
    digits = {"function": "stages.scores:digits"}
    project.stages["pairs"] = project.generate(model={"from": "sft"}, samples=4, reward=[digits], keep="pairs")
    assert project.run() == 0
    for pair in project.records("pairs"):
        assert pair["margin"] > 0
        assert [side[0]["role"] for side in (pair["prompt"], pair["chosen"], pair["rejected"])] == [
            "user",
            "assistant",
            "assistant",
        ]


@pytest.mark.parametrize("recipe", ["generate", "evaluate", "filter", "merge"])
def test_starters_say_what_they_are_and_where_their_files_are(recipe):
    text = starter(recipe, "some/where").text
    assert YAML(typ="safe").load(text)["name"] == "where"
    assert "postlude run some/where.yaml" in text
