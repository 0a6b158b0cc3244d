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
from postlude.errors import DataError

Render = Callable[[Chat], str]
Path = tuple[str | int, ...]

_PRIVATE = ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))
_ANY_PRIVATE = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _PRIVATE) + "]")
_THINKING = re.compile(r"<([^\s<>]*)>|\[(/?)THINK\]", re.IGNORECASE)


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
    texts = list(texts_in(function.get("arguments"), (*path, "arguments")))
    return [Part(index, where, text) for where, text in (*texts[-1:], ((*path, "name"), function["name"]))]


def locate(
    render: Render, chat: Chat, text: str, parts: Sequence[Part], context: Sequence[Sequence[Part]] = ()
) -> dict[Part, Finding]:
    """The place of each part in ``text``, the plain rendering of ``chat``.

    ``context`` are groups of parts that are nice to know, each likely to be treated alike: for those, no more is tried
    than can be tried for the whole group at once.
    """
    if not parts:
        return {}
    marked = Marked(render, chat, text)
    groups = [parts, *context]
    findings = marked.places([(part, 0, len(part.text)) for group in groups for part in group]) or {}
    for group in groups:
        findings |= _search(marked, [part for part in group if _is_open(findings, part)])
    for part in parts:
        if _is_open(findings, part):
            findings |= _search(marked, [part])
    return findings


def _is_open(findings: Mapping[Part, Finding], part: Part) -> bool:
    return part not in findings or isinstance(findings[part], Unproven)


def _search(marked: Marked, parts: Sequence[Part]) -> dict[Part, Finding]:
    """The places of parts that are all marked at once, of each the largest stretch with which that can be proven."""
    findings: dict[Part, Finding] = dict.fromkeys(parts, Unproven("the template changes it"))
    stretches = {part: _stretches(part.text) for part in parts}
    tried: list[list[tuple[Part, int, int]]] = []
    for several in zip(*stretches.values(), strict=True):
        marks = [(part, *stretch) for part, stretch in zip(parts, several, strict=True) if _is_open(findings, part)]
        if marks and marks not in tried:
            tried.append(marks)
            findings |= marked.places(marks) or {}
    return findings


def _stretches(text: str) -> list[tuple[int, int]]:
    """What of a text may be rendered, the largest first: without line ends or white space at a side, or thinking.

    As many for every text, so that texts can be tried together.
    """
    leads, trails = [0], [len(text)]
    for stripped in ("\n", None):
        leads.append(len(text) - len(text.lstrip(stripped)))
        trails.append(len(text.rstrip(stripped)))
    thinking = thinking_ends(text)
    spoken = text[thinking[-1].end() :].lstrip() if thinking else ""
    for stripped in ("\n", None):
        if thinking and not spoken:  # nothing but thinking, so that is what is looked for
            end = thinking[-1].start()
            begun = thinking_begins(text, 0, end)
            leads.append(len(text) - len(text[begun[-1].end() :].lstrip(stripped)) if begun else leads[-1])
            trails.append(len(text[:end].rstrip(stripped)))
        else:
            first = text[thinking[0].end() :].lstrip() if thinking else ""
            leads.append(len(text) - len((first if stripped else spoken) or text.lstrip()))
            trails.append(len(text.rstrip()))
    return [(lead, trail if trail >= lead else len(text)) for lead in leads for trail in trails]


def thinking_begins(text: str, start: int, end: int) -> list[re.Match[str]]:
    """The tags between two places with which a thinking part begins: ``<think>``, ``<|start_thinking|>``,
    ``[THINK]``."""
    return [tag for tag in _THINKING.finditer(text, start, end) if _thinks(tag) and "/" not in _before_thinking(tag)]


def thinking_ends(text: str) -> list[re.Match[str]]:
    """The tags with which one ends: ``</think>``, ``[/THINK]``."""
    return [tag for tag in _THINKING.finditer(text) if _thinks(tag) and _before_thinking(tag).startswith("/")]


def _thinks(tag: re.Match[str]) -> bool:
    return tag[1] is None or "think" in tag[1].lower()


def _before_thinking(tag: re.Match[str]) -> str:
    return tag[2] if tag[1] is None else tag[1].lower().partition("think")[0]


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
        characters = unused_characters(used)
        sentinels = {part: (next(characters), next(characters)) for part, _, _ in marks}
        chat = self._chat
        for part, lead, trail in marks:
            before, after = sentinels[part]
            chat = _replace(chat, part, part.text[:lead] + before + part.text[lead:trail] + after + part.text[trail:])
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
        findings = {}
        for part, lead, trail in marks:
            before, after = sentinels[part]
            findings[part] = _finding(positions.get(before, []), positions.get(after, []), lead, trail)
        return findings


def _finding(starts: list[int], ends: list[int], lead: int, trail: int) -> Finding:
    if not starts and not ends:
        return None
    if len(starts) == len(ends) == 1 and starts[0] <= ends[0]:
        return Place(starts[0], ends[0], lead, trail)
    times = max(len(starts), len(ends))
    return Unproven(f"the template renders it {times} times" if times > 1 else "the template renders a part of it")


def _replace(chat: Chat, part: Part, text: str) -> Chat:
    """The chat with another text in the place of a part."""
    message = chat.messages[part.message]
    # Thinking stands in a message under several names, of which a template reads one.
    keys = REASONING_KEYS if part.path[0] in REASONING_KEYS else (part.path[0],)
    changed = {key: with_text(message[key], part.path[1:], text) for key in keys if key in message}
    messages = list(chat.messages)
    messages[part.message] = {**message, **changed}
    return Chat(messages, chat.tools)


def with_text(value: Any, path: Path, text: str) -> Any:
    """A copy of ``value`` that has ``text`` at ``path``."""
    if not path:
        return text
    copy: Any = dict(value) if isinstance(value, Mapping) else list(value)
    copy[path[0]] = with_text(value[path[0]], path[1:], text)
    return copy


def texts_in(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    """The texts within a JSON value that are more than white space, in order."""
    if isinstance(value, str):
        if value.strip():
            yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_in(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from texts_in(item, (*path, index))


def unused_characters(used: set[str]) -> Iterator[str]:
    private = (chr(code) for first, last in _PRIVATE for code in range(first, last + 1))
    return (character for character in private if character not in used)
