"""Rendering is transformers' own, to the letter; what a template does wrong is told with its name and line."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from postlude.data.chat import Chat, ChatRenderer
from postlude.data.example import Conversation
from postlude.data.tokenizer import load_tokenizer
from postlude.errors import DataError
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import TokenizerFrom

CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "look", "arguments": {"at": "Ω", "n": 2}}}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks", "parameters": {"type": "object"}}}]
CONVERSATIONS: list[Conversation] = [
    Conversation([{"role": "user", "content": "Hi 🤗"}, {"role": "assistant", "content": " Hello\n"}]),
    Conversation(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello", "reasoning": "A greeting.", "name": None},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "<think>\nSo.\n</think>\n\nGood.", "reasoning_content": None},
        ]
    ),
    Conversation(
        [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "seen", "tool_call_id": "abcdefgh1", "name": "look"},
            {"role": "assistant", "content": "Seen."},
        ],
        TOOLS,
    ),
]


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(TokenizerFrom(bytes=True))


def hello(tokenizer: Any, template: str) -> str:
    chat = Chat.of(Conversation([{"role": "user", "content": "Hello"}]))
    return ChatRenderer(tokenizer, template).render(chat)


@pytest.mark.capability("Chat rendering with the model's own template or a given one")
def test_rendering_equals_that_of_transformers(shared_data, tokenizer):
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    folder = shared_data / "chat_templates"
    compared = 0
    for file in sorted({entry["file"] for entry in json.loads((folder / "manifest.json").read_text())}):
        renderer = ChatRenderer(tokenizer, str(folder / file))
        for conversation in CONVERSATIONS:
            for generation_prompt in (False, True):
                chat = Chat.of(conversation)
                try:
                    text = renderer.render(chat, generation_prompt)
                except DataError:
                    continue
                wanted = renderer.as_wanted(chat) if "tool_calls" in str(conversation) else conversation
                assert text == tokenizer.apply_chat_template(
                    [dict(message) for message in wanted.messages],
                    tools=conversation.tools,
                    chat_template=(folder / file).read_text(),
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                )
                assert generation_prompt or renderer.render_marked(chat)[0] == text
                compared += 1
    assert compared > 350


def test_weights_are_not_shown_to_the_template(tokenizer):
    chat = Chat.of(Conversation([{"role": "user", "content": "Hello", "weight": 0.5}]))
    assert ChatRenderer(tokenizer, "{{ messages | tojson }}").render(chat) == '[{"role": "user", "content": "Hello"}]'


def test_of_several_templates_the_one_for_tools_is_taken_where_there_are_tools(tokenizer):
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    renderer = ChatRenderer(tokenizer)
    messages = CONVERSATIONS[0].messages
    assert renderer.render(Chat.of(Conversation(messages))) == "plain"
    assert renderer.render(Chat.of(Conversation(messages, TOOLS))) == "with tools"
    for tools in (None, TOOLS):
        rendered = tokenizer.apply_chat_template([dict(m) for m in messages], tools=tools, tokenize=False)
        assert rendered == renderer.render(Chat.of(Conversation(messages, tools)))


def test_the_day_can_be_pinned(tokenizer):
    template = "{{ strftime_now('%d %B %Y') }}"
    chat = Chat.of(CONVERSATIONS[0])
    pinned = ChatRenderer(tokenizer, template, today=datetime(2031, 3, 9))
    assert pinned.render(chat) == pinned.render_marked(chat)[0] == "09 March 2031"
    assert ChatRenderer(tokenizer, template).render(chat) == datetime.now().strftime("%d %B %Y")


@pytest.mark.parametrize(
    ("template", "line", "said"),
    [
        ("\n\n{{ raise_exception('roles must alternate') }}", 3, "roles must alternate"),
        ("\n{{ messages[0].content + 1 }}", 2, "can only concatenate str"),
        ("{{ messages[7].content }}", 1, "no element 7"),
        ("{{ tools.name }}\n{{ messages[0].missing.deep }}", 2, "has no attribute 'missing'"),
        ("{{ 1 // 0 }}", 1, "by zero"),
        ("{{ ''.__class__.__mro__ }}", 1, "unsafe"),
    ],
)
def test_what_a_template_raises_names_the_template_and_the_line(tokenizer, tmp_path, template, line, said):
    file = tmp_path / "faulty.jinja"
    file.write_text(template)
    with pytest.raises(DataError, match=f"line {line}: .*{said}") as raised:
        hello(tokenizer, str(file))
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    "nested", ["{% for m in messages %}" * 30 + "{% endfor %}" * 30, "{{ " + "(" * 5000 + ")" * 5000]
)
def test_a_template_with_more_within_each_other_than_python_holds_is_refused(tokenizer, nested):
    with pytest.raises(ManifestError, match="given in the manifest does not compile: more stands within each other"):
        hello(tokenizer, nested)


def test_a_template_that_calls_itself_without_end_is_told(tokenizer):
    with pytest.raises(DataError, match="line 1: maximum recursion"):
        hello(tokenizer, "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}")


def test_a_template_that_does_not_compile_is_refused_with_its_line(tokenizer, tmp_path):
    file = tmp_path / "broken.jinja"
    file.write_text("{% for m in messages %}\n{{ m.content }}\n{% endif %}")
    with pytest.raises(ManifestError, match=r"broken\.jinja does not compile: line 3"):
        hello(tokenizer, str(file))
    with pytest.raises(ManifestError, match="given in the manifest does not compile"):
        hello(tokenizer, "{{ messages[ }}")


def test_a_template_file_that_is_missing_is_named(tokenizer, tmp_path: Path):
    with pytest.raises(ManifestError, match=r"no chat template at .*nowhere\.jinja.*data\.NAME\.template"):
        hello(tokenizer, str(tmp_path / "nowhere.jinja"))


@pytest.mark.parametrize(("own", "has"), [(None, "has none"), ({"rag": "x"}, r"several chat templates \(rag\)")])
def test_a_tokenizer_without_a_template_says_how_to_give_one(tokenizer, own, has):
    tokenizer.chat_template = own
    with pytest.raises(ManifestError, match=rf"{has}.*data\.NAME\.template"):
        ChatRenderer(tokenizer)
