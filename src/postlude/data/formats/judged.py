"""The format ``judged``: an answer, and whether it is wanted."""

from __future__ import annotations

from typing import Any

from postlude.data.example import Answer, BadRecord, Conversation, Example, Format, Judged, Record
from postlude.data.formats.answers import answer_after, answers, ends_with_answer
from postlude.data.formats.columns import column, kind_of
from postlude.data.formats.conversation import Roles, conversation


class JudgedAnswer(Format):
    """``{"messages": [...], "label": true}``, or ``{"prompt": ..., "completion": ..., "label": false}``.

    Of messages the last turn is the answer that the label is about. Prompt and completion are both text or both lists
    of messages. Only the answer is trained.
    """

    later = ("repeats_prompt",)
    produces = Judged

    field: str = "messages"
    """The column of a conversation; a record without it has a prompt and a completion."""
    prompt: str = "prompt"
    """The column of what is answered."""
    completion: str = "completion"
    """The column of the answer."""
    label: str = "label"
    """The column that says whether the answer is wanted: true or false, or 1 or 0."""
    separator: str = ""
    """Between prompt and completion where they are text; belongs to the prompt."""
    tools_field: str = "tools"
    """The column of the tools where there are messages; a record without it has none."""
    roles: Roles = "strict"
    """Where there are messages: ``any`` allows roles of other names and in any order."""
    repeats_prompt: bool | None = None
    """Whether the completion holds the prompt again before what is answered. By default messages that do are
    recognised, and texts that may are an error."""

    def parse(self, record: Record) -> list[Example]:
        return [Judged(self._answer(record), _label(column(record, self.label), self.label))]

    def example_record(self, conversation: Conversation) -> Record | None:
        if not ends_with_answer(conversation):
            return None
        record = {self.field: list(conversation.messages), self.label: True}
        return record | ({self.tools_field: conversation.tools} if conversation.tools else {})

    def _answer(self, record: Record) -> Answer:
        whole = record.get(self.field)
        if whole is not None:
            read = conversation(whole, record.get(self.tools_field), self.roles)
            if read.messages[-1]["role"] != "assistant":
                raise BadRecord(f"the last of its '{self.field}' is not the assistant's: there is no answer to judge")
            return answer_after(read, len(read.messages) - 1, f"the answer of its '{self.field}'")
        if self.prompt not in record and self.completion not in record:
            column(record, self.field)
        prompt, completion = column(record, self.prompt), column(record, self.completion)
        (answer,) = answers(self, record, prompt, {f"its '{self.completion}'": completion})
        return answer


def _label(value: Any, name: str) -> bool:
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    shown = f"{value!r}" if isinstance(value, int | float | str) else kind_of(value)
    raise BadRecord(f"its '{name}' is {shown}; it should be true or false, or 1 or 0")
