"""The format ``multiple_choice``: the right answer comes first, however the record names it."""

from __future__ import annotations

from typing import Any

import pytest

from postlude.data.example import BadRecord, Conversation, Ranked, Text
from postlude.data.formats.multiple_choice import MultipleChoice

CHOICES = ["red", "green", "blue"]


def parsed(record: Any, **keys: Any) -> Ranked:
    (example,) = MultipleChoice(**keys).parse({"question": "Which?", "choices": CHOICES, **record})
    assert isinstance(example, Ranked)
    return example


def said(example: Ranked) -> list[str]:
    found = []
    for answer in example.answers:
        assert isinstance(answer, Conversation)
        assert answer.messages[0] == {"role": "user", "content": "Which?"}
        found.append(answer.messages[1]["content"])
    return found


@pytest.mark.parametrize("answer", [1, "1", "B", "b", "green"])
def test_an_answer_is_a_number_a_letter_or_a_text(answer: Any) -> None:
    example = parsed({"answer": answer})
    assert said(example) == ["green", "red", "blue"]
    assert example.scores == [1.0, 0.0, 0.0]


def test_labels_of_the_choices() -> None:
    labelled = {"text": CHOICES, "label": ["1", "2", "3"]}
    assert said(parsed({"choices": labelled, "key": "2"}, answer="key")) == ["green", "red", "blue"]
    assert said(parsed({"choices": labelled, "answer": "3"})) == ["blue", "red", "green"]


def test_a_choice_that_continues_a_text() -> None:
    example = parsed({"answer": 2}, style="text")
    assert example.answers[0] == Text([("Which? ", 0.0), ("blue", 1.0)], end=False)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"answer": 3}, "its 'answer' is 3; it should be a number from 0 to 2"),
        ({"answer": True}, "is True"),
        ({"answer": "yellow"}, "which is none of its 3 choices"),
        ({"answer": None}, "its 'answer' is null"),
        ({"answer": 0, "choices": ["red"]}, "has 1 choice"),
        ({"answer": 0, "choices": [1, 2]}, "not a list of texts"),
        ({"answer": 0, "question": 3}, "its 'question' is a number"),
    ],
)
def test_a_question_that_is_none(record: Any, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        parsed(record)
