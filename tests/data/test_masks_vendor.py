"""The masks of 73 published chat templates: every turn of the assistant is proven, or the error says which is not.

Oracles: the marks that some authors put into their templates, transformers' own mask where there are marks, texts that
occur in one message only, and the turns of well-known templates, written down by hand.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from postlude.data.chat import Chat, ChatRenderer, StopTokens
from postlude.data.encode import Encoder
from postlude.data.example import Conversation
from postlude.data.tokenizer import load_tokenizer
from postlude.data.turns import MaskError, Turns
from postlude.errors import DataError

SPECIAL = re.compile(
    r"<\|[^|<>\s']{1,30}\|>|<｜[^｜<>\s']{1,30}｜>|<[a-z_]+\|>|<\|[a-z_]+>|</?(?:start|end)_of_turn>|<seed:eos>|<sep>"
    r"|<SPECIAL_\d+>"
)
"""What looks like a special token in the vendors' templates."""


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calls(city: str) -> list[dict[str, Any]]:
    function = {"name": "get_weather", "arguments": {"city": city}}
    return [{"type": "function", "id": "abcdefgh1", "function": function}]


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "abcdefgh1", "name": "get_weather", "content": text}


CITY = {"type": "string", "description": "The city"}
PARAMETERS = {"type": "object", "properties": {"city": CITY}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "Tells the weather", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": WEATHER}]

CONVERSATIONS = {
    "one turn": Conversation([user("alpha"), assistant("bravo")]),
    "several turns": Conversation(
        [user("alpha"), assistant("bravo"), user("charlie"), assistant("delta"), user("echo"), assistant("foxtrot")]
    ),
    "system": Conversation(
        [
            {"role": "system", "content": "sierra"},
            user("alpha"),
            assistant("bravo"),
            user("charlie"),
            assistant("delta"),
        ]
    ),
    "tools": Conversation(
        [
            user("alpha"),
            assistant("", tool_calls=calls("Quebec")),
            result('{"temp": 21}'),
            assistant("bravo"),
            user("charlie"),
            assistant("delta"),
        ],
        TOOLS,
    ),
    "tools with text": Conversation(
        [user("alpha"), assistant("juliett", tool_calls=calls("Quebec")), result('{"temp": 21}'), assistant("bravo")],
        TOOLS,
    ),
    "tools at the end": Conversation([user("alpha"), assistant("", tool_calls=calls("Quebec"))], TOOLS),
    "thinking": Conversation(
        [
            user("alpha"),
            assistant("bravo", reasoning_content="kilo"),
            user("charlie"),
            assistant("delta", reasoning_content="lima"),
        ]
    ),
    "thinking before a call": Conversation(
        [
            user("alpha"),
            assistant("<think>\nkilo\n</think>\n\n", tool_calls=calls("Quebec")),
            result('{"temp": 21}'),
            assistant("<think>\nlima\n</think>\n\nbravo"),
        ],
        TOOLS,
    ),
    "thinking in the content": Conversation(
        [
            user("alpha"),
            assistant("<think>\nkilo\n</think>\n\nbravo"),
            user("charlie"),
            assistant("<think>\nlima\n</think>\n\ndelta"),
        ]
    ),
}
OTHERS = ("alpha", "charlie", "echo", "sierra", '{"temp": 21}')
"""Texts that no turn of the assistant holds."""
SPOKEN = ("bravo", "delta", "foxtrot", "juliett", "Quebec")
"""Texts that turns of the assistant hold."""


@dataclass(frozen=True)
class Template:
    """A vendor's template."""

    name: str
    text: str
    renderer: ChatRenderer
    stop_tokens: StopTokens

    def rendered(self) -> Iterator[tuple[str, Chat, Turns]]:
        """The kinds of conversations that the template renders."""
        for kind, conversation in CONVERSATIONS.items():
            chat = Chat.of(conversation)
            try:
                yield kind, chat, Turns(self.renderer, self.stop_tokens, chat)
            except DataError:
                continue

    @property
    def is_marked(self) -> bool:
        return self.renderer.has_marks(Chat([]))


@pytest.fixture(scope="module")
def files(shared_data: Path) -> list[Path]:
    folder = shared_data / "chat_templates"
    files = sorted({entry["file"] for entry in json.loads((folder / "manifest.json").read_text())})
    assert len(files) == 73
    return [folder / file for file in files]


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path, files: list[Path]) -> Any:
    """The tokenizer of Qwen 2.5 that knows the special tokens of all the templates."""
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "qwen2.5"))
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    special = {token for file in files for token in SPECIAL.findall(file.read_text())}
    tokenizer.add_tokens(sorted(special), special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def templates(tokenizer: Any, files: list[Path]) -> list[Template]:
    stop_tokens = StopTokens(tokenizer)
    return [Template(file.stem, file.read_text(), ChatRenderer(tokenizer, str(file)), stop_tokens) for file in files]


def turns_of_assistant(chat: Chat) -> list[int]:
    return [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]


@pytest.mark.capability("Loss masks for any chat template, proven")
def test_every_turn_is_proven_or_the_error_names_template_and_message(templates, capsys):
    rendered, unproven, complaints = defaultdict(int), defaultdict(list), []
    for template in templates:
        for kind, chat, turns in template.rendered():
            rendered[kind] += 1
            try:
                turns.spans(turns_of_assistant(chat))
            except MaskError as error:
                unproven[kind].append(template.name)
                complaints.append((template.name, str(error)))
    with capsys.disabled():
        print()
        for kind, count in rendered.items():
            print(f"{kind}: {count - len(unproven[kind])} of {count} templates proven; not: {unproven[kind] or 'none'}")
    assert all(name in error and re.search(r"message \d", error) for name, error in complaints)
    for kind, count in rendered.items():
        assert count >= 50
        assert len(unproven[kind]) <= 0.03 * count


def test_a_turn_holds_what_its_message_says_and_nothing_of_another(templates):
    for template in templates:
        for kind, chat, turns in template.rendered():
            spans = turns.spans(turns_of_assistant(chat))
            whole = [span for several in spans.values() for span in several]
            assert whole == sorted(whole), (template.name, kind)
            assert all(end <= start for (_, end), (start, _) in pairwise(whole))
            for index, several in spans.items():
                said = " | ".join(turns.text[start:end] for start, end in several)
                assert not any(text in said for text in OTHERS), (template.name, kind, said)
                for text in SPOKEN:
                    is_own = text in json.dumps(chat.messages[index])
                    assert said.count(text) == (is_own and turns.text.count(text) > 0), (template.name, kind, said)


def test_turns_of_a_long_conversation_are_what_each_is_alone(templates):
    """Turns between the same texts are proven once for a conversation, and one that is asked for alone by itself."""
    messages = [user("alpha")]
    for step in range(4):
        thinking = f"<think>\nstep {step}\n</think>\n\n" if step % 2 else ""
        messages += [assistant(f"{thinking}Said {step}.", tool_calls=calls(f"Town {step}")), result(f"answer {step}\n")]
        messages += [assistant(f"{thinking}Told {step}.", reasoning_content=f"why {step}"), user(f"more {step}")]
    messages.append(assistant("Done."))
    chat = Chat.of(Conversation(messages, TOOLS))
    compared = 0
    for template in templates:
        try:
            together = Turns(template.renderer, template.stop_tokens, chat).spans(turns_of_assistant(chat))
        except DataError:
            continue
        for index in turns_of_assistant(chat)[::2]:
            alone = Turns(template.renderer, template.stop_tokens, chat).spans([index])[index]
            assert together[index] == alone, (template.name, index)
        compared += 1
    assert compared > 55


TURNS = {
    "Qwen-Qwen2.5-7B-Instruct": "bravo<|im_end|>",
    "Qwen-Qwen3-0.6B": "<think>\n\n</think>\n\nbravo<|im_end|>",
    "google-gemma-2-2b-it": "bravo<end_of_turn>",
    "meta-llama-Llama-3.1-8B-Instruct": "bravo<|eot_id|>",
    "mistralai-Mistral-Nemo-Instruct-2407": "bravo</s>",
    "microsoft-Phi-3.5-mini-instruct": "bravo<|end|>",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "bravo<｜end▁of▁sentence｜>",
    "openai-gpt-oss-120b": "<|channel|>final<|message|>bravo<|return|>",
    "ibm-granite-granite-3.3-2B-Instruct": "bravo<|end_of_text|>",
    "meetkai-functionary-medium-v3.2": "all\nbravo<|eot_id|>",
    "Reka-Edge": " bravo\n\n<sep>",
    "NVIDIA-Nemotron-Nano-v2": "bravo\n<SPECIAL_12>",
    "llama-cpp-rwkv-world": " bravo",
    "ByteDance-Seed-OSS": "bravo<seed:eos>",
    "Cohere2MoE": "bravo<|END_TEXT|><|END_OF_TURN_TOKEN|>",
}
CALLS = {
    "Qwen-Qwen2.5-7B-Instruct": (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Quebec"}}\n</tool_call><|im_end|>'
    ),
    "meta-llama-Llama-3.1-8B-Instruct": '{"name": "get_weather", "parameters": {"city": "Quebec"}}<|eot_id|>',
    "Mistral-Small-3.2-24B-Instruct-2506": '[TOOL_CALLS]get_weather[CALL_ID]abcdefgh1[ARGS]{"city": "Quebec"}</s>',
    "openai-gpt-oss-120b": (' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Quebec"}<|call|>'),
    "Apriel-1.6-15b-Thinker-fixed": (
        '\n<tool_calls>[{"name": "get_weather", "arguments": {"city": "Quebec"}, "id": "abcdefgh1"}]</tool_calls>\n'
        "<|end|>"
    ),
}


@pytest.mark.parametrize(("kind", "index", "expected"), [("one turn", 1, TURNS), ("tools", 1, CALLS)])
def test_turns_of_well_known_templates(templates, kind, index, expected):
    found = {}
    for template in templates:
        for rendered, _, turns in template.rendered():
            if rendered == kind and template.name in expected:
                (start, end) = turns.spans([index])[index][0]
                found[template.name] = turns.text[start:end]
    assert found == expected


def test_a_proven_turn_is_what_the_author_of_the_template_marked(templates):
    """But for white space at its borders. Authors that mark headers, too, or not all of a turn, are left out."""
    plain = ("qwen3-4b", "qwen2_5_synthtraces_chat_template", "moonlight-16b", "llada_chat_template", "olmo")
    compared = 0
    for template in templates:
        if template.name not in plain:
            continue
        for kind, chat, turns in template.rendered():
            if kind.startswith("tools") and not template.name.startswith("qwen"):
                continue
            marks = template.renderer.render_marked(chat)[1]
            spans = [span for several in turns.spans(turns_of_assistant(chat)).values() for span in several]
            marked, proven = (np.zeros(len(turns.text), dtype=bool) for _ in range(2))
            for mask, stretches in ((marked, marks), (proven, spans)):
                for start, end in stretches:
                    mask[start:end] = True
            assert not "".join(c for c, differs in zip(turns.text, marked ^ proven, strict=True) if differs).strip()
            compared += 1
    assert compared > 25


@pytest.mark.capability("A template's own generation marks")
def test_where_a_template_has_marks_the_mask_is_that_of_transformers(templates, tokenizer):
    marked = [template for template in templates if template.is_marked]
    assert len(marked) == 9
    compared = 0
    for template in marked:
        encoder = Encoder(tokenizer, template=template.text, block=100_000)
        for kind, conversation in CONVERSATIONS.items():
            encoded = encoder.encode([(kind, conversation)], "vendor")[0]
            if encoded.error is not None:
                continue
            peer = tokenizer.apply_chat_template(
                [dict(message) for message in conversation.messages],
                tools=conversation.tools,
                chat_template=template.text,
                return_assistant_tokens_mask=True,
                return_dict=True,
            )
            if not any(peer["assistant_masks"][1:]):
                assert encoded.dropped
                continue
            (document,) = encoded.documents
            assert document.tokens.tolist() == peer["input_ids"]
            assert document.trained.tolist() == [bool(trained) for trained in peer["assistant_masks"]], template.name
            compared += 1
    assert compared > 50
