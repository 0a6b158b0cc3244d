"""Packed training of each architecture against transformers' own forward pass of each document alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from postlude.model.anatomy import UnsupportedModel

FULL_AND_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}

ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen2 sliding": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {},
    "gemma": {},
    "gemma2": {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 20},
    "gemma3_text": {**FULL_AND_SLIDING, "query_pre_attn_scalar": 20},
    "mistral": {},
    "mixtral": {},
    "phi": {},
    "phi3": FULL_AND_SLIDING,
    "smollm3": {"no_rope_layers": [1, 0]},
    "gpt_oss": FULL_AND_SLIDING,
    "granite": {"logits_scaling": 8.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "olmo2": {},
    "olmo3": FULL_AND_SLIDING,
    "nanochat": {},
    "deepseek_v3": {"num_key_value_heads": 4},
    "glm4": {},
    "starcoder2": {},
    "gpt_neox": {},
    "gpt2": {"resid_pdrop": 0.0},
    "opt": {},
}

LENGTHS = (7, 1, 24, 2, 13)


def weighted_loss(logits: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (F.cross_entropy(logits[:-1].float(), tokens[1:], reduction="none") * weight[1:]).sum()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.causal.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.capability("Packed training of any causal transformer")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pack_gives_the_logits_and_gradients_of_each_document_alone(tiny, pack, name):
    model = tiny(name.split()[0], **ARCHITECTURES[name])
    batch = pack(LENGTHS)
    packed = model.logits(model.hidden(batch)).split(LENGTHS)
    documents = list(zip(batch.tokens.split(LENGTHS), batch.weight.split(LENGTHS), strict=True))
    sum(weighted_loss(part, *document) for part, document in zip(packed, documents, strict=True)).backward()
    ours = gradients(model)
    with model.plain() as causal:
        alone = [causal(input_ids=ids[None], use_cache=False).logits[0, :, : model.vocabulary] for ids, _ in documents]
        sum(weighted_loss(part, *document) for part, document in zip(alone, documents, strict=True)).backward()
    theirs = gradients(model)
    largest = max(float(part.detach().abs().max()) for part in alone)
    for part, expected in zip(packed, alone, strict=True):
        assert float((part - expected).detach().abs().max()) < 3e-6 * largest
    assert ours.keys() == theirs.keys()
    norm = torch.stack([gradient.abs().max() for gradient in theirs.values()]).max()
    for key, gradient in theirs.items():
        assert float((ours[key] - gradient).abs().max()) < 1e-5 * norm, key


@pytest.mark.capability("Packed training of any causal transformer")
def test_a_real_model_computes_the_same_on_a_pack(shared_data, pack):
    from transformers import AutoModelForCausalLM

    from postlude.manifest.schema import ModelFrom
    from postlude.model.load import load_model

    path = str(shared_data / "models" / "stories260K_hf")
    model = load_model(ModelFrom(path=path), path, None, seed=0).eval()
    batch = pack([50, 3, 120, 31], vocabulary=512)
    packed = model.logits(model.hidden(batch)).detach().split(batch.lengths.tolist())
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    for part, ids in zip(packed, batch.tokens.split(batch.lengths.tolist()), strict=True):
        expected = plain(input_ids=ids[None]).logits[0].detach()
        assert float((part - expected).abs().max()) < 2e-6 * float(expected.abs().max())


REFUSED = {
    "llama4_text": ({}, "chunks"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "only 1 of its 2 layers"),
    "qwen3_next": ({"layer_types": ["linear_attention", "full_attention"]}, "only 1 of its 2 layers"),
    "mamba": ({}, "only 0 of its 2 layers"),
    "bloom": ({}, "only 0 of its 2 layers"),
    "falcon_h1": ({"mamba_d_ssm": 64, "mamba_n_heads": 4}, "from one document to the next"),
    "nemotron": ({}, "does not hand the documents"),
    "phimoe": ({}, "window of 5 but asks for None"),
    "bert": ({}, "neither causal nor a sliding window"),
    "modernbert-decoder": ({"pad_token_id": 0}, "turns its last hidden states into logits"),
}


@pytest.mark.capability("Refusal of architectures that would leak between documents")
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_leak_or_is_not_understood_is_refused_by_name(tiny, name):
    changes, reason = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=f"(?s)'{name}'.*{reason}") as refusal:
        tiny(name, **changes)
    assert refusal.value.exit_code == 2


def test_a_leak_too_faint_for_the_numbers_is_still_found(tiny, monkeypatch):
    """A layer that adds a trace of the token before it, across document borders, 1e-7 of its size."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward

    def leaking(self, hidden):
        return forward(self, hidden) + 1e-7 * F.pad(hidden, (0, 0, 1, 0))[:, :-1]

    monkeypatch.setattr(LlamaMLP, "forward", leaking)
    with pytest.raises(UnsupportedModel, match="from one document to the next"):
        tiny("llama")
