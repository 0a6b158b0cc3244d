"""The format ``ranked``: several answers to one prompt, in the order of how good they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import model_validator

from postlude.data.example import BadRecord, Conversation, Example, Format, Ranked, Record
from postlude.data.formats.answers import answers, ends_with_answer, example_sides, number
from postlude.data.formats.columns import list_column
from postlude.data.formats.conversation import Roles


class RankedAnswers(Format):
    """``{"prompt": ..., "answers": [...]}``, the best answer first, or in the order of ``scores`` or ``ranks``.

    Prompt and answers are all text or all lists of messages, or the prompt is the text that a user says before lists;
    a record without a prompt holds whole conversations, or texts, that share their beginning. Only the answers are
    trained.
    """

    later = ("repeats_prompt",)
    produces = Ranked

    prompt: str = "prompt"
    """The column of what is answered; a record without it has the prompt in every answer."""
    answers: str = "answers"
    """The column of the list of answers."""
    scores: str | None = None
    """A column with a number for each answer, the highest the best. Equal ones say nothing of their answers' order."""
    ranks: str | None = None
    """A column with a number for each answer, the lowest the best."""
    separator: str = ""
    """Between prompt and answer where they are text; belongs to the prompt."""
    tools_field: str = "tools"
    """The column of the tools where they are messages; a record without it has none."""
    roles: Roles = "strict"
    """Where they are messages: ``any`` allows roles of other names and in any order."""
    repeats_prompt: bool | None = None
    """Whether the answers hold the prompt again before what is answered. By default messages that do are
    recognised, and texts that may are an error."""

    @model_validator(mode="after")
    def _one_order(self) -> RankedAnswers:
        if self.scores is not None and self.ranks is not None:
            raise ValueError("give 'scores' or 'ranks', not both: each says which answer is better")
        return self

    def parse(self, record: Record) -> list[Example]:
        sides = list_column(record, self.answers)
        if len(sides) < 2:
            raise BadRecord(f"its '{self.answers}' has {len(sides)} entries: to rank takes two answers at least")
        names = [f"answer {place}" for place in range(1, len(sides) + 1)]
        several = answers(self, record, record.get(self.prompt), dict(zip(names, sides, strict=True)))
        if self.scores is not None:
            scores = _numbers(record, self.scores, names)
            if len(set(scores)) == 1:
                raise BadRecord(f"its '{self.scores}' are all {scores[0]:g}, so no answer is better than another")
            order = sorted(range(len(scores)), key=lambda place: -scores[place])
            return [Ranked([several[place] for place in order], [scores[place] for place in order])]
        if self.ranks is not None:
            ranks = _numbers(record, self.ranks, names)
            if len(set(ranks)) < len(ranks):
                raise BadRecord(f"two of its answers have the same rank in '{self.ranks}'; equals are told by scores")
            several = [several[place] for place in sorted(range(len(ranks)), key=ranks.__getitem__)]
        return [Ranked(several)]

    def example_record(self, conversation: Conversation) -> Record | None:
        if not ends_with_answer(conversation):
            return None
        prompt, sides = example_sides(conversation, 2)
        record: dict[str, Any] = {self.answers: sides, self.prompt: prompt}
        if self.scores is not None:
            record[self.scores] = [1.0, 0.5, 0.0]
        if self.ranks is not None:
            record[self.ranks] = [0, 1, 2]
        return record | ({self.tools_field: conversation.tools} if conversation.tools else {})


def _numbers(record: Record, name: str, names: Sequence[str]) -> list[float]:
    values: Sequence[Any] = list_column(record, name)
    if len(values) != len(names):
        raise BadRecord(f"its '{name}' has {len(values)} entries for {len(names)} answers")
    return [number(value, f"what '{name}' has for {what}") for value, what in zip(values, names, strict=True)]
