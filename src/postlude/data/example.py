"""What a format makes of a record: the few shapes that every kind of text data comes down to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, ClassVar

from postlude.manifest.component import Component

Record = Mapping[str, Any]
"""One row of a source, as Python objects."""


class BadRecord(ValueError):
    """A record that cannot be read as what it should be. The message says what is wrong with it, not where it is."""


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them: ``role`` and ``content``, and where they apply ``tool_calls``,
    ``tool_call_id``, ``name``, ``reasoning_content``; and ``weight``, how much a trained turn counts."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Text:
    """Pieces of text with a weight each: a prompt (0) and its completion (1), or plain text (1)."""

    pieces: Sequence[tuple[str, float]]
    end: bool = True
    """Whether an end-of-sequence token follows, trained like the last piece."""


@dataclass(frozen=True)
class Tokens:
    """Token ids that somebody else made, with a weight each."""

    ids: Sequence[int]
    weights: Sequence[float]


Example = Conversation | Text | Tokens


class Format(Component):
    """Reads a record as examples. The component of the kind ``formats``."""

    produces: ClassVar[type | UnionType] = Conversation
    """The class of what :meth:`parse` returns, or several (``Text | Conversation``), so that a recipe can refuse a
    format that it cannot use."""

    def parse(self, record: Record) -> list[Example]:
        """The examples in a record: mostly one, several for a tree. :class:`BadRecord` if it is not of the format."""
        raise NotImplementedError


def texts_of(example: Example) -> Iterator[str]:
    """The text in an example, for whoever wants to learn a vocabulary from it; token ids have none."""
    if isinstance(example, Conversation):
        for message in example.messages:
            if isinstance(message.get("content"), str):
                yield message["content"]
    elif isinstance(example, Text):
        yield "".join(text for text, _ in example.pieces)
