"""What a template does not print is told, and refused where it was to be trained; it is given the form it wants."""

from __future__ import annotations

from typing import Any

import pytest

from postlude.data.chat import Chat, ChatRenderer, StopTokens
from postlude.data.example import Conversation
from postlude.data.masks import Masker, UnprintedError
from postlude.data.tokenizer import load_tokenizer
from postlude.data.unprinted import Omission, unprinted
from postlude.manifest.schema import TokenizerFrom

TOKENIZER = load_tokenizer(TokenizerFrom(bytes=True))
BARE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
WHOLE = Conversation(
    [
        {"role": "developer", "content": "In French."},
        {"role": "user", "content": "1+1?", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "One and one."},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "<think>Two it is.</think>deux"},
    ],
    TOOLS,
)


def omissions(template: str, conversation: Conversation = WHOLE) -> list[Omission]:
    renderer, chat = ChatRenderer(TOKENIZER, template), Chat.of(conversation)
    return unprinted(renderer.render, chat, renderer.render(chat))


def masker(template: str, **settings: Any) -> Masker:
    return Masker(ChatRenderer(TOKENIZER, template), StopTokens(TOKENIZER), "assistant", **settings)


@pytest.mark.capability("What a chat template does not print is told, and refused where it was to be trained")
def test_everything_that_is_left_out_is_named() -> None:
    left = [Omission("names", 1), Omission("reasoning", 2), Omission("tool_calls", 2), Omission("tools", None)]
    assert sorted(map(str, omissions(BARE))) == sorted(map(str, left))
    without_developer = BARE.replace("messages %}", "messages if m.role != 'developer' %}")
    assert Omission("developer", 0) in omissions(without_developer)
    cut = BARE.replace("m.content }}", "m.content.split('</think>')[-1] }}")
    assert Omission("reasoning", 4) in omissions(cut)
    assert omissions("{{ messages | tojson }}{{ tools | tojson }}") == []


def test_a_call_that_is_not_the_last_counts_too() -> None:
    last = BARE.replace(
        "{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[-1] | tojson }}{% endif %}"
    )
    twice = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    assert Omission("tool_calls", 1) in omissions(last, Conversation([{"role": "user", "content": "?"}, twice]))


def test_a_trained_turn_that_loses_something_is_refused_unless_that_is_allowed() -> None:
    talk = Conversation(
        [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "2", "reasoning_content": "One and one."},
        ]
    )
    with pytest.raises(UnprintedError, match=r"message 2 .* its reasoning.*template.*drop_unprinted to \[reasoning\]"):
        masker(BARE).mask(talk)
    masked = masker(BARE, drop_unprinted=["reasoning"]).mask(talk)
    assert masked.unprinted == {"reasoning"}
    assert masked.spans
    untrained = Conversation([*talk.messages, {"role": "user", "content": "?"}, {"role": "assistant", "content": "3"}])
    untrained.messages[1]["weight"] = 0  # type: ignore[index]
    assert masker(BARE).mask(untrained).unprinted == {"reasoning"}


def test_a_template_that_wants_arguments_as_text_gets_text() -> None:
    template = BARE.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.arguments }}{% endfor %}",
    )
    assert '<call>{"city": "Rome"}' in ChatRenderer(TOKENIZER, template).render(Chat.of(WHOLE))
    printed = template.replace("'<call>' + c.function.arguments", "c.function.arguments")
    assert '{"city": "Rome"}' in ChatRenderer(TOKENIZER, printed).render(Chat.of(WHOLE))


def test_a_template_that_wants_parts_gets_parts() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    )
    talk = Conversation([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}])
    assert ChatRenderer(TOKENIZER, template).render(Chat.of(talk)) == "[user]1+1?<|im_end|>[assistant]2<|im_end|>"
    masked = masker(template).mask(talk)
    assert [masked.text[start:end] for start, end, _ in masked.spans] == ["2<|im_end|>"]
