"""``validate`` and ``preview`` of manifests whose stages make data and models that are not there yet."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from postlude.dashboard import masks
from postlude.errors import ComputeError, DataError, UserError
from postlude.manifest.load import load
from postlude.manifest.lock import dump_lock, lock
from postlude.manifest.problem import ManifestError
from postlude.workflow.validate import preview

DIGITS = {"function": "stages.scores:digits"}


@pytest.fixture
def chain(project):
    """Training, generation, filtering, training on what was kept, merging, evaluation."""
    project.data["made"] = {"source": {"from": "answers"}, "format": "messages", "filters": ["reward > 100"]}
    project.data["kept"] = {"source": {"from": "kept"}, "format": "prompt_completion"}
    project.stages |= {
        "sft": project.train(data={"asked": 1.0}),
        "answers": project.generate(
            model={"from": "sft"}, samples=8, max_tokens=300, reward=[DIGITS], keep={"above": 50.0}
        ),
        "kept": {"recipe": "filter", "data": {"made": 1.0}, "reward": [DIGITS], "keep": {"above": 99.0}},
        "improved": project.train(model={"from": "sft"}, data={"kept": 1.0}),
        "merged": {"recipe": "merge", "models": {"a": {"from": "sft"}, "b": {"from": "improved"}}},
        "report": {
            "recipe": "evaluate",
            "models": {"sft": {"from": "sft"}, "merged": {"from": "merged"}},
            "generation": {"data": {"asked": 1.0}, "reward": [{"model": {"from": "improved"}}]},
            "held_out": {"data": {"asked": 1.0, "kept": 1.0}},
        },
    }
    return project


@pytest.mark.capability("A preflight of stages that make data, and of those that read it before it is there")
def test_a_chain_is_tried_from_end_to_end_before_anything_runs(chain):
    report = chain.validate()
    assert report.error is None, report.error
    stages = {stage["stage"]: stage for stage in report.to_json()["stages"]}
    assert stages["answers"]["trial"]["counts"]["prompts"] == 20
    assert stages["answers"]["trial"]["counts"]["prompt_tokens"]["least"] == len("<?>user 1+1? assistant") + 1
    made = stages["answers"]["trial"]["made"]
    assert (made["prompts"], made["completions"]) == (4, 8)
    assert made["tokens"] <= 8 * 8
    assert stages["kept"]["awaited"] == {"made": "answers"}
    assert stages["improved"]["awaited"] == {"kept": "kept"}
    assert stages["improved"]["step"]["loss"] > 0
    assert stages["improved"]["step"]["memory"]["parameters"] == stages["sft"]["step"]["memory"]["parameters"]
    assert stages["report"]["awaited"] == {"kept": "kept"}
    assert set(stages["report"]["trial"]["made"]["models"]) == {"sft", "merged"}
    assert not Path(chain.manifest["run_dir"]).exists()
    assert report.render() is not None


def test_weights_that_are_elsewhere_are_not_looked_at_and_this_is_said(project):
    import fsspec

    fsspec.filesystem("memory").put(project.models["one"], "/models/one", recursive=True)
    project.stages |= {
        "near": project.train(data={"asked": 1.0}),
        "far": project.train(data={"asked": 1.0}, model={"path": "memory://models/one"}),
    }
    report = project.validate()
    assert report.error is None, report.error
    said = {
        stage["stage"]: [line for line in stage["remarks"] if "looked at" in line]
        for stage in report.to_json()["stages"]
    }
    assert said["near"] == []
    assert "stages.far.model.path: " in said["far"][0]


def test_a_reader_of_columns_that_will_not_be_there_is_refused(chain):
    chain.data["made"]["filters"] = ["rewrd > 100"]
    error = chain.validate().error
    assert isinstance(error, DataError)
    assert "Did you mean 'reward'" in str(error)


def test_a_reader_with_the_wrong_format_is_refused(chain):
    chain.data["kept"]["format"] = "text"
    error = chain.validate().error
    assert isinstance(error, DataError)
    assert "no column 'text'" in str(error)


def test_a_stage_that_starts_from_a_stage_is_tried_with_its_tokenizer(project):
    new = {"architecture": "llama", "config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}}
    keys = {"model": {"new": new}, "tokenizer": {"train": {"vocabulary": 300}}, "data": {"asked": 1.0}}
    project.stages |= {
        "first": project.train(**keys),
        "second": project.train(model={"from": "first"}, data={"asked": 1.0}),
        "answers": project.generate(model={"from": "second"}),
    }
    report = project.validate()
    assert report.error is None, report.error
    assert report.stages[1].rehearsal.expected_loss == report.stages[0].rehearsal.expected_loss


def test_data_that_are_not_there_are_named_when_they_are_previewed(chain):
    with pytest.raises(DataError, match=r"The stage 'kept' of .* has not made its data yet. Run it first"):
        preview(chain.write(), [], stage="improved")


def test_prompts_are_previewed_as_they_are_put(project):
    project.stages["answers"] = project.generate()
    (block,) = preview(project.write(), []).blocks
    assert len(block.documents) == 8
    for number, document in enumerate(block.documents):
        text = "".join(token.text for token in document.tokens)
        assert text == f"<|im_start|>user\n{number}+{number}?<|im_end|>\n<|im_start|>assistant\n"
        assert document.trained_tokens == 0
    assert len(preview(project.write(), [], blocks=3).blocks) == 3
    chosen = block.documents[3].example_id
    (one,) = preview(project.write(), [], example=chosen).blocks
    assert one.documents == [block.documents[3]]


def test_an_example_is_previewed_alone_and_an_unknown_one_not_looked_for_without_end(project):
    project.stages["sft"] = project.train(data={"asked": 1.0}, steps=3)
    (block,) = preview(project.write(), []).blocks
    chosen = block.documents[1]
    (one,) = preview(project.write(), [], example=chosen.example_id).blocks
    assert one.documents == [chosen]
    assert 0 < chosen.trained_tokens < len(chosen.tokens)
    assert preview(project.write(), [], example="asked:nobody").blocks == []
    project.directory.write_manifest_lock(dump_lock(lock(load(project.path.read_bytes(), "small.yaml"))))
    (found,) = asyncio.run(masks.find(project.directory, "sft", chosen.example_id))
    assert [token["trained"] for token in found["tokens"]] == [token.trained for token in chosen.tokens]
    with pytest.raises(UserError, match="not found in 0 seconds"):
        asyncio.run(masks.find(project.directory, "sft", chosen.example_id, seconds=0.01))
    with pytest.raises(UserError, match="there is no stage"):
        asyncio.run(masks.find(project.directory, "other", chosen.example_id))


def test_what_was_made_is_previewed_from_the_run(project):
    project.stages["answers"] = project.generate()
    project.data["made"] = {"source": {"from": "answers"}, "format": "messages"}
    project.stages["sft"] = project.train(data={"made": 1.0})
    from postlude.workflow.run import run

    assert run(project.write(), [], stage="answers") == 0
    (block,) = preview(project.write(), [], stage="sft").blocks
    said = {record["completion"][0]["content"] for record in project.records("answers")}
    for document in block.documents:
        trained = "".join(token.text for token in document.tokens if token.trained)
        assert any(trained.startswith(text) for text in said)


def test_a_stage_without_prompts_has_nothing_to_preview(project):
    project.stages["kept"] = {"recipe": "filter", "data": {"asked": 1.0}}
    with pytest.raises(ManifestError, match="puts no prompts to a model"):
        preview(project.write(), [])


def test_a_stage_that_would_not_fit_is_refused_with_what_would(project) -> None:
    project.manifest["compute"] = {"pools": {"train": {"workers": 1, "device_memory": 64 * 2**20}}}
    project.stages["tune"] = project.train(data={"asked": 1.0})
    report = project.validate()
    assert report.exit_code == 4
    assert "by the memory plan a worker needs" in str(report.error)
    with pytest.raises(ComputeError, match="by the memory plan a worker needs"):
        project.run()


def test_workers_that_cannot_share_a_model_are_refused_before_any_work(project) -> None:
    project.manifest["compute"] = {"pools": {"train": {"workers": 3}}}
    project.stages["tune"] = project.train(data={"asked": 1.0}, parallel={"tensor": 2})
    assert project.validate().exit_code == 4
    assert "parallel.tensor (2) does not divide the 3 workers" in str(project.validate().error)
    project.manifest["compute"] = {"pools": {"train": {"workers": {"min": 2, "max": 4}}}}
    assert "a number of workers that does not change" in str(project.validate().error)
    project.manifest["compute"] = {"pools": {"train": {"workers": 4}}}
    project.stages["tune"]["parallel"] = {"tensor": 4}
    assert "parallel.tensor (4) does not divide the model's num_attention_heads (2)" in str(project.validate().error)
    assert project.validate().exit_code == 2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"parallel": {"replicas": 2}}, "replicas are of sharded weights"),
        ({"parallel": {"shard": True}, "compile": True}, "layers that workers hold together are not compiled"),
        ({"recompute": 0.5}, "a share of the memory is kept by compiled layers"),
        ({"recompute": 1.5, "compile": True}, "less than or equal to 1"),
        ({"adapter": {}, "add_tokens": ["<x>"]}, "an adapter leaves as it is"),
        ({"adapter": {"rank": 4, "continue": True}}, "'continue' takes the adapter as it is"),
        (
            {"adapter": {}, "model": {"new": {"architecture": "llama"}}, "tokenizer": {"bytes": True}},
            "nothing to adapt",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(project, keys, said) -> None:
    project.stages["tune"] = {**project.train(data={"asked": 1.0}), **keys}
    report = project.validate()
    assert report.exit_code == 2
    assert said in str(report.error)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gemma3_text", "gpt_oss", "phi3", "smollm3"])
def test_a_small_model_of_an_architecture_has_its_width_and_experts(architecture) -> None:
    from transformers import AutoConfig

    from postlude.model.load import configuration, count_parameters
    from postlude.model.places import configuration_keys
    from postlude.stages.models import stand_in_for

    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": None}
    known = {key: value for key, value in {**shape, **experts}.items() if key in configuration_keys(architecture)}
    config = AutoConfig.for_model(architecture, **known, num_hidden_layers=3)
    small = configuration(stand_in_for(config), None, None)
    expected = AutoConfig.for_model(architecture, **known, num_hidden_layers=2)
    assert count_parameters(small) == count_parameters(expected)
