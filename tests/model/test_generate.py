"""Text from a model directory, against transformers' own generation."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from postlude.errors import UserError
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom
from postlude.model.generate import encode_prompt, generate, stream
from postlude.model.load import load_model


@pytest.fixture
def stories(shared_data):
    return str(shared_data / "models" / "stories260K_hf")


@pytest.mark.capability("Generation from any model directory")
def test_greedy_text_is_that_of_transformers(stories):
    pieces = list(generate(stories, "Once upon a time", max_tokens=40))
    tokenizer, model = AutoTokenizer.from_pretrained(stories), AutoModelForCausalLM.from_pretrained(stories)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(pieces) > 10


def test_sampling_follows_its_seed(stories):
    texts = ["".join(generate(stories, "Lily", max_tokens=30, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_model_in_training_speaks_and_goes_on_training(stories, pack):
    model = load_model(ModelFrom(path=stories), stories, None, seed=0)
    batch = pack([9, 20], vocabulary=512)
    before = model.hidden(batch)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    ids = encode_prompt(tokenizer, "Once upon a time")
    with model.plain() as causal:
        spoken = stream(causal, tokenizer, ids, max_tokens=20, temperature=0, seed=0, vocabulary=model.vocabulary)
        text = "".join(spoken)
    assert text == "".join(generate(stories, "Once upon a time", max_tokens=20))
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
    pieces = list(stream(model, tokenizer, [1], max_tokens=len(ids), temperature=0, seed=0))
    assert "".join(pieces).strip() == "naïve 日本 🙂"
    assert not any("�" in piece for piece in pieces)
    assert len(pieces) < len(ids)


def test_messages_need_a_template(stories, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(tokenizer, [{"role": "user", "content": "hello"}])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    assert (
        encode_prompt(tokenizer, [{"role": "user", "content": "hello"}])
        == tokenizer("hello!", add_special_tokens=False).input_ids
    )


def test_an_empty_prompt_begins_a_text(stories):
    assert encode_prompt(AutoTokenizer.from_pretrained(stories), "") == [1]


def test_no_model_is_a_clear_error(tmp_path):
    with pytest.raises(ManifestError, match="no model to load"):
        list(generate(str(tmp_path / "none"), "hello"))
