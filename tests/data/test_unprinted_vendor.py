"""What 73 published chat templates leave out of twelve kinds of conversations: told by witnesses, and known by words.

The oracle: every text of a conversation has a word that stands nowhere else; what is printed has its word in the
rendering. The table of docs/templates.md is made here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from postlude.data.chat import Chat, ChatRenderer
from postlude.data.example import Conversation
from postlude.data.tokenizer import load_tokenizer
from postlude.data.unprinted import unprinted
from postlude.errors import DataError
from postlude.manifest.schema import TokenizerFrom

PAGE = Path(__file__).parents[2] / "docs" / "templates.md"


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calls(*cities: str) -> list[dict[str, Any]]:
    return [
        {
            "type": "function",
            "id": f"abcdefgh{number}",
            "function": {"name": "get_weather", "arguments": {"city": city}},
        }
        for number, city in enumerate(cities)
    ]


def result(text: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"abcdefgh{number}", "name": "get_weather", "content": text}


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "description": "Which"}}}
    return {"type": "function", "function": {"name": name, "description": "Says it", "parameters": parameters}}


TOOLS = [tool("get_weather"), tool("get_time")]
OPENING = [user("alpha"), assistant("bravo"), user("charlie")]
CONVERSATIONS = {
    "one turn": Conversation([user("alpha"), assistant("bravo")]),
    "several turns": Conversation([*OPENING, assistant("delta"), user("echo"), assistant("foxtrot")]),
    "system": Conversation([{"role": "system", "content": "sierra"}, user("alpha"), assistant("bravo")]),
    "developer": Conversation([{"role": "developer", "content": "sierra"}, user("alpha"), assistant("bravo")]),
    "names": Conversation([user("alpha", name="Zoe"), assistant("bravo")]),
    "tools that are not called": Conversation([user("alpha"), assistant("bravo")], TOOLS),
    "a call": Conversation(
        [user("alpha"), assistant("", tool_calls=calls("Quebec")), result("oscar"), assistant("bravo")], TOOLS
    ),
    "text and a call": Conversation(
        [user("alpha"), assistant("juliett", tool_calls=calls("Quebec")), result("oscar"), assistant("bravo")], TOOLS
    ),
    "two calls": Conversation(
        [
            user("alpha"),
            assistant("", tool_calls=calls("Quebec", "Lima")),
            result("oscar"),
            result("papa", 1),
            assistant("bravo"),
        ],
        TOOLS,
    ),
    "reasoning": Conversation([user("alpha"), assistant("bravo", reasoning_content="kilo")]),
    "reasoning in tags": Conversation([user("alpha"), assistant("<think>\nkilo\n</think>\n\nbravo")]),
    "earlier reasoning": Conversation(
        [user("alpha"), assistant("bravo", reasoning_content="kilo"), user("charlie"), assistant("delta")]
    ),
}
SHORT = {
    "system": "S",
    "developer": "D",
    "names": "N",
    "tools": "T",
    "tool_calls": "C",
    "tool": "O",
    "reasoning": "R",
    "user": "U",
    "assistant": "A",
}
"""The letters of the table."""


def words(conversation: Conversation) -> Iterator[tuple[str, int | None, str]]:
    """Kind, message and word of each text."""
    for index, message in enumerate(conversation.messages):
        reasoning = message.get("reasoning_content", "kilo" if "kilo" in message["content"] else None)
        if reasoning:
            yield "reasoning", index, reasoning
        content = message["content"].split("</think>")[-1].strip()
        if content:
            yield message["role"], index, content
        if message["role"] == "user" and "name" in message:
            yield "names", index, message["name"]
        for call in message.get("tool_calls", ()):
            yield "tool_calls", index, call["function"]["arguments"]["city"]
    if conversation.tools:
        yield "tools", None, "get_time"


def known(conversation: Conversation, text: str) -> set[tuple[str, int | None]]:
    """What has no word in the rendering."""
    return {(kind, index) for kind, index, word in words(conversation) if word not in text}


@pytest.fixture(scope="module")
def omissions(shared_data: Path) -> dict[str, dict[str, set[tuple[str, int | None]] | None]]:
    """By template and kind of conversation what is told and known to be left out; None where the template refuses."""
    tokenizer = load_tokenizer(TokenizerFrom(bytes=True))
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    folder = shared_data / "chat_templates"
    files = sorted({entry["file"] for entry in json.loads((folder / "manifest.json").read_text())})
    assert len(files) == 73
    stems = [Path(file).stem for file in files]
    told: dict[str, dict[str, set[tuple[str, int | None]] | None]] = {}
    for file, stem in zip(files, stems, strict=True):
        name = stem if stems.count(stem) == 1 else f"{stem} ({Path(file).parent.name.replace('+', '/')})"
        renderer, of_template = ChatRenderer(tokenizer, str(folder / file)), told.setdefault(name, {})
        for kind, conversation in CONVERSATIONS.items():
            chat = Chat.of(conversation)
            try:
                text = renderer.render(chat)
            except DataError:
                of_template[kind] = None
                continue
            of_template[kind] = {(o.kind, o.message) for o in unprinted(renderer.render, chat, text)}
            assert of_template[kind] == known(conversation, text), (file, kind, text)
    return told


@pytest.mark.capability("What 73 published chat templates leave out of conversations is told")
def test_what_is_told_is_what_has_no_word_in_the_rendering(omissions) -> None:
    """The comparison is made where they are found; here, that there is something to compare."""
    cells = [cell for row in omissions.values() for cell in row.values()]
    assert len(cells) == 73 * 12
    assert sum(cell is None for cell in cells) < 0.2 * len(cells)
    lost = {kind for cell in cells for kind, _ in cell or ()}
    assert {"reasoning", "developer", "tool_calls", "tools", "names"} <= lost


def test_the_table_in_the_docs_is_that_of_this_version(omissions) -> None:
    """Where it is not it is written anew: look at the difference, and commit it."""
    head = PAGE.read_text().partition("| template |")[0]
    kinds = list(CONVERSATIONS)
    lines = [f"| template | {' | '.join(map(str, range(1, len(kinds) + 1)))} |", "| --- |" + " --- |" * len(kinds)]
    for name, row in sorted(omissions.items(), key=lambda entry: entry[0].casefold()):
        cells = ("–" if cell is None else "".join(sorted({SHORT[kind] for kind, _ in cell})) for cell in row.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    made, stood = head + "\n".join(lines) + "\n", PAGE.read_text()
    if made != stood:
        PAGE.write_text(made)
    assert made == stood, f"{PAGE.name} was out of date and has been written anew"
