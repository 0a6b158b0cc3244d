"""Where the texts of a conversation come to stand in its rendering, proven with sentinels.

A sentinel is a character of Unicode's private use that occurs nowhere in the conversation. One is put before and one
after a text, the whole conversation is rendered, and the sentinels are taken out again. If what remains is the plain
rendering, and each sentinel occurred once, the text stands between them, whatever the template did.

Templates strip texts, and a sentinel stops the stripping, which the comparison shows. So sentinels are tried at the
very edges of a text, inside its line ends, inside its white space and after its thinking part (inside it, if there is
nothing else): the outermost place that passes is the edge of what is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postlude.data.chat import REASONING_KEYS, Chat
from postlude.manifest.errors import DataError

Render = Callable[[Chat], str]
Path = tuple[str | int, ...]

_PRIVATE = ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))
_ANY_PRIVATE = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _PRIVATE) + "]")
_THINKING_BEGINS = re.compile(r"<[^\s<>/]*think[^\s<>]*>|\[THINK\]", re.IGNORECASE)
_THINKING_ENDS = re.compile(r"</[^\s<>]*think[^\s<>]*>|\[/THINK\]", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """A text of a message."""

    message: int
    """Index of the message, from 0."""
    path: Path
    """Where in the message the text is."""
    text: str

    @property
    def is_call(self) -> bool:
        """Whether the text belongs to a tool call."""
        return self.path[0] == "tool_calls"


@dataclass(frozen=True)
class Place:
    """A part's place in the rendering. ``text[lead:trail]`` of the part is what was proven to stand there."""

    start: int
    end: int
    lead: int
    trail: int


@dataclass(frozen=True)
class Unproven:
    """Why a part's place is not known."""

    reason: str


Finding = Place | Unproven | None
"""None: the part is not in the rendering, and that is proven."""


def spoken_parts(chat: Chat, index: int) -> list[Part]:
    """What was thought and what is said in a message, as far as there is anything."""
    message = chat.messages[index]
    texts = [(key, message.get(key)) for key in (REASONING_KEYS[0], "content")]
    return [Part(index, (key,), text) for key, text in texts if isinstance(text, str) and text.strip()]


def call_parts(chat: Chat, index: int) -> list[Part]:
    """The last texts of a message's last tool call: of its arguments, if there is one, and the function's name."""
    calls = chat.messages[index].get("tool_calls")
    if not calls:
        return []
    path: Path = ("tool_calls", len(calls) - 1)
    function = calls[-1]
    if "function" in function:
        path, function = (*path, "function"), function["function"]
    texts = list(_texts(function.get("arguments"), (*path, "arguments")))
    return [Part(index, where, text) for where, text in (*texts[-1:], ((*path, "name"), function["name"]))]


def locate(render: Render, chat: Chat, text: str, parts: Sequence[Part]) -> dict[Part, Finding]:
    """The place of each part in ``text``, the plain rendering of ``chat``."""
    if not parts:
        return {}
    marked = Marked(render, chat, text)
    found = marked.places([(part, 0, len(part.text)) for part in parts]) or dict.fromkeys(parts, Unproven(""))
    for part, finding in found.items():
        if isinstance(finding, Unproven):
            found[part] = _search(marked, part)
    return found


class Marked:
    """Renderings of one conversation with sentinels in it, compared with its plain one."""

    def __init__(self, render: Render, chat: Chat, text: str) -> None:
        self._render, self._chat, self._text = render, chat, text

    def places(self, marks: Sequence[tuple[Part, int, int]]) -> dict[Part, Finding] | None:
        """The places of parts, all marked at once, each from its ``lead`` to its ``trail``.

        None if the sentinels change the rendering, or the template refuses them.
        """
        texts = (self._text, *(part.text for part, _, _ in marks))
        used = set().union(*texts) if any(map(_ANY_PRIVATE.search, texts)) else set()
        characters = _unused(used)
        sentinels = {part: (next(characters), next(characters)) for part, _, _ in marks}
        chat = self._chat
        for part, lead, trail in marks:
            before, after = sentinels[part]
            chat = _replaced(chat, part, part.text[:lead] + before + part.text[lead:trail] + after + part.text[trail:])
        try:
            rendered = self._render(chat)
        except DataError:
            return None
        pieces = re.split("([" + "".join(map("".join, sentinels.values())) + "])", rendered)
        if "".join(pieces[::2]) != self._text:
            return None
        positions: dict[str, list[int]] = {}
        position = 0
        for plain, sentinel in zip(pieces[::2], pieces[1::2], strict=False):
            position += len(plain)
            positions.setdefault(sentinel, []).append(position)
        found = {}
        for part, lead, trail in marks:
            before, after = sentinels[part]
            found[part] = _finding(positions.get(before, []), positions.get(after, []), lead, trail)
        return found


def _finding(starts: list[int], ends: list[int], lead: int, trail: int) -> Finding:
    if not starts and not ends:
        return None
    if len(starts) == len(ends) == 1 and starts[0] <= ends[0]:
        return Place(starts[0], ends[0], lead, trail)
    times = max(len(starts), len(ends))
    return Unproven(f"the template renders it {times} times" if times > 1 else "the template renders a part of it")


def _search(marked: Marked, part: Part) -> Finding:
    """The largest stretch of a part that can be proven."""
    reason = "the template changes it"
    for lead, trail in _stretches(part.text):
        found = marked.places([(part, lead, trail)])
        finding = found[part] if found else Unproven(reason)
        if not isinstance(finding, Unproven):
            return finding
        reason = finding.reason
    return Unproven(reason)


def _stretches(text: str) -> Iterator[tuple[int, int]]:
    """What of a text may be rendered, the largest first: without line ends or white space at a side, or thinking."""
    leads, trails = [0], [len(text)]
    for stripped in ("\n", None):
        leads.append(len(text) - len(text.lstrip(stripped)))
        trails.append(len(text.rstrip(stripped)))
    for thinking in _THINKING_ENDS.finditer(text):
        said = text[thinking.end() :].lstrip()
        if said:
            leads.append(len(text) - len(said))
            continue
        for stripped in ("\n", None):  # nothing but thinking, so that is what is looked for
            trails.append(len(text[: thinking.start()].rstrip(stripped)))
            for begun in _THINKING_BEGINS.finditer(text, 0, thinking.start()):
                leads.append(len(text) - len(text[begun.end() :].lstrip(stripped)))
    yield from ((lead, trail) for lead in dict.fromkeys(leads) for trail in dict.fromkeys(trails) if lead <= trail)


def _replaced(chat: Chat, part: Part, text: str) -> Chat:
    """The chat with another text in the place of a part."""
    message = chat.messages[part.message]
    # Thinking stands in a message under several names, of which a template reads one.
    keys = REASONING_KEYS if part.path[0] in REASONING_KEYS else (part.path[0],)
    changed = {key: _with(message[key], part.path[1:], text) for key in keys if key in message}
    messages = list(chat.messages)
    messages[part.message] = {**message, **changed}
    return Chat(messages, chat.tools)


def _with(value: Any, path: Path, text: str) -> Any:
    """A copy of ``value`` that has ``text`` at ``path``."""
    if not path:
        return text
    copy = dict(value) if isinstance(value, Mapping) else list(value)
    copy[path[0]] = _with(value[path[0]], path[1:], text)  # type: ignore[index]
    return copy


def _texts(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    """The texts within a JSON value that are more than white space, in order."""
    if isinstance(value, str):
        if value.strip():
            yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _texts(item, (*path, index))


def _unused(used: set[str]) -> Iterator[str]:
    for first, last in _PRIVATE:
        for code in range(first, last + 1):
            if chr(code) not in used:
                yield chr(code)
