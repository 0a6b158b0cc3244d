"""What is written can be loaded by anything that reads Hugging Face directories, and is the same model."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from postlude.manifest.schema import ModelFrom
from postlude.model.export import write_model
from postlude.model.load import load_model
from postlude.model.places import SCALAR_FILE
from postlude.model.verify import verify

IDS = torch.tensor([[5, 17, 3, 99, 42, 8]])


@pytest.fixture
def tokenizer(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K_hf")


@pytest.mark.capability("Artifacts that transformers loads")
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3_moe", {}),
        ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("phi", {}),
        ("gpt2", {}),
    ],
)
def test_the_artifact_has_the_logits_of_the_model_and_its_real_vocabulary(
    tiny, tokenizer, tmp_path, architecture, changes
):
    model = tiny(architecture, **changes)
    with model.plain() as causal:
        expected = causal(input_ids=IDS).logits[..., :100]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_model(model, tokenizer, tmp_path, {"stage": "sft", "versions": {"postlude": "0"}})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.vocab_size == 100
    assert loaded.get_input_embeddings().weight.shape[0] == 100
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, expected.detach())
    assert json.loads((tmp_path / "lineage.json").read_text())["stage"] == "sft"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path)("once").input_ids == tokenizer("once").input_ids


def test_a_real_model_goes_through_unchanged(shared_data, tokenizer, tmp_path):
    path = shared_data / "models" / "stories260K_hf"
    model = load_model(ModelFrom(path=str(path)), str(path), tokenizer, seed=0)
    write_model(model, tokenizer, tmp_path, {})
    original = AutoModelForCausalLM.from_pretrained(path).state_dict()
    written = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert original.keys() == written.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in written.items())


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (None, None, torch.float32),
        (torch.bfloat16, torch.float16, torch.float16),
    ],
)
def test_the_dtype_of_the_files(tiny, tokenizer, tmp_path, stored, asked, written):
    model = tiny("llama")
    model.stored_dtype = stored
    write_model(model, tokenizer, tmp_path, {}, asked)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == written
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_chat_template_and_the_end_of_a_turn_go_along(tiny, tokenizer, tmp_path):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = tiny("llama")
    model.causal.generation_config = GenerationConfig(eos_token_id=7, temperature=0.7)  # as published models have it
    write_model(model, tokenizer, tmp_path, {})
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    written = GenerationConfig.from_pretrained(tmp_path)
    assert written.eos_token_id == [7, tokenizer.eos_token_id]
    assert written.temperature == 0.7


def test_a_scalar_head_survives(tiny, tokenizer, tmp_path, pack):
    model = tiny("llama")
    model.add_scalar_head(seed=9)
    write_model(model, tokenizer, tmp_path, {})
    assert (tmp_path / SCALAR_FILE).exists()
    loaded = load_model(ModelFrom(path=str(tmp_path)), str(tmp_path), None, seed=0).eval()
    batch = pack([7, 9])
    assert torch.equal(loaded.head("scalar")(loaded.hidden(batch)), model.head("scalar")(model.hidden(batch)))


@pytest.mark.capability("Verification of packed logits against transformers")
def test_verification_agrees_where_the_model_is_right_and_differs_where_it_is_not(tiny, monkeypatch):
    model = tiny("gemma2")
    report = verify(model)
    assert report.exit_code == 0
    assert report.to_json()["same"] is True
    assert max(document.tokens for document in report.documents) > 100
    assert all(document.max_relative_error < 1e-5 for document in report.documents)
    from postlude.model import kernels

    spans = kernels.spans  # a window that reaches one token too far
    monkeypatch.setattr(kernels, "spans", lambda lengths, window: spans(lengths, window and window + 1))
    report = verify(model)
    assert report.exit_code == 1
    assert any(document.max_relative_error > report.tolerance for document in report.documents)
    console = Console(width=80, file=io.StringIO())
    console.print(report.render())
    shown = console.file.getvalue()
    assert all(f"{document.max_absolute_error:.2e}" in shown for document in report.documents)


def test_verification_takes_given_documents(tiny):
    report = verify(tiny("llama"), [[1, 2, 3], [4, 5]])
    assert [document.tokens for document in report.documents] == [3, 2]
