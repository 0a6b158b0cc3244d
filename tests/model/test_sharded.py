"""Models that ranks hold together train as the same model in one process does, on every mesh."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import meshes
from postlude.manifest.problem import ManifestError
from postlude.model import tensor_parallel
from postlude.model.weights import Extended, InMemory, Joined, Stacked, Transposed
from ranks import run_ranks

FEW = ("llama", "qwen3 tied", "gpt_oss")
LORA = {"rank": 4, "alpha": 16.0, "rslora": True}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def compared(expected, found) -> None:
    """Each number of one process and of a mesh, to 1e-5; gradients and weights relative to the largest of a tensor."""
    assert found["verified"]
    assert found["answers as handed over"]
    for losses in ("losses of SGD", "losses of AdamW"):
        assert found[losses] == pytest.approx(expected[losses], rel=1e-5)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    for kind in ("gradients", "weights"):
        assert found[kind].keys() == expected[kind].keys()
        for name, tensor in expected[kind].items():
            assert np.abs(found[kind][name] - tensor).max() <= 1e-5 * np.abs(tensor).max(), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    meshes.write_checkpoints(folder, tuple(meshes.ARCHITECTURES))
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return meshes.alone(folder, tuple(meshes.ARCHITECTURES))


@pytest.mark.capability("Models larger than one device: FSDP2 and tensor parallelism")
def test_four_ranks_train_as_one_process(folder, expected) -> None:
    for found in run_ranks("meshes:on_mesh", meshes.Mesh(str(folder), FEW, tensor=2), 4):
        for name in FEW:
            compared(expected[name], found[name])


@pytest.mark.parametrize("tensor", [1, 2])
def test_two_ranks_share_a_head_that_the_configuration_denies(folder, expected, tensor) -> None:
    name = "llama own head"
    weights = expected[name]["weights"]
    assert not np.array_equal(weights["causal.lm_head.weight"], weights["causal.model.embed_tokens.weight"])
    for found in run_ranks("meshes:on_mesh", meshes.Mesh(str(folder), (name,), tensor), 2):
        compared(expected[name], found[name])


@pytest.fixture(scope="module")
def expected_of_adapters(folder):
    return meshes.alone(folder, tuple(meshes.ARCHITECTURES), LORA)


@pytest.mark.long
def test_four_ranks_train_an_adapter_as_one_process(folder) -> None:
    found = run_ranks("meshes:on_mesh", meshes.Mesh(str(folder), FEW, tensor=2, adapter=LORA), 4)[0]
    expected = meshes.alone(folder, FEW, LORA)
    for name in FEW:
        compared(expected[name], found[name])


ON_MESHES = pytest.mark.parametrize(
    ("ranks", "tensor", "replicas"), [(2, 1, 1), (2, 2, 1), (4, 2, 1), (4, 1, 2)], ids=["2x1", "1x2", "2x2", "replicas"]
)


@pytest.mark.long
@pytest.mark.capability("Adapters: LoRA, rsLoRA, DoRA")
@ON_MESHES
def test_an_adapter_of_every_architecture_on_every_mesh(folder, expected_of_adapters, ranks, tensor, replicas) -> None:
    names = tuple(meshes.ARCHITECTURES)
    task = meshes.Mesh(str(folder), names, tensor, replicas, LORA)
    found = run_ranks("meshes:on_mesh", task, ranks)[0]
    for name in names:
        compared(expected_of_adapters[name], found[name])


@pytest.mark.capability("Adapters: LoRA, rsLoRA, DoRA")
def test_the_length_and_direction_of_sharded_weights_are_adapted_apart(folder) -> None:
    task = meshes.Mesh(str(folder), FEW[:1], adapter={**LORA, "dora": True})
    found = run_ranks("meshes:on_mesh", task, 2)[0]
    compared(meshes.alone(folder, FEW[:1], task.adapter)[FEW[0]], found[FEW[0]])


def test_directions_cannot_be_divided_and_this_is_said(folder) -> None:
    task = meshes.Mesh(str(folder), FEW[:1], tensor=2, adapter={**LORA, "dora": True})
    with pytest.raises(RuntimeError, match=r"adapter\.dora needs whole rows of the weights"):
        run_ranks("meshes:on_mesh", task, 2)


@pytest.mark.long
@pytest.mark.capability("Models larger than one device: FSDP2 and tensor parallelism")
@ON_MESHES
def test_every_architecture_on_every_mesh(folder, expected, ranks, tensor, replicas) -> None:
    names = tuple(meshes.ARCHITECTURES)
    found = run_ranks("meshes:on_mesh", meshes.Mesh(str(folder), names, tensor, replicas), ranks)[0]
    for name in names:
        compared(expected[name], found[name])


# --- what cannot be ---------------------------------------------------------------------------------------------


def on_meta(architecture: str, **changes):
    from transformers import AutoConfig

    from postlude.model import sharded, vocabulary

    causal = sharded.on_meta(AutoConfig.for_model(architecture, **{**meshes.SIZES, **changes}))
    vocabulary.pad(causal)
    return causal


@pytest.mark.parametrize(
    ("architecture", "changes", "tensor", "said"),
    [
        ("llama", {}, 3, "num_attention_heads (4)"),
        ("llama", {}, 4, "num_key_value_heads (2)"),
        ("llama", {"intermediate_size": 49}, 2, "mlp.gate_proj.weight' (49 in dimension 0)"),
        ("qwen3_moe", {**meshes.ARCHITECTURES["qwen3_moe"], "num_experts": 3}, 2, "experts.gate_up_proj' (3 in"),
        ("llama", {"vocab_size": 60}, 2, "does not divide"),
        ("gpt2", {"n_embd": 32, "n_head": 4}, 2, "no plan for tensor parallelism"),
    ],
)
def test_what_does_not_divide_is_named_before_any_work(architecture, changes, tensor, said) -> None:
    causal = on_meta(architecture, **changes)
    if changes.get("vocab_size") == 60:  # padded to 64 rows, of which the second of two ranks would have few but some
        tensor_parallel.check_divides(causal, tensor)
        tensor, changes = 64, {"num_attention_heads": 64, "num_key_value_heads": 64, "intermediate_size": 64}
        causal = on_meta(architecture, vocab_size=60, hidden_size=64, **changes)
        said = "the vocabulary (60 tokens)"
    with pytest.raises(ManifestError, match=re.escape(said)):
        tensor_parallel.check_divides(causal, tensor)


def test_an_architecture_without_a_plan_shards_its_weights_all_the_same(tmp_path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", **{**meshes.SIZES, "n_embd": 32, "n_head": 4, "n_layer": 2, **NO_DROPOUT})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    (expected,) = meshes.alone(tmp_path, ("gpt2",)).values()
    found = run_ranks("meshes:on_mesh", meshes.Mesh(str(tmp_path), ("gpt2",)), 2)[0]
    compared(expected, found["gpt2"])


def damaged(folder, tmp_path, name: str, damage) -> str:
    shutil.copytree(folder / name, tmp_path / name)
    damage(tmp_path / name)
    with pytest.raises(RuntimeError) as raised:
        run_ranks("meshes:on_mesh", meshes.Mesh(str(tmp_path), (name,)), 2)
    return str(raised.value)


def test_a_truncated_file_is_named_on_every_rank(folder, tmp_path) -> None:
    def truncate(place) -> None:
        file = place / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    said = damaged(folder, tmp_path, "llama", truncate)
    assert said.count("its file model.safetensors cannot be read") == 2


def test_a_missing_weight_is_named(folder, tmp_path) -> None:
    def leave_out(place) -> None:
        tensors = load_file(place / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, place / "model.safetensors")

    said = damaged(folder, tmp_path, "llama", leave_out)
    assert "1 weights of the architecture 'llama' are not in its files" in said
    assert "model.layers.1.mlp.up_proj.weight" in said


def test_a_weight_of_another_shape_is_named(folder, tmp_path) -> None:
    def widen(place) -> None:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))

    assert "is [48, 32] in its files, and [64, 32] by config.json" in damaged(folder, tmp_path, "llama", widen)


# --- parts of tensors ---------------------------------------------------------------------------------------------


@st.composite
def tensors_and_regions(draw):
    """A tensor that is made of others as checkpoints have them, the same whole, and a part of it."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    numbers = torch.randn(4, rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    pieces = [InMemory(piece) for piece in numbers]
    kind = draw(st.sampled_from(["joined", "stacked", "experts", "transposed", "extended"]))
    if kind == "joined":
        dimension = draw(st.integers(0, 1))
        made, whole = Joined(pieces, dimension), torch.cat(list(numbers), dimension)
    elif kind == "stacked":
        dimension = draw(st.integers(0, 2))
        made, whole = Stacked(pieces, dimension), torch.stack(list(numbers), dimension)
    elif kind == "experts":
        made = Joined([Stacked(pieces[:2], 0), Stacked(pieces[2:], 0)], 1)
        whole = torch.cat([numbers[:2], numbers[2:]], 1)
    elif kind == "transposed":
        made, whole = Transposed(pieces[0], 0, 1), numbers[0].T
    else:
        made, whole = Extended(pieces[0], rows + 3), torch.cat([numbers[0], torch.zeros(3, columns)])
    region = []
    for size in whole.shape:
        start = draw(st.integers(0, size))
        region.append(slice(start, draw(st.integers(start, size))))
    return made, whole, tuple(region)


@given(tensors_and_regions())
def test_any_part_of_a_tensor_that_is_made_of_others_can_be_read(drawn) -> None:
    made, whole, region = drawn
    assert made.shape == tuple(whole.shape)
    assert torch.equal(made.read(region), whole[region])
