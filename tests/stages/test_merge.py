"""The recipe ``merge``: the arithmetic, files of many shards, and models that do not go together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from postlude.data.tokenizer import train_tokenizer
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import TrainTokenizer
from postlude.model import weights as weight_files
from postlude.rollout.talk import talk
from postlude.stages import merging
from stages.conftest import chat, write_random_model


@pytest.fixture(autouse=True)
def without_data(project):
    """Merging reads none."""
    del project.data["asked"]


@pytest.fixture
def weights(models):
    return {name: load_file(Path(models[name]) / "model.safetensors") for name in ("one", "two")}


def merge(project, **keys):
    both = {name: {"path": project.models[name]} for name in ("one", "two")}
    project.stages["merged"] = {"recipe": "merge", "models": both, **keys}
    assert project.run() == 0
    return load_file(project.artifact("merged") / "model.safetensors")


@pytest.mark.capability("Merging models: average, task arithmetic, spherical interpolation")
def test_an_average(project, weights):
    merged = merge(project, weights={"one": 3.0})
    assert set(merged) == set(weights["one"])
    for name, tensor in merged.items():
        assert torch.allclose(tensor, 0.75 * weights["one"][name] + 0.25 * weights["two"][name], atol=1e-7)


def test_task_arithmetic(project, weights):
    merged = merge(
        project,
        method="task_arithmetic",
        base={"path": project.models["one"]},
        models={"a": {"path": project.models["two"]}, "b": {"path": project.models["two"]}},
        weights={"a": 0.5, "b": -0.2},
    )
    for name, tensor in merged.items():
        expected = weights["one"][name] + 0.3 * (weights["two"][name] - weights["one"][name])
        assert torch.allclose(tensor, expected, atol=1e-6)


def test_slerp_goes_along_an_arc(project, weights):
    merged = merge(project, method="slerp", weights={"one": 2.0, "two": 1.0})
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        one, two, between = (tensors[name].flatten().double() for tensors in (weights["one"], weights["two"], merged))
        angle = torch.acos(torch.dot(one, two) / one.norm() / two.norm())
        # A third of the way: the angle from the first is a third of the whole, in their plane.
        assert torch.acos(torch.dot(one, between) / one.norm() / between.norm()) == pytest.approx(
            float(angle / 3), abs=0.02
        )
        basis = torch.stack([one, two], 1)
        in_plane = basis @ torch.linalg.lstsq(basis, between[:, None]).solution
        assert torch.allclose(in_plane[:, 0], between, atol=1e-5)
    equal = merging.slerp(torch.ones(4), torch.ones(4), 0.3)
    assert torch.allclose(equal, torch.ones(4))
    assert torch.allclose(merging.slerp(torch.zeros(4), torch.zeros(4), 0.3), torch.zeros(4))


def test_the_artifact_is_a_model_that_the_next_stage_starts_from(project):
    project.data["asked"] = project.written("asked", [chat("1+1?", "2")])
    project.stages["sft"] = project.train(model={"from": "merged"}, data={"asked": 1.0})
    merge(project)
    assert "".join(talk(str(project.artifact("merged")), "1+1?", max_tokens=4)) is not None
    assert project.directory.stage("sft").has_artifact()
    lineage = json.loads((project.artifact("merged") / "lineage.json").read_text())
    assert lineage["models"]["one"] == {"path": project.models["one"], "weight": 1.0}


def test_many_files(project, weights, monkeypatch):
    monkeypatch.setattr(weight_files, "FILE_BYTES", 4000)
    both = {name: {"path": project.models[name]} for name in ("one", "two")}
    project.stages["merged"] = {"recipe": "merge", "models": both}
    assert project.run() == 0
    files = sorted(path.name for path in project.artifact("merged").glob("*.safetensors"))
    assert len(files) > 3
    merged = AutoModelForCausalLM.from_pretrained(project.artifact("merged")).state_dict()
    for name, tensor in weights["one"].items():
        assert torch.allclose(merged[name], (tensor + weights["two"][name]) / 2, atol=1e-7)
    # And such files are read again.
    again = {"a": {"from": "merged"}, "b": {"path": project.models["one"]}}
    project.stages["again"] = {"recipe": "merge", "models": again}
    assert project.run() == 0


def test_heads_that_score_are_merged_too(project, models):
    judges = {"one": {"path": models["judge"]}, "two": {"path": models["judge"]}}
    project.stages["merged"] = {"recipe": "merge", "models": judges}
    assert project.run() == 0
    ours, theirs = (
        load_file(Path(folder) / "scalar_head.safetensors") for folder in (project.artifact("merged"), models["judge"])
    )
    assert torch.allclose(ours["weight"], theirs["weight"])


# --- heads that are not embeddings --------------------------------------------------------------------------


def write_with_head(folder: Path, seed: int, head: str, scalar: bool = False) -> str:
    """A model whose configuration says that its head is its embedding: it is ``tied``, there ``twice``, or its ``own``;
    ``apart`` the configuration knows that it is."""
    place = write_random_model(folder, seed, scalar, tie_word_embeddings=head != "apart")
    if head in ("twice", "own"):
        beside = Path(folder, "lm_head.safetensors" if scalar else "model.safetensors")
        tensors = load_file(beside) if beside.exists() else {}
        embedding = load_file(Path(folder, "model.safetensors"))["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.flip(0).contiguous() if head == "own" else embedding
        save_file(tensors, beside, {"format": "pt"})
    return place


def state_of(folder) -> dict[str, torch.Tensor]:
    """What transformers reads, each head as it is in files."""
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    beside = Path(folder, "lm_head.safetensors")
    return {**state, **load_file(beside)} if beside.exists() else state


HEADS = [("own", "own"), ("own", "tied"), ("tied", "own"), ("twice", "own"), ("apart", "tied"), ("twice", "apart")]


@pytest.mark.parametrize(("one", "two"), [*HEADS, ("twice", "tied"), ("tied", "twice")])
@pytest.mark.parametrize("scalar", [False, True])
def test_heads_are_merged_by_what_they_are(project, tmp_path, one, two, scalar):
    places = [write_with_head(tmp_path / str(seed), seed, head, scalar) for seed, head in ((1, one), (2, two))]
    first, second = map(state_of, places)
    both = {"one": {"path": places[0]}, "two": {"path": places[1]}}
    merge(project, models=both, weights={"one": 3.0})
    merged = state_of(project.artifact("merged"))
    assert merged.keys() == first.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.75 * first[name] + 0.25 * second[name], rtol=0, atol=1e-6)
    is_tied = torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert json.loads((project.artifact("merged") / "config.json").read_text())["tie_word_embeddings"] is is_tied
    assert is_tied is ((one, two) not in HEADS)


def test_task_arithmetic_of_heads_on_a_tied_base(project, tmp_path):
    base, one = (write_with_head(tmp_path / head, seed, head) for seed, head in ((1, "tied"), (2, "own")))
    merge(project, method="task_arithmetic", base={"path": base}, models={"a": {"path": one}}, weights={"a": 0.5})
    first, second, merged = map(state_of, (base, one, project.artifact("merged")))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.5 * first[name] + 0.5 * second[name], rtol=0, atol=1e-6)


def test_a_head_that_should_be_there_is_missed(project, tmp_path):
    own, lacking = (write_with_head(tmp_path / str(seed), seed, "apart") for seed in (1, 2))
    tensors = load_file(Path(lacking) / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, Path(lacking) / "model.safetensors", {"format": "pt"})
    project.stages["merged"] = {"recipe": "merge", "models": {"one": {"path": own}, "two": {"path": lacking}}}
    with pytest.raises(ManifestError, match=r"only 'one' has the tensor 'lm_head\.weight'"):
        project.run()


# --- what is wrong ------------------------------------------------------------------------------------------


def test_models_that_are_not_alike_are_named(project, tmp_path, models):
    wide = write_random_model(tmp_path / "wide", 1, intermediate_size=48)
    deep = write_random_model(tmp_path / "deep", 1, num_hidden_layers=2)
    large = write_random_model(tmp_path / "large", 1, vocab_size=300)
    cases = {
        wide: r"'one' .* and 'other' .*/wide\) cannot be merged: the tensor 'model.layers.0.mlp.down_proj.weight' is",
        deep: r"only 'other' has the tensor 'model.layers.1",
        large: r"vocabularies have 260 and 300 tokens",
        models["judge"]: r"'other' has a head that scores and 'one' has none",
    }
    for number, (other, said) in enumerate(cases.items()):
        project.manifest["name"] = f"unlike-{number}"
        both = {"one": {"path": project.models["one"]}, "other": {"path": other}}
        project.stages["merged"] = {"recipe": "merge", "models": both}
        with pytest.raises(ManifestError, match=said):
            project.run()
        assert not project.directory.stage("merged").has_artifact()


def test_vocabularies_of_one_size_with_other_tokens(project, tmp_path):
    other = write_random_model(tmp_path / "other", 1)
    tokenizer = train_tokenizer(TrainTokenizer(kind="bpe", vocabulary=260), ["some text"])
    tokenizer.save_pretrained(other)
    both = {"one": {"path": project.models["one"]}, "other": {"path": other}}
    project.stages["merged"] = {"recipe": "merge", "models": both}
    assert "in the vocabulary of the one" in str(project.validate().error)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": "task_arithmetic"}, "which needs it"),
        ({"base": {"path": "x"}}, "belongs to 'method: task_arithmetic'"),
        ({"weights": {"tree": 1.0}}, "names tree"),
        ({"weights": {"one": -1.0}}, "from 0"),
        ({"models": {"one": {"path": "x"}}}, "needs two"),
        ({"models": {"one": {"path": "x"}}, "method": "slerp"}, "between two models, not 1"),
        ({"method": "mean"}, "average"),
    ],
)
def test_a_merge_that_cannot_be(project, keys, said):
    both = {name: {"path": project.models[name]} for name in ("one", "two")}
    project.stages["merged"] = {"recipe": "merge", "models": both, **keys}
    assert said in str(project.validate().error)
