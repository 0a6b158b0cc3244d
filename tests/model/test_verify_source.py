"""``verify`` tells, by name and all at once, what a real artifact does not hold of what its source says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import meshes
from cli.test_screens import printed
from postlude.manifest.load import load
from postlude.manifest.problem import ManifestError
from postlude.workflow import models as commands
from ranks import run_ranks
from stages.conftest import Project, chat, write_random_model

GENERATION = {"do_sample": False, "temperature": 0.6, "eos_token_id": [7]}
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any], file: str = "model.safetensors"):
    def edit(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, {"format": "pt"})

    return edit


def edit_json(file: str, **keys: Any):
    """Change keys of a file; those that become None go."""

    def edit(folder: Path) -> None:
        content = {**json.loads((folder / file).read_text()), **keys}
        (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


def without(*files: str):
    def edit(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return edit


def other(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name] + 1


def write_base(folder: Path) -> str:
    """A model whose head is not its embedding, though its configuration says so."""
    place = write_random_model(folder, 1, tie_word_embeddings=True)
    edit_weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].flip(0).clone()}))(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    edit_json("tokenizer_config.json", eos_token="<|begin|>")(folder)  # the template ends a turn with another
    return place


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """What a run made, and what was exported of it, by name."""
    folder = tmp_path_factory.mktemp("made")
    project = Project(folder, {"one": write_base(folder / "base")})
    asked = {"data": {"asked": 1.0}, "optimizer": {"lr": 1e-2}}
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n}?"}],
            "chosen": [{"role": "assistant", "content": f"yes {n}"}],
            "rejected": [{"role": "assistant", "content": f"no {n}"}],
        }
        for n in range(8)
    ]
    project.data["pairs"] = project.written("pairs", rows, "preference")
    project.stages |= {
        "full": project.train(**asked),
        "adapter": project.train(adapter={"rank": 2}, **asked),
        "again": project.train(model={"from": "adapter"}, **asked),
        "judge": project.train(recipe="reward", data={"pairs": 1.0}),
        "fresh": project.train(model={"new": {"architecture": "llama", "config": SMALL}}, tokenizer={"bytes": True})
        | asked,
        "mean": {"recipe": "merge", "models": {"a": {"from": "full"}, "b": {"path": project.models["one"]}}},
    }
    assert project.run() == 0
    found = {name: project.artifact(name) for name in project.stages}
    for name, stage, merge in (("copy", "full", False), ("peft", "adapter", False), ("merged", "adapter", True)):
        commands.export(f"{project.directory.uri}/{stage}", str(folder / name), merge=merge)
        found[name] = folder / name
    return {**found, "base": folder / "base"}


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

WHOLE = ("full", "copy", "merged", "again")
ADAPTERS = ("adapter", "peft")


def told(folder: Path, *edits: Callable[[Path], None]) -> dict[str, list[str]]:
    """The faults that are told of a folder after these edits, which are undone."""
    kept = folder.with_name(f"{folder.name}.kept")
    shutil.copytree(folder, kept)
    try:
        for edit in edits:
            edit(folder)
        report = commands.verify(str(folder))
        assert report.exit_code == (1 if report.source.faults else 0)
        return json.loads(json.dumps(report.to_json()))["source"]["faults"]
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)


@pytest.mark.capability("Artifacts and exports compared with their sources")
@pytest.mark.parametrize("name", [*WHOLE, *ADAPTERS, "judge", "fresh"])
def test_what_was_not_damaged_holds_what_it_must(made, name) -> None:
    report = commands.verify(str(made[name]))
    assert report.source.faults == {}
    assert report.source.not_compared == []
    claimed = " ".join(report.source.compared_with)
    source = {"copy": "full", "peft": "adapter", "merged": "adapter"}.get(name, name)
    assert f"stages/{source}/" in claimed
    assert name not in ("full", "adapter", "judge", "merged") or str(made["base"]) in claimed


DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a dropped head": (edit_weights(lambda t: t.pop("lm_head.weight")), "missing weights", "lm_head.weight"),
    "a head that the configuration denies": (
        edit_json("config.json", tie_word_embeddings=True),
        "config.json",
        "tie_word_embeddings: the head is not the embedding",
    ),
    "a head that became the embedding": (
        edit_weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})),
        "other weights",
        "lm_head.weight",
    ),
    "a dropped weight": (edit_weights(lambda t: t.pop(UP)), "missing weights", UP),
    "a weight without a place": (
        edit_weights(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)})),
        "weights without a place",
        "model.layers.0.self_attn.q_proj.bias",
    ),
    "a changed weight": (edit_weights(lambda t: other(t, UP)), "other weights", UP),
    "a weight that no adapter has": (edit_weights(lambda t: other(t, NORM)), "other weights", NORM),
    "fewer tokens": (
        edit_weights(lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1].clone()})),
        "other weights",
        "lm_head.weight",
    ),
    "lost stop tokens": (
        edit_json("generation_config.json", eos_token_id=[7]),
        "generation_config.json",
        "eos_token_id: lacks 259",
    ),
    "a stop token of nobody": (
        edit_json("generation_config.json", eos_token_id=[7, 3, 257, 259]),
        "generation_config.json",
        "eos_token_id: has 3",
    ),
    "a lost generation config": (without("generation_config.json"), "generation_config.json", "missing"),
    "a lost do_sample": (
        edit_json("generation_config.json", do_sample=None),
        "generation_config.json",
        "do_sample: False -> None",
    ),
    "a lost temperature": (
        edit_json("generation_config.json", temperature=None),
        "generation_config.json",
        "temperature: 0.6 -> None",
    ),
    "a value of nobody": (
        edit_json("generation_config.json", top_k=3),
        "generation_config.json",
        "top_k: None -> 3",
    ),
    "another configuration": (
        edit_json("config.json", rms_norm_eps=0.5),
        "config.json",
        "rms_norm_eps: 1e-06 -> 0.5",
    ),
    "no template": (without("chat_template.jinja"), "files", "chat_template.jinja: missing"),
}


@pytest.mark.capability("Artifacts and exports compared with their sources")
@pytest.mark.parametrize("name", WHOLE)
def test_every_fault_of_a_whole_model_is_told(made, name) -> None:
    for what, (damage, kind, fault) in DAMAGES.items():
        assert fault in told(made[name], damage).get(kind, ()), what


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_fault_of_an_adapter_is_told(made, name) -> None:
    file = "adapter_model.safetensors"
    first = sorted(load_file(made[name] / file))[0]
    inside = first.removeprefix("base_model.model.").replace(".weight", ".default.weight")
    for what, damage in {
        "missing weights": lambda t: t.pop(first),
        "other weights": lambda t: other(t, first),
    }.items():
        assert told(made[name], edit_weights(damage, file))[what] == [inside]
    assert "no.such.default.weight" in str(told(made[name], edit_weights(lambda t: t.update(NO_SUCH), file)))
    for what in ("lost stop tokens", "a lost generation config", "a lost do_sample", "a value of nobody"):
        damage, kind, fault = DAMAGES[what]
        assert fault in told(made[name], damage)[kind], what
    assert "adapter_config.json: changed" in told(made[name], edit_json("adapter_config.json", lora_alpha=1.0))["files"]


NO_SUCH = {"base_model.model.no.such.weight": torch.ones(1)}


def test_of_a_merged_model_files_and_heads_are_compared(made) -> None:
    report = commands.verify(str(made["mean"]))
    assert report.exit_code == 0
    assert report.source.not_compared == ["its weights were merged, not trained, and are not computed again"]
    assert "model.safetensors: changed" in told(made["mean"], DAMAGES["a changed weight"][0])["files"]
    denied, kind, fault = DAMAGES["a head that the configuration denies"]
    assert fault in told(made["mean"], denied)[kind]


def test_every_fault_of_a_model_that_scores_is_told(made) -> None:
    judge, scalar, head = made["judge"], "scalar_head.safetensors", "lm_head.safetensors"
    assert told(judge, edit_weights(lambda t: other(t, "weight"), scalar))["other weights"] == ["scalar.weight"]
    assert "scalar.weight" in told(judge, without(scalar))["missing weights"]
    assert told(judge, edit_weights(lambda t: other(t, "score.weight")))["other weights"] == ["score.weight"]
    assert told(judge, edit_weights(lambda t: t.pop("score.weight")))["missing weights"] == ["score.weight"]
    assert "lm_head.weight" in told(judge, without(head))["missing weights"]
    # It was frozen, so that no checkpoint has it: it is the base's.
    assert told(judge, edit_weights(lambda t: other(t, "lm_head.weight"), head))["other weights"] == ["lm_head.weight"]
    assert told(judge, edit_weights(lambda t: other(t, UP)))["other weights"] == [UP]


@pytest.mark.capability("Artifacts and exports compared with their sources")
def test_all_faults_are_told_in_one_pass_of_a_model_that_cannot_be_loaded(made) -> None:
    folder = made["merged"]
    whats = ("a dropped weight", "a weight without a place", "a lost generation config", "a weight that no adapter has")
    faults = told(folder, *(DAMAGES[what][0] for what in whats))
    for what in whats:
        _, kind, fault = DAMAGES[what]
        assert fault in faults[kind], what
    assert "incomplete" in faults["unreadable"][0]


def test_faults_are_seen_at_80_columns(made, tmp_path) -> None:
    folder = shutil.copytree(made["copy"], tmp_path / "copy")
    edit_weights(lambda t: other(t, UP))(folder)
    shown = "\n".join(printed(commands.verify(str(folder)).render(), 80))
    assert "NOT as its source, other weights" in shown
    assert UP in shown.replace("\n", "")


def test_a_base_that_changed_is_told(made) -> None:
    kept = (made["base"] / "model.safetensors").read_bytes()
    edit_weights(lambda t: other(t, NORM))(made["base"])
    try:
        adapter, full, merged = (commands.verify(str(made[name])) for name in ("adapter", "full", "merged"))
    finally:
        (made["base"] / "model.safetensors").write_bytes(kept)
    assert adapter.exit_code == 1
    assert "had the hash" in adapter.source.faults["unreadable"][0]
    # What was trained in full is what it was, and what it began with can no longer be asked.
    assert full.exit_code == 0
    assert any("training began" in why for why in full.source.not_compared)
    assert any("had the hash" in why for why in merged.source.not_compared)


def test_a_copy_in_no_run_is_compared_with_what_can_be_found(made, tmp_path) -> None:
    for name in ("full", "adapter"):
        copy = shutil.copytree(made[name], tmp_path / name)
        report = commands.verify(str(copy))
        assert report.exit_code == 0
        assert [why for why in report.source.not_compared if "lies in no run" in why]
        assert str(made["base"]) in report.source.compared_with[0]
        assert DAMAGES["lost stop tokens"][2] in told(copy, DAMAGES["lost stop tokens"][0])["generation_config.json"]
    for what in ("a dropped weight", "a weight without a place", "a dropped head", "another configuration"):
        damage, kind, fault = DAMAGES[what]
        assert fault in told(tmp_path / "full", damage)[kind], what


def test_that_no_source_can_be_found_is_said(made, tmp_path) -> None:
    copy = shutil.copytree(made["copy"], tmp_path / "copy")
    edit_json("lineage.json", exported_from={"place": str(tmp_path / "gone"), "sha256": "0" * 64})(copy)
    report = commands.verify(str(copy))
    assert report.exit_code == 0
    assert "gone' is not there any more" in report.source.not_compared[0]
    (copy / "lineage.json").unlink()
    report = commands.verify(str(copy))
    assert report.exit_code == 0
    assert "no source can be found" in report.source.not_compared[0]
    edit_weights(lambda t: t.pop(UP))(copy)
    with pytest.raises(ManifestError, match="incomplete"):  # of a model that claims nothing this is all that is known
        commands.verify(str(copy))


@pytest.mark.long
@pytest.mark.parametrize("tensor", [1, 2])
def test_an_own_head_that_ranks_share_is_trained_and_written(tmp_path, tensor) -> None:
    project = Project(tmp_path, {"one": write_base(tmp_path / "base")})
    project.data["asked"] = project.written("asked", [chat(f"{n}?", str(n)) for n in range(20)])
    project.stages["tune"] = project.train(data={"asked": 1.0}, parallel={"shard": True})
    tree = load(Path(project.write()).read_text(), "small.yaml").tree
    heads = []
    for run, ranks in (("alone", 1), ("shared", 2)):
        task = meshes.StageOnMesh(tree, str(tmp_path / run), {"tensor": min(tensor, ranks)})
        run_ranks("meshes:work_on_stage", task, ranks)
        report = commands.verify(str(tmp_path / run / "stages/tune/model"))
        assert report.same, report.source
        tensors = load_file(tmp_path / run / "stages/tune/model/model.safetensors")
        assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
        heads.append(tensors["lm_head.weight"])
    torch.testing.assert_close(*heads, rtol=1e-5, atol=1e-6)


def test_a_tied_head_stands_in_checkpoints_and_in_no_adapter(tmp_path, monkeypatch) -> None:
    """Compared with its base, and from another folder, where the path of that leads nowhere."""
    write_random_model(tmp_path / "tied", 1, tie_word_embeddings=True)
    monkeypatch.chdir(tmp_path)
    project = Project(tmp_path, {"one": "tied"})
    project.stages["s"] = project.train(data={"asked": 1.0}, adapter={"rank": 2})
    assert project.run() == 0
    place = str(project.artifact("s").absolute())
    for folder, is_compared in ((tmp_path, True), (tmp_path / "tied", False)):
        monkeypatch.chdir(folder)
        source = commands.verify(place).source
        assert source.faults == {}
        assert (source.not_compared == []) == is_compared
