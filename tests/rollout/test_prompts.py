"""What is asked in an example, and how it is put to a model."""

from __future__ import annotations

import pytest

from postlude.data.example import Conversation, Ranked, Text, Tokens
from postlude.data.tokenizer import load_tokenizer
from postlude.manifest.schema import TokenizerFrom
from postlude.rollout.prompts import NoPrompt, PromptEncoder, prompt_of


def asked(example):
    prompt = prompt_of(example, "a:1", "a", {})
    return prompt.asked, prompt.reference


USER = {"role": "user", "content": "Hi"}
SAYS = {"role": "assistant", "content": "Hello"}


def test_the_last_turn_of_the_assistant_is_left_out():
    assert asked(Conversation([USER, SAYS])) == ([USER], "Hello")
    assert asked(Conversation([USER, SAYS, USER])) == ([USER, SAYS, USER], None)
    assert asked(Conversation([USER, {**SAYS, "weight": 0.0}, USER, SAYS])) == ([USER, SAYS, USER], "Hello")
    assert asked(Ranked([Conversation([USER, SAYS]), Conversation([USER, SAYS])])) == ([USER], "Hello")


def test_a_text_is_asked_as_far_as_it_is_given():
    assert asked(Text([("Once ", 0.0), ("upon", 1.0)])) == ("Once ", "upon")
    assert asked(Text([("Once upon", 1.0)])) == ("Once upon", None)


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (Conversation([SAYS]), "nothing comes before"),
        (Conversation([{"role": "system", "content": "Be kind."}, SAYS]), "ends with a message of the role 'system'"),
        (Text([("", 0.0), ("upon", 1.0)]), "empty"),
        (Tokens([1, 2], [0, 1]), "token ids"),
    ],
)
def test_an_example_that_asks_nothing(example, reason):
    with pytest.raises(NoPrompt, match=reason):
        asked(example)


def test_the_tokens_are_those_that_training_sees_before_the_answer():
    tokenizer = load_tokenizer(TokenizerFrom(bytes=True))
    encoder = PromptEncoder(tokenizer)
    prompt = prompt_of(Conversation([USER, SAYS]), "a:1", "a", {})
    whole = tokenizer.apply_chat_template([USER, SAYS], tokenize=False)
    ids = encoder.tokens(prompt)
    assert whole.startswith(tokenizer.decode(ids))
    assert whole[len(tokenizer.decode(ids)) :].startswith("Hello")
    assert encoder.text([*b"Hello", tokenizer.eos_token_id]) == "Hello"
    assert encoder.stop_ids() == [tokenizer.eos_token_id]
    text = prompt_of(Text([("Once ", 0.0), ("upon", 1.0)]), "a:1", "a", {})
    assert list(encoder.tokens(text)) == tokenizer("Once ").input_ids
