"""Models from configurations and checkpoints, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom, NewModel
from postlude.model.export import write_model
from postlude.model.load import configuration, count_parameters, load_causal, load_model

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def tokenizer_of(size: int, **special: str) -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(size - 2)} | {"<s>": size - 2, "</s>": size - 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        bos_token="<s>",
        eos_token="</s>",
        **special,
    )


def new(architecture: str = "qwen3", **changes) -> ModelFrom:
    return ModelFrom(new=NewModel(architecture=architecture, config={**SMALL, **changes}))


@pytest.mark.capability("New models from a configuration")
def test_a_new_model_follows_its_tokenizer_and_its_seed():
    tokenizer = tokenizer_of(90)
    first, same, other = (load_model(new(), None, tokenizer, seed=seed) for seed in (3, 3, 4))
    assert (first.vocabulary, first.config.eos_token_id, first.config.bos_token_id) == (90, 89, 88)
    weights = [model.causal.state_dict() for model in (first, same, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_making_a_new_model_draws_nothing_from_the_callers_randomness():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_model(new(vocab_size=70), None, None, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_an_end_token_that_pads_too_is_still_learned():
    model = load_model(new(), None, tokenizer_of(90, pad_token="</s>"), seed=0)
    assert model.causal.get_input_embeddings().padding_idx is None


def test_parameters_are_counted_without_allocating_them():
    config = configuration(new(vocab_size=70, tie_word_embeddings=True), None, None)
    model = load_model(new(vocab_size=64, tie_word_embeddings=True), None, None, seed=0)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters()) + 6 * 64
    wide = configuration(
        new(hidden_size=8192, num_hidden_layers=80, intermediate_size=28672, vocab_size=128256), None, None
    )
    assert count_parameters(wide) > 50e9


@pytest.mark.parametrize(
    ("architecture", "changes", "says"),
    [
        ("qwen33", {}, "'qwen33'.*Did you mean 'qwen3'"),
        ("bertt", {}, "'bertt' is not an architecture"),
        ("qwen3", {"hiden_size": 8}, "'hiden_size' is not a key.*'qwen3'.*Did you mean 'hidden_size'"),
        ("qwen3", {"hidden_size": "wide"}, "no 'qwen3' can be made.*hidden_size"),
        ("qwen3", {"layer_types": ["dense", "dense"]}, "no 'qwen3' can be made.*layer_types"),
        ("qwen3", {"vocab_size": 50}, "ids up to 89.*vocabulary of 50 tokens"),
    ],
)
def test_a_new_model_that_cannot_be_is_an_error(architecture, changes, says):
    with pytest.raises(ManifestError, match=f"(?s){says}"):
        load_model(new(architecture, **changes), None, tokenizer_of(90), seed=0)


@pytest.fixture
def checkpoint(tmp_path):
    tokenizer = tokenizer_of(90)
    model = load_model(new(), None, tokenizer, seed=0)
    write_model(model, tokenizer, tmp_path / "model", {}, torch.bfloat16)
    return tmp_path / "model"


def load(folder, tokenizer=None):
    return load_model(ModelFrom(path=str(folder)), str(folder), tokenizer, seed=0)


def test_master_weights_are_fp32_and_the_stored_dtype_is_remembered(checkpoint):
    model = load(checkpoint)
    assert model.stored_dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_dtype_that_the_config_does_not_tell_is_read_from_the_weights(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    del config["dtype"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = load(checkpoint)
    assert model.stored_dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_missing_weight_is_an_error_not_a_random_one(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ManifestError, match=r"incomplete: 1 weights.*layers.1.mlp.up_proj"):
        load(checkpoint)


def test_a_cut_off_file_is_an_error(checkpoint):
    content = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ManifestError, match="cannot be loaded"):
        load(checkpoint)


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ManifestError, match="no model to load at"):
        load(tmp_path / "nowhere")


def test_quantised_weights_are_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ManifestError, match="quantised"):
        load(checkpoint)


def test_a_tokenizer_that_does_not_fit_names_both_sizes(checkpoint):
    with pytest.raises(ManifestError, match=r"ids up to 99.*vocabulary of 90 tokens"):
        load(checkpoint, tokenizer_of(100))
    load(checkpoint, tokenizer_of(80))


def test_a_remote_model_is_the_same_as_a_local_one(checkpoint):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(checkpoint), "/models/tiny", recursive=True)
    remote, local = load("memory://models/tiny"), load(checkpoint)
    weights = local.causal.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in remote.causal.state_dict().items())


def test_a_configuration_alone_can_be_read(checkpoint):
    config = configuration(ModelFrom(path=str(checkpoint)), str(checkpoint), None)
    assert (config.model_type, config.vocab_size) == ("qwen3", 90)


LITTLE = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


def test_weights_in_half_precision_leave_positions_as_they_are() -> None:
    start = ModelFrom(new=NewModel(architecture="llama", config={"hidden_size": 16, **LITTLE}))
    half = load_causal(start, None, None, seed=0, dtype=torch.bfloat16)
    whole = load_causal(start, None, None, seed=0)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    buffers = dict(whole.named_buffers())
    assert buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in half.named_buffers())
