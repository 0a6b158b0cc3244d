"""Prompts that are tokenised apart from their answers."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from postlude.data.encode import Encoder
from postlude.data.example import Conversation, Text
from postlude.rollout.prompts import PromptEncoder, prompt_of

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} {% else %}A: {{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
CHAT = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "yes it is"}]


@pytest.mark.capability("Prompts have the same tokens in training as when they are asked")
@pytest.mark.parametrize(
    "example",
    [
        Text([("Is it good? Answer: ", 0.0), ("yes it is", 1.0)]),
        Text([("Is it good? Ans", 0.0), ("wer yes\n\n", 1.0)]),
        Text([("Once\n", 0.0), ("\nupon", 1.0)]),
        Text([("Once", 0.0), ("upon", 0.5), (" a time", 1.0)]),
        Text([("Once", 0.0), (" upon", 1.0)], end=False),
        Conversation(CHAT),
    ],
)
def test_a_prompt_has_the_tokens_that_it_is_asked_with(shared_data, example):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K_hf")
    encoder = Encoder(tokenizer, template=TEMPLATE, block=256, apart=True)
    prompt = prompt_of(example, "a:1", "a", {})
    asked = list(PromptEncoder(tokenizer, TEMPLATE).tokens(prompt))
    [encoded] = encoder.encode([("a:1", example)], "a")
    [document] = encoded.documents
    assert document.tokens[: len(asked)].tolist() == asked
    weights = document.streams["weight"]
    assert not weights[: len(asked)].any()
    assert weights[len(asked)] > 0
    said = tokenizer.decode(document.tokens, skip_special_tokens=True).rstrip()
    assert said.endswith(prompt.reference.rstrip())
