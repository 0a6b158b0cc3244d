"""What of a conversation its chat template does not print, found with witnesses.

A witness is a character of Unicode's private use put into the middle of a text: what was thought, what is said, each
text of a call, the name of a tool or of a speaker. All are put in at once and the conversation is rendered. If that,
without them, is the plain rendering, a text whose witness does not come out is not printed, whatever the template did.
Where witnesses change the rendering each is tried alone; where even one alone does, the text itself is looked for.

The name in a tool's result is not looked for: it repeats that of the call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postlude.data.chat import REASONING_KEYS, Chat
from postlude.data.sentinels import Path, Render, texts_in, thinking_begins, thinking_ends, unused_characters, with_text
from postlude.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")

_TAG = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]")


@dataclass(frozen=True)
class Omission:
    """Something that a template leaves out."""

    kind: str
    """As :data:`postlude.manifest.schema.Unprinted` names it."""
    message: int | None
    """Index of the message, from 0; None for the descriptions of tools."""


@dataclass(frozen=True)
class _Witness:
    omission: Omission
    paths: tuple[Path, ...]
    """Where the text is: in several places where templates know it by several names."""
    text: str
    position: int
    """Where in the text the witness is put."""
    words: str
    """What it bears witness to."""


def unprinted(render: Render, chat: Chat, text: str) -> list[Omission]:
    """What is left out of ``text``, the plain rendering of ``chat``: each kind once for a message."""
    witnesses = list(_witnesses(chat))
    missing = _missing(render, chat, text, witnesses)
    if missing is None:
        missing = [witness for witness in witnesses if _is_missing(render, chat, text, witness)]
    return list(dict.fromkeys(witness.omission for witness in missing))


def spoken_kind(message: Mapping[str, Any], key: str) -> str:
    """How what is thought or said in a message is called."""
    role = message.get("role")
    return "reasoning" if key in REASONING_KEYS else str(role) if role in ROLES else "other"


def _missing(render: Render, chat: Chat, text: str, witnesses: Sequence[_Witness]) -> list[_Witness] | None:
    """Those that do not come out; None if together they change the rendering."""
    free = unused_characters({*text, *"".join(witness.text for witness in witnesses)})
    characters = {next(free): witness for witness in witnesses}
    # Those in one text are put in from its end, so that positions hold.
    ordered = sorted(characters.items(), key=lambda entry: -entry[1].position)
    whole: Any = {"messages": chat.messages, "tools": chat.tools}
    texts: dict[Path, str] = {}
    for character, witness in ordered:
        for path in witness.paths:
            before = texts.get(path, witness.text)
            texts[path] = before[: witness.position] + character + before[witness.position :]
    for path, changed in texts.items():
        whole = with_text(whole, path, changed)
    try:
        rendered = render(Chat(whole["messages"], whole["tools"]))
    except DataError:
        return None
    if rendered.translate(dict.fromkeys(map(ord, characters))) != text:
        return None
    return [witness for character, witness in characters.items() if character not in rendered]


def _is_missing(render: Render, chat: Chat, text: str, witness: _Witness) -> bool:
    missing = _missing(render, chat, text, [witness])
    return witness.words not in text if missing is None else bool(missing)


def _witnesses(chat: Chat) -> Iterator[_Witness]:
    for index, message in enumerate(chat.messages):
        place: Path = ("messages", index)
        reasoning = message.get(REASONING_KEYS[0])
        if isinstance(reasoning, str) and reasoning.strip():
            paths = tuple((*place, key) for key in REASONING_KEYS if key in message)
            yield _witness("reasoning", index, paths, reasoning, 0, len(reasoning))
        content = message.get("content")
        if isinstance(content, str):
            yield from _in_content(message, index, (*place, "content"), content)
        name = message.get("name")
        if isinstance(name, str) and name.strip() and message.get("role") != "tool":
            yield _witness("names", index, ((*place, "name"),), name, 0, len(name))
        for number, call in enumerate(message.get("tool_calls") or ()):
            path: Path = (*place, "tool_calls", number)
            if "function" in call:
                path, call = (*path, "function"), call["function"]
            said = [((*path, "name"), call["name"]), *texts_in(call.get("arguments"), (*path, "arguments"))]
            for where, words in said:
                yield _witness("tool_calls", index, (where,), words, 0, len(words))
    for number, tool in enumerate(chat.tools or ()):
        where = ("tools", number, "function", "name") if "function" in tool else ("tools", number, "name")
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and name.strip():
            yield _witness("tools", None, (where,), name, 0, len(name))


def _in_content(message: Mapping[str, Any], index: int, path: Path, content: str) -> Iterator[_Witness]:
    """What is said, and what the assistant thought before it between tags."""
    start = 0
    if message.get("role") == "assistant":
        for end in thinking_ends(content):
            begun = thinking_begins(content, start, end.start())
            first = begun[-1].end() if begun else start
            if content[first : end.start()].strip():
                yield _witness("reasoning", index, (path,), content, first, end.start())
            start = end.end()
    if content[start:].strip():
        yield _witness(spoken_kind(message, "content"), index, (path,), content, start, len(content))


def _witness(kind: str, index: int | None, paths: tuple[Path, ...], text: str, start: int, end: int) -> _Witness:
    """A witness in the middle of ``text[start:end]``, not within a tag: templates look for those."""
    words = text[start:end].strip()
    first = text.index(words, start)
    position = first + (len(words) + 1) // 2
    for tag in _TAG.finditer(text, first, first + len(words)):
        if tag.start() < position < tag.end():
            position = tag.end()
    return _Witness(Omission(kind, index), paths, text, position, words)
