"""Replies of any model directory, against transformers' own generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from postlude.data.batch import collate
from postlude.data.document import Document, Unit
from postlude.errors import UserError
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom, NewModel
from postlude.model.load import load_causal, load_model
from postlude.rollout.engine import Request, Sampling
from postlude.rollout.native import NativeEngine
from postlude.rollout.talk import encode_prompt, pieces, talk


@pytest.fixture
def stories(shared_data):
    return str(shared_data / "models" / "stories260K_hf")


@pytest.mark.capability("Generation from any model directory")
def test_greedy_text_is_that_of_transformers(stories):
    reply = list(talk(stories, "Once upon a time", max_tokens=40))
    tokenizer, model = AutoTokenizer.from_pretrained(stories), AutoModelForCausalLM.from_pretrained(stories)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert "".join(reply) == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(reply) > 10


@torch.no_grad()
@pytest.mark.parametrize("seed", [1, 2])
def test_sampled_text_is_drawn_by_the_seeds_generator(stories, seed):
    tokenizer, model = AutoTokenizer.from_pretrained(stories), AutoModelForCausalLM.from_pretrained(stories)
    prompt = tokenizer("Lily").input_ids
    ids, generator = list(prompt), torch.Generator().manual_seed(seed)
    for _ in range(30):
        probabilities = (model(torch.tensor([ids])).logits[0, -1] / 0.8).softmax(-1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    expected = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert "".join(talk(stories, "Lily", max_tokens=30, temperature=0.8, seed=seed)) == expected


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["lfm2", "jamba", "gemma3_text"])
def test_a_model_speaks_whatever_its_layers_are(architecture):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    layers = {
        "lfm2": {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "num_experts": 1},
        "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "head_dim": 8},
    }
    config = {**shape, **layers[architecture], "vocab_size": 512, "num_key_value_heads": 2}
    causal = load_causal(ModelFrom(new=NewModel(architecture=architecture, config=config)), None, None, seed=1)
    ids = [1, 403, 407, 261, 5, 77, 200]
    for token in NativeEngine(causal).stream(Request("", tuple(ids)), Sampling(16, frozenset(), temperature=0)):
        assert token == int(causal(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        ids.append(token)
    assert len(ids) == 23


def test_a_model_in_training_speaks_and_goes_on_training(stories):
    model = load_model(ModelFrom(path=stories), stories, None, seed=0)
    batch = collate([(Unit((Document("a", "b", np.arange(20)),)),)])
    before = model.hidden(batch)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    ids = encode_prompt(tokenizer, "Once upon a time")
    with model.plain() as causal:
        tokens = NativeEngine(causal, model.vocabulary).stream(Request("", ids), Sampling(20, frozenset(), 0))
        text = "".join(pieces(tokenizer, tokens))
    assert text == "".join(talk(stories, "Once upon a time", max_tokens=20))
    assert torch.equal(model.hidden(batch), before)


def test_characters_come_whole(stories, monkeypatch):
    """A byte-level tokenizer cuts a character into several tokens; no piece holds half of it."""
    tokenizer, model = AutoTokenizer.from_pretrained(stories), AutoModelForCausalLM.from_pretrained(stories)
    ids = tokenizer("naïve 日本 🙂", add_special_tokens=False).input_ids
    forward = model.forward
    step = iter(ids)

    def say(*arguments, **keywords):
        output = forward(*arguments, **keywords)
        output.logits[0, -1, next(step)] = 1e4
        return output

    monkeypatch.setattr(model, "forward", say)
    tokens = NativeEngine(model).stream(Request("", (1,)), Sampling(len(ids), frozenset(), temperature=0))
    text = list(pieces(tokenizer, tokens))
    assert "".join(text).strip() == "naïve 日本 🙂"
    assert not any("�" in piece for piece in text)
    assert len(text) < len(ids)


def test_messages_need_a_template(stories, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(tokenizer, [{"role": "user", "content": "hello"}])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    assert encode_prompt(tokenizer, [{"role": "user", "content": "hello"}]) == tuple(
        tokenizer("hello!", add_special_tokens=False).input_ids
    )


def test_an_empty_prompt_begins_a_text(stories):
    assert encode_prompt(AutoTokenizer.from_pretrained(stories), "") == (1,)


def test_no_model_is_a_clear_error(tmp_path):
    with pytest.raises(ManifestError, match="no model to load"):
        list(talk(str(tmp_path / "none"), "hello"))
