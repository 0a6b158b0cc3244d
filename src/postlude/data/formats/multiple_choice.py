"""The format ``multiple_choice``: a question, and answers of which one is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from postlude.data.example import Answer, BadRecord, Conversation, Example, Format, Ranked, Record, Text
from postlude.data.formats.answers import OTHER_ANSWERS
from postlude.data.formats.columns import column, kind_of, text_column


class MultipleChoice(Format):
    """``{"question": "...", "choices": ["...", ...], "answer": 2}``, where the first choice is 0.

    The answer may also be a letter (``B`` is the second choice) or the text of the choice. The right answer comes
    first in the example. Choices may be ``{"text": [...], "label": [...]}``, whose labels the answer is one of.
    """

    produces = Ranked

    question: str = "question"
    """The column of the question."""
    choices: str = "choices"
    """The column of the choices."""
    answer: str = "answer"
    """The column of the right one."""
    style: Literal["messages", "text"] = "messages"
    """``messages``: the question is a user's turn, a choice the assistant's. ``text``: the choice continues the
    question, with nothing after it."""
    separator: str = " "
    """Between question and choice where they are text."""

    def parse(self, record: Record) -> list[Example]:
        question = text_column(record, self.question)
        choices, labels = self._choices(record)
        right = self._right(column(record, self.answer), choices, labels)
        order = [right, *(place for place in range(len(choices)) if place != right)]
        answers: list[Answer] = [self._answer(question, choices[place]) for place in order]
        return [Ranked(answers, [1.0, *[0.0] * (len(choices) - 1)])]

    def example_record(self, conversation: Conversation) -> Record | None:
        """The answer is the first of three choices."""
        if conversation.tools or [message["role"] for message in conversation.messages] != ["user", "assistant"]:
            return None
        question, answer = (message["content"] for message in conversation.messages)
        return {self.question: question, self.choices: [answer, *OTHER_ANSWERS], self.answer: 0}

    def _choices(self, record: Record) -> tuple[list[str], list[str] | None]:
        choices = column(record, self.choices)
        labels = None
        if isinstance(choices, Mapping):
            labels = [str(label) for label in choices.get("label") or []]
            choices = choices.get("text")
        if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
            raise BadRecord(f"its '{self.choices}' is {kind_of(choices)}, not a list of texts")
        if len(choices) < 2:
            raise BadRecord(f"its '{self.choices}' has {len(choices)} choice(s), and a choice needs two")
        return list(choices), labels if labels and len(labels) == len(choices) else None

    def _right(self, answer: Any, choices: list[str], labels: list[str] | None) -> int:
        if isinstance(answer, str):
            if labels and answer in labels:
                return labels.index(answer)
            if choices.count(answer) == 1:
                return choices.index(answer)
            letter = ord(answer.strip().upper()) - ord("A") if len(answer.strip()) == 1 else -1
            if answer.strip().isdecimal():
                letter = int(answer)
            if 0 <= letter < len(choices):
                return letter
            raise BadRecord(f"its '{self.answer}' is {answer!r}, which is none of its {len(choices)} choices")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise BadRecord(f"its '{self.answer}' is {answer!r}; it should be a number from 0 to {len(choices) - 1}")
        return answer

    def _answer(self, question: str, choice: str) -> Answer:
        if self.style == "text":
            return Text([(question + self.separator, 0.0), (choice, 1.0)], end=False)
        return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": choice}])
