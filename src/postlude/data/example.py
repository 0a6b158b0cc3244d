"""What a format makes of a record: the few kinds of examples that all text data come down to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, ClassVar

from postlude.manifest.component import Component
from postlude.manifest.problem import ManifestError

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


Answer = Conversation | Text
"""A prompt and what is answered to it: what is trained of it is the answer."""


@dataclass(frozen=True)
class Ranked:
    """Answers to one prompt, the best first: the two sides of a pair, a ranked list. They stay one unit."""

    answers: Sequence[Answer]
    """At least two."""
    scores: Sequence[float] | None = None
    """How good each is, where the data say: the difference of two is the margin between them."""


@dataclass(frozen=True)
class Judged:
    """An answer of which somebody said whether it is wanted."""

    answer: Answer
    desirable: bool


Example = Conversation | Text | Tokens | Ranked | Judged


def answers_of(example: Example) -> Sequence[Answer | Tokens]:
    """What becomes a document each."""
    if isinstance(example, Ranked):
        return example.answers
    return (example.answer,) if isinstance(example, Judged) else (example,)


def scores_of(example: Ranked | Judged) -> Sequence[float]:
    """The value of the stream ``score`` of each answer: its score, or 1 for a wanted one and -1 for an unwanted."""
    if isinstance(example, Judged):
        return (1.0 if example.desirable else -1.0,)
    return example.scores or (0.0,) * len(example.answers)


class Format(Component):
    """Reads a record as examples. The component of the kind ``formats``."""

    produces: ClassVar[type | UnionType] = Conversation
    """The class of what :meth:`parse` returns, or several (``Text | Conversation``), so that a recipe can refuse a
    format that it cannot use."""

    def parse(self, record: Record) -> list[Example]:
        """The examples in a record: mostly one, several for a tree. :class:`BadRecord` if it is not of the format."""
        raise NotImplementedError

    def example_record(self, conversation: Conversation) -> Record | None:
        """A record that says what the conversation says, its main column first; None if the format cannot say it.

        Synthetic records are made of these. A format that other kinds of examples come from says the nearest. A
        question and its answer every format can say.
        """
        raise ManifestError(
            f"Records of the format '{self.component_name}' cannot be made: it does not say what one looks like (its "
            "method 'example_record'). Check the format on real records instead."
        )


def texts_of(example: Example) -> Iterator[str]:
    """The text in an example, for whoever wants to learn a vocabulary from it; token ids have none."""
    for answer in answers_of(example):
        if isinstance(answer, Conversation):
            for message in answer.messages:
                if isinstance(message.get("content"), str):
                    yield message["content"]
        elif isinstance(answer, Text):
            yield "".join(text for text, _ in answer.pieces)
