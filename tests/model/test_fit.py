"""A model in files is read whole, or refused; what it becomes is the same model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from postlude.manifest.adapter import Adapter
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom
from postlude.model.adapters.merge import config_of
from postlude.model.adapters.stored import open_model
from postlude.model.attached import AdapterRequest
from postlude.model.export import write_model, write_weights
from postlude.model.load import configuration, load_model, weights_are_checked
from postlude.model.sharded import open_whole
from postlude.model.weights import read_whole
from postlude.rollout.serving.sender import pack

IDS = torch.tensor([[5, 17, 3, 99, 42, 8]])


@pytest.fixture
def tokenizer(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K_hf")


@pytest.fixture
def files(tiny, tokenizer, tmp_path):
    """The folder of a model whose configuration ties its head."""
    write_model(tiny("qwen3", tie_word_embeddings=True), tokenizer, tmp_path / "base", {})
    return tmp_path / "base"


def change(folder, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def own_head(tensors) -> None:
    tensors["lm_head.weight"] = torch.randn(tensors["model.embed_tokens.weight"].shape)


def load(folder):
    return load_model(ModelFrom(path=str(folder)), str(folder), None, seed=0)


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits


@pytest.mark.parametrize("write", ["artifact", "engine"])
def test_a_head_of_its_own_is_kept_where_the_configuration_ties_it(files, tokenizer, tmp_path, write) -> None:
    change(files, own_head)
    model = load(files)
    out = tmp_path / "out"
    if write == "artifact":
        write_model(model, tokenizer, out, {})
    else:
        out.mkdir()
        write_weights(model, out, torch.float32)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(logits(out), logits(files))


def test_a_head_of_its_own_is_kept_by_what_reads_in_parts(files) -> None:
    with open_model(str(files)) as stored:
        assert open_whole(stored, config_of(stored))[0].config.tie_word_embeddings is True
    change(files, own_head)
    with open_model(str(files)) as stored:
        assert open_whole(stored, config_of(stored))[0].config.tie_word_embeddings is False


@pytest.mark.parametrize("merge", [True, False])
def test_engines_get_a_head_of_its_own_beside_an_adapter(files, tmp_path, merge) -> None:
    change(files, own_head)
    request = AdapterRequest(Adapter(rank=2), 0, lambda stored: torch.float32)
    model = load_model(ModelFrom(path=str(files)), str(files), None, seed=0, adapter=request)
    write_weights(model, tmp_path, torch.float32, merge)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(logits(tmp_path), logits(files))
    assert "lm_head.weight" in [name for layouts in pack(tmp_path) for name, _, _ in layouts]


def test_a_tied_head_that_is_written_twice_stays_tied(files) -> None:
    change(files, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load(files).config.tie_word_embeddings is True
    with open_model(str(files)) as stored:
        assert open_whole(stored, config_of(stored))[0].config.tie_word_embeddings is True


BIAS = "model.layers.0.self_attn.q_proj.bias"
LAYER = "model.layers.7.mlp.up_proj.weight"


@pytest.mark.parametrize("name", [BIAS, LAYER])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "bins"])
def test_weights_without_a_place_are_refused_by_name_however_they_are_read(files, name, kind) -> None:
    change(files, lambda t: t.update({name: torch.ones(4)}))
    if kind != "safetensors":
        pickle(files, 1 if kind == "bin" else 2)
    said = f"hold 1 tensors.*{name}"
    with pytest.raises(ManifestError, match=said):
        load(files)
    with pytest.raises(ManifestError, match=said), open_model(str(files)) as stored:
        open_whole(stored, config_of(stored))
    with pytest.raises(ManifestError, match=said):
        configuration(ModelFrom(path=str(files)), str(files), None)
    with pytest.raises(ManifestError, match=said):
        weights_are_checked(str(files))


def pickle(folder, parts: int) -> None:
    """Write the weights of a folder as torch once did: in one file, or in several with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"pytorch_model-{part}.bin" for part in range(parts)] if parts > 1 else ["pytorch_model.bin"]
    shares = dict(zip(sorted(tensors), names * len(tensors), strict=False))
    for file in names:
        torch.save({name: tensor for name, tensor in tensors.items() if shares[name] == file}, folder / file)
    if parts > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shares}))


@pytest.mark.parametrize("parts", [1, 2])
def test_pickled_weights_are_the_same_model(files, parts) -> None:
    change(files, own_head)
    whole = load_file(files / "model.safetensors")
    pickle(files, parts)
    assert weights_are_checked(str(files))
    with open_model(str(files)) as stored:
        causal, sources = open_whole(stored, config_of(stored))
        assert causal.config.tie_word_embeddings is False
        assert sources.keys() == whole.keys()
        assert all(torch.equal(read_whole(source), whole[name]) for name, source in sources.items())
    cut = next(files.glob("*.bin"))
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ManifestError, match=f"its file {cut.name} cannot be read"):
        weights_are_checked(str(files))


@pytest.mark.parametrize("lost", ["3.gate_proj", "3.down_proj", "0.up_proj"])
def test_an_expert_that_is_not_there_is_missed(tiny, tokenizer, tmp_path, lost) -> None:
    write_model(tiny("qwen3_moe"), tokenizer, tmp_path, {})
    change(tmp_path, lambda t: t.pop(f"model.layers.1.mlp.experts.{lost}.weight"))
    with pytest.raises(ManifestError, match=r"layers.1.mlp.experts"), open_model(str(tmp_path)) as stored:
        open_whole(stored, config_of(stored))


def test_experts_of_a_layer_too_many_are_named(tiny, tokenizer, tmp_path) -> None:
    write_model(tiny("qwen3_moe"), tokenizer, tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("layer_types", "mlp_layer_types"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    for read in (load, lambda folder: weights_are_checked(str(folder))):
        with pytest.raises(ManifestError, match=r"model.layers.1"):
            read(tmp_path)
    with pytest.raises(ManifestError, match=r"model.layers.1.mlp.experts"), open_model(str(tmp_path)) as stored:
        open_whole(stored, config_of(stored))


def test_of_files_that_are_not_here_it_is_said_that_nothing_was_looked_at(files) -> None:
    import fsspec

    fsspec.filesystem("memory").put(str(files), "/models/far", recursive=True)
    assert not weights_are_checked("memory://models/far")
    assert weights_are_checked(str(files))


def test_masks_in_older_files_are_told_and_buffers_that_are_computed_are_not(files, recwarn) -> None:
    change(files, lambda t: t.update({"model.layers.0.self_attn.masked_bias": torch.ones(1)}))
    with pytest.warns(UserWarning, match="neither read nor written.*masked_bias"):
        load(files)


@pytest.mark.parametrize(
    ("stored", "written"),
    [
        ({"do_sample": False, "temperature": 0.6}, {"do_sample": False, "temperature": 0.6}),
        ({"temperature": 0.6}, {"do_sample": True, "temperature": 0.6}),
        ({"do_sample": True, "top_p": 0.9}, {"do_sample": True, "top_p": 0.9}),
    ],
)
@pytest.mark.filterwarnings("ignore:The model's generation config")
def test_what_the_base_says_of_generation_is_written_with_the_stop_tokens(
    files, tokenizer, tmp_path, stored, written
) -> None:
    (files / "generation_config.json").write_text(json.dumps({**stored, "eos_token_id": [7], "custom": 3}))
    write_model(load(files), tokenizer, tmp_path / "out", {}, stop_ids=[9])
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: found.get(key) for key in written} == written
    assert found["eos_token_id"] == [7, tokenizer.eos_token_id, 9]
    assert GenerationConfig.from_pretrained(tmp_path / "out").do_sample is written["do_sample"]
