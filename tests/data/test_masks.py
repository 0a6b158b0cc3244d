"""Masks against templates whose rendering is written a second time, in Python, with the span of each turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postlude.data.chat import Chat, ChatRenderer, StopTokens
from postlude.data.example import BadRecord, Conversation
from postlude.data.masks import Masker
from postlude.data.tokenizer import CHATML, load_tokenizer
from postlude.data.turns import MaskError, Turns
from postlude.manifest.schema import TokenizerFrom, TrainOnSpans, Unprinted

TOKENIZER = load_tokenizer(TokenizerFrom(bytes=True))
STOP_TOKENS = StopTokens(TOKENIZER)
EVERYTHING = get_args(Unprinted)
"""These tests are of spans: what a template leaves out is allowed."""

Messages = list[dict[str, Any]]
Piece = tuple[str, int | None]
"""A text, and the message in whose turn of the assistant it is."""


def masker(template: str, train_on: Any = "assistant") -> Masker:
    return Masker(ChatRenderer(TOKENIZER, template), STOP_TOKENS, train_on, EVERYTHING)


def trained(
    template: str, messages: Messages, train_on: Any = "assistant", tools: Any = None
) -> list[tuple[str, float]]:
    masked = masker(template, train_on).mask(Conversation(messages, tools))
    return [(masked.text[start:end], weight) for start, end, weight in masked.spans]


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


# --- templates, and what they do -------------------------------------------------------------------------------

PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

PLAIN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
TRIMMING = PLAIN.replace("m.content", "m.content | trim")
LSTRIPPING = PLAIN.replace("m.content", "m.content.lstrip('\n')")
WITHOUT_TAGS = (
    "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content.strip() + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
TEXT_TAGS = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '[/' + m.role + ']\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + PROMPT
)
THINKING = (
    "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set content = '<think>\n' + thought + '\n</think>\n\n' + content %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)


def _chatml(clean: Callable[[str], str]) -> Callable[[Messages], list[Piece]]:
    def pieces(messages: Messages) -> list[Piece]:
        found: list[Piece] = []
        for i, message in enumerate(messages):
            turn = i if message["role"] == "assistant" else None
            content = clean(message["content"])
            found += [(f"<|im_start|>{message['role']}\n", None), (content, turn), ("<|im_end|>", turn), ("\n", None)]
        return found

    return pieces


def _without_tags(messages: Messages) -> list[Piece]:
    found: list[Piece] = []
    for i, message in enumerate(messages):
        content = message["content"].strip()
        found += [("Q: " + content, None)] if message["role"] == "user" else [("A:", None), (" " + content, i)]
        found.append(("\n\n", None))
    return found


def _text_tags(messages: Messages) -> list[Piece]:
    found: list[Piece] = []
    for i, message in enumerate(messages):
        role = message["role"]
        turn = i if role == "assistant" else None
        found += [(f"[{role}]", None), (message["content"], turn), (f"[/{role}]", turn), ("\n", None)]
    return found


def _forgetful(messages: Messages) -> list[Piece]:
    shown = [m for i, m in enumerate(messages) if i == len(messages) - 1 or m["role"] != "assistant"]
    return _chatml(str)(shown)


def _thinking(messages: Messages) -> list[Piece]:
    shown = []
    for i, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "assistant" and "</think>" in content:
            thought = content.split("</think>")[0].split("<think>")[-1].strip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
            if i == len(messages) - 1:
                content = f"<think>\n{thought}\n</think>\n\n{content}"
        shown.append({**message, "content": content})
    return _chatml(str)(shown)


# Jinja's trim and Python's strip take the same characters; lstrip only line ends.
TEMPLATES = {
    "plain": (PLAIN, _chatml(str)),
    "trimming": (TRIMMING, _chatml(str.strip)),
    "lstripping": (LSTRIPPING, _chatml(lambda text: text.lstrip("\n"))),
    "without tags": (WITHOUT_TAGS, _without_tags),
    "text tags": (TEXT_TAGS, _text_tags),
    "forgetful": (FORGETFUL, _forgetful),
    "thinking": (THINKING, _thinking),
}

TAGS = [
    "<|im_start|>",
    "<|im_end|>",
    "assistant\n",
    "[/assistant]",
    "<think>",
    "</think>",
    "A:",
    "\r\n",
    "{{",
    "e\u0301",
]
SIGNS = "ab \n\t<>[]|/\ue000\ue001\uf8ff\U000f0000\u200b\u3000🤗\u202e\x85"
"""Among them the first and the last of the characters that sentinels are taken from."""
NASTY = st.lists(st.sampled_from([*TAGS, *SIGNS]), max_size=8).map("".join)
CONVERSATION = st.lists(st.tuples(NASTY, NASTY), min_size=1, max_size=3).map(
    lambda turns: [message for asked, said in turns for message in (user(asked), assistant(said))]
)


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=CONVERSATION)
@settings(max_examples=40)
def test_spans_are_the_turns(name, messages):
    check_against_reference(name, messages)


@pytest.mark.long
@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=CONVERSATION)
@settings(max_examples=2000)
def test_spans_are_the_turns_at_length(name, messages):
    check_against_reference(name, messages)


def check_against_reference(name: str, messages: Messages) -> None:
    template, reference = TEMPLATES[name]
    pieces = reference(messages)
    masked = masker(template).mask(Conversation(messages))
    assert masked.text == "".join(text for text, _ in pieces)
    turns: dict[int, list[tuple[int, str]]] = {}
    position = 0
    for text, turn in pieces:
        if turn is not None:
            turns.setdefault(turn, []).append((position, text))
        position += len(text)
    # A turn in which nothing is said trains nothing, not even its end.
    said = [parts for parts in turns.values() if parts[0][1].strip()]
    assert masked.spans == [(parts[0][0], parts[-1][0] + len(parts[-1][1]), 1.0) for parts in said]


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=CONVERSATION)
@settings(max_examples=25)
def test_a_shape_gives_what_the_proof_of_the_conversation_gives(name, messages):
    renderer = ChatRenderer(TOKENIZER, TEMPLATES[name][0])
    chat = Chat.of(Conversation(messages))
    turns = Turns(renderer, STOP_TOKENS, chat)
    spans = turns.spans([i for i, message in enumerate(messages) if message["role"] == "assistant"])
    direct = [(start, end, 1.0) for several in spans.values() for start, end in several]
    assert Masker(renderer, STOP_TOKENS, "assistant", EVERYTHING).mask(Conversation(messages)).spans == direct


# --- which turns, and how much they count ----------------------------------------------------------------------

TALK = [user("one"), assistant("two"), user("three"), assistant("four")]
MARKED = PLAIN.replace(
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["proven", "marked"])
@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", ["two", "four"]),
        ("last", ["four"]),
        (["user"], ["one", "three"]),
        (["user", "assistant"], ["one", "two", "three", "four"]),
        (["system"], []),
    ],
)
def test_train_on_chooses_the_turns(template, train_on, expected):
    assert trained(template, TALK, train_on) == [(text + "<|im_end|>", 1.0) for text in expected]


@pytest.mark.capability("Weights of single messages")
@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["proven", "marked"])
def test_a_weight_scales_the_turn_of_its_message_and_zero_takes_it_out(template):
    messages = [user("one", weight=3.0), assistant("two", weight=0.5), user("three"), assistant("four", weight=0)]
    assert trained(template, messages) == [("two<|im_end|>", 0.5)]
    assert trained(template, messages, ["user", "assistant"]) == [
        ("one<|im_end|>", 3.0),
        ("two<|im_end|>", 0.5),
        ("three<|im_end|>", 1.0),
    ]
    assert trained(template, [user("one"), assistant("two", weight=0)], "last") == []


def test_all_trains_everything_but_what_has_the_weight_zero():
    text = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    messages = [user("one"), assistant("two")]
    assert trained(PLAIN, messages, "all") == [(text, 1.0)]
    before, after = text.split("one<|im_end|>")
    assert trained(PLAIN, [user("one", weight=0), assistant("two")], "all") == [
        (before, 1.0),
        ("one<|im_end|>", 0.0),
        (after, 1.0),
    ]


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "1", True])
def test_an_impossible_weight_is_a_bad_record(weight):
    with pytest.raises(BadRecord, match="weight of message 2"):
        trained(PLAIN, [user("one"), assistant("two", weight=weight)])


def test_an_empty_conversation_is_a_bad_record():
    with pytest.raises(BadRecord, match="no message"):
        trained(PLAIN, [])


def test_a_prompt_that_a_template_always_writes_is_not_trained():
    template = "{% for m in messages %}{{ '<|im_start|><' + m.role + '>' + m.content + '<|im_end|>' }}{% endfor %}"
    template += "{{ '<|im_start|><assistant>' }}"
    assert trained(template, TALK) == [("two<|im_end|>", 1.0), ("four<|im_end|>", 1.0)]


def test_turns_that_a_template_writes_differently_are_proven_each():
    messages = [*TALK, user("five"), assistant("six")]
    sign = "('# ' if {} > 2 else '')"
    prompts = PLAIN.replace("m.content", sign.format("loop.index * (m.role == 'assistant')") + " + m.content")
    prompts = prompts.replace("assistant\n'", "assistant\n' + " + sign.format("messages | length"))
    openings = PLAIN.replace("{{ '<|im_start|>' + m", "{{ ('<sep>\n' if loop.index == 5 else '') + '<|im_start|>' + m")
    for template, written in ((prompts, "\n# four"), (openings, "\n<sep>\n")):
        masked = masker(template).mask(Conversation(messages))
        assert written in masked.text
        assert [masked.text[start:end] for start, end, _ in masked.spans] == [
            text + "<|im_end|>" for text in ("two", "four", "six")
        ]


@pytest.mark.capability("Train only stretches of a turn, found by a regular expression")
@pytest.mark.parametrize(
    ("turns", "spans", "expected"),
    [
        ("assistant", "<a>.*?</a>", [("<a>1\n</a>", 1.0), ("<a>2</a>", 0.5), ("<a>3</a>", 0.5)]),
        ("assistant", "<a>(.*?)</a>", [("1\n", 1.0), ("2", 0.5), ("3", 0.5)]),
        ("last", "(<a>)|(end)(<.im_end.>)", [("<a>", 0.5), ("<a>", 0.5), ("end", 0.5), ("<|im_end|>", 0.5)]),
        (["user"], "<a>", [("<a>", 1.0)]),
        ("all", "assistant", [("assistant", 1.0), ("assistant", 1.0)]),
        ("assistant", "nowhere", []),
        ("assistant", "x*", []),
    ],
)
def test_only_what_an_expression_finds_in_a_turn_is_trained(turns, spans, expected):
    messages = [user("<a>"), assistant("so <a>1\n</a>"), user("2"), assistant("<a>2</a><a>3</a>end", weight=0.5)]
    if turns == "all":
        messages = [user("first"), assistant("second"), user("third"), assistant("fourth")]
    assert trained(PLAIN, messages, TrainOnSpans(turns=turns, spans=spans)) == expected


# --- what cannot be proven ---------------------------------------------------------------------------------------

TWICE = "{% for m in messages %}{{ m.role + ': ' + m.content + ' (' + m.content + ')\n' }}{% endfor %}"
CHANGING = "{% for m in messages %}{{ m.role + ': ' + m.content.replace('\n', ' ')[:6] + '\n' }}{% endfor %}"


@pytest.mark.parametrize(("template", "reason"), [(TWICE, "renders it 2 times"), (CHANGING, "changes it")])
def test_a_turn_that_cannot_be_proven_is_refused_by_name(template, reason, tmp_path):
    file = tmp_path / "odd.jinja"
    file.write_text(template)
    with pytest.raises(MaskError, match=reason) as refused:
        trained(str(file), [user("first"), assistant("second")])
    assert "odd.jinja" in str(refused.value)
    assert "message 2 (role 'assistant')" in str(refused.value)
    assert "data.NAME.template" in str(refused.value)


def test_the_turn_that_is_refused_is_the_one_at_fault():
    messages = [*TALK, user("five"), assistant("more than six characters")]
    with pytest.raises(MaskError, match="message 6"):
        trained(CHANGING, messages)
    assert [text for text, _ in trained(CHANGING, messages[:4])] == ["two", "four"]


def test_a_turn_with_the_weight_zero_needs_no_proof():
    assert trained(TWICE, [user("first"), assistant("second", weight=0)]) == []


def test_marks_whose_message_is_unknown_are_refused_only_where_that_matters():
    template = MARKED.replace("{{ '\n' }}", "{% generation %}{{ '\n' }}{% endgeneration %}", 1)
    assert "".join(text for text, _ in trained(template, TALK)).count("\n") == 4
    with pytest.raises(MaskError, match="which message that belongs to"):
        trained(template, TALK, "last")


# --- tool calls and thinking -------------------------------------------------------------------------------------

WITH_CALLS = PLAIN.replace(
    "m.content +",
    "(m.content or '') + (m.tool_calls or []) | map(attribute='function') | map('tojson') | map('string')"
    " | join(';') +",
)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("content", ["", None, "Let me see."])
@pytest.mark.parametrize(
    "arguments", [{}, {"x": 1}, {"city": "Rome", "deep": {"list": ["a", 2, "<|im_end|>"]}, "n": 3}]
)
@pytest.mark.parametrize("ends", [True, False])
def test_a_turn_with_calls_ends_after_them(content, arguments, ends):
    messages = [user("Weather?"), assistant(content, tool_calls=[call("f"), call("weather", **arguments)])]
    messages += [] if ends else [{"role": "tool", "content": "21"}, assistant("Warm.")]
    masked = masker(WITH_CALLS).mask(Conversation(messages))
    said = [masked.text[start:end] for start, end, _ in masked.spans]
    turn = masked.text.split("<|im_start|>assistant\n")[1].split("<|im_start|>tool")[0]
    assert said == [turn.removesuffix("\n"), *([] if ends else ["Warm.<|im_end|>"])]


def test_a_call_that_the_template_leaves_out_trains_nothing():
    messages = [user("Weather?"), assistant("", tool_calls=[call("weather")]), user("So?"), assistant("Warm.")]
    assert trained(PLAIN, messages) == [("Warm.<|im_end|>", 1.0)]


def test_the_template_of_tokenizers_made_here_marks_thinking_and_calls():
    messages = [
        user("Weather?"),
        assistant("Hm.", reasoning_content="A tool.", tool_calls=[call("weather", city="Rome")]),
    ]
    turn = '<think>\nA tool.\n</think>\nHm.<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    turn += "<|im_end|>"
    assert trained(CHATML, messages) == [(turn, 1.0)]
    unmarked = CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    assert trained(unmarked, messages) == [(turn, 1.0)]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_is_found_under_each_of_its_names(key):
    messages = [user("Q"), assistant("A", **{key: "Because."})]
    assert trained(CHATML, messages) == [("<think>\nBecause.\n</think>\nA<|im_end|>", 1.0)]
