"""A model in files is read whole, or refused; what it becomes is the same model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom
from postlude.model.adapters.merge import config_of
from postlude.model.adapters.stored import open_model
from postlude.model.export import write_model, write_weights
from postlude.model.load import configuration, load_model
from postlude.model.sharded import open_whole

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


def test_a_tied_head_that_is_written_twice_stays_tied(files) -> None:
    change(files, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load(files).config.tie_word_embeddings is True
    with open_model(str(files)) as stored:
        assert open_whole(stored, config_of(stored))[0].config.tie_word_embeddings is True


def test_weights_without_a_place_are_refused_by_name_however_they_are_read(files) -> None:
    change(files, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(4)}))
    said = "hold 1 tensors.*q_proj.bias"
    with pytest.raises(ManifestError, match=said):
        load(files)
    with pytest.raises(ManifestError, match=said), open_model(str(files)) as stored:
        open_whole(stored, config_of(stored))
    with pytest.raises(ManifestError, match=said):
        configuration(ModelFrom(path=str(files)), str(files), None)


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
