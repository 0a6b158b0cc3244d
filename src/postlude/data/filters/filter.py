"""What a filter is.

A filter of one's own that looks at each record by itself is a class with one method::

    class Polite(Filter):
        words: list[str] = ["please"]

        def reason_to_drop(self, record):
            return None if any(word in record["text"] for word in self.words) else "not polite"

One that compares records overrides :meth:`Filter.start` and returns a function that remembers what it has seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from postlude.data.example import Conversation, Example, Record, Text, answers_of
from postlude.manifest.component import Component


@dataclass(frozen=True)
class Content:
    """What a record says, once the format has read it."""

    text: str
    """All the texts of its examples; token ids as numbers."""
    turns: int
    """Messages of its longest conversation, or pieces of its text."""


class Filter(Component):
    """Drops records. The component of the kind ``filters``."""

    def reason_to_drop(self, record: Record) -> str | None:
        """Why the record is dropped, in a few words that are the same for many records; None keeps it."""
        raise NotImplementedError

    def start(self, read: Callable[[Record], Content]) -> Callable[[Record], str | None]:
        """A function that judges the records of one pass, which come in the order of their files.

        ``read`` gives what the format makes of a record, for filters that do not depend on the names of columns.
        """
        return self.reason_to_drop


class ContentFilter(Filter):
    """Base of the filters that look at what a record says."""

    fields: list[str] | None = None
    """The columns whose texts are looked at; by default what the format makes of the record."""

    def start(self, read: Callable[[Record], Content]) -> Callable[[Record], str | None]:
        judge = self.judge_pass()
        if self.fields is None:
            return lambda record: judge(read(record))
        fields = self.fields
        return lambda record: judge(Content(_texts([record.get(name) for name in fields]), read(record).turns))

    def judge_pass(self) -> Callable[[Content], str | None]:
        """A function that judges what the records of one pass say."""
        raise NotImplementedError


def content_of(examples: list[Example]) -> Content:
    """What the examples of a record say."""
    texts, turns = [], 0
    answers = [answer for example in examples for answer in answers_of(example)]
    for answer in answers:
        if isinstance(answer, Conversation):
            texts += [_texts([message.get(key) for key in _SAID]) for message in answer.messages]
            turns = max(turns, len(answer.messages))
        elif isinstance(answer, Text):
            texts.append("".join(text for text, _ in answer.pieces))
            turns = max(turns, len(answer.pieces))
        else:
            texts.append(" ".join(map(str, answer.ids)))
            turns = max(turns, 1)
    # The paths through a tree share their first messages, and the sides of a pair theirs: what the record says, it
    # says once.
    return Content("\n".join(dict.fromkeys(texts) if len(answers) > 1 else texts), turns)


_SAID = ("reasoning_content", "content", "tool_calls")
"""The keys of a message that hold what is said."""


def _texts(value: object) -> str:
    """All the texts and numbers in a value, a line each."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict | list | tuple):
        parts = (_texts(part) for part in (value.values() if isinstance(value, dict) else value))
        return "\n".join(part for part in parts if part)
    return "" if value is None else str(value)


_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text: what white space separates, and each character of a script that is written without it."""
    return _WORD.findall(text)
