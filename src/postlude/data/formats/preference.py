"""The formats ``preference`` and ``sharegpt_preference``: two answers to one prompt, of which one is preferred."""

from __future__ import annotations

from postlude.data.example import BadRecord, Conversation, Example, Format, Ranked, Record
from postlude.data.formats.answers import (
    OTHER_ANSWERS,
    answer_after,
    answers,
    check_different,
    ends_with_answer,
    example_sides,
    number,
)
from postlude.data.formats.columns import column, list_column
from postlude.data.formats.conversation import Roles
from postlude.data.formats.sharegpt import ShareGPT


class Preference(Format):
    """``{"prompt": ..., "chosen": ..., "rejected": ...}``, all text or all lists of messages.

    The prompt may also be the text that a user says before lists. A record without a prompt holds two whole
    conversations, or texts, that share their beginning. Only the answers are trained. A record may have a ``margin``,
    by how much the chosen answer is better.
    """

    later = ("repeats_prompt",)
    produces = Ranked

    prompt: str = "prompt"
    """The column of what is answered; a record without it has the prompt in both sides."""
    chosen: str = "chosen"
    """The column of the preferred answer."""
    rejected: str = "rejected"
    """The column of the other answer."""
    margin: str = "margin"
    """A column of a number, by how much the preferred answer is better; a record without it has none."""
    separator: str = ""
    """Between prompt and answer where they are text; belongs to the prompt."""
    tools_field: str = "tools"
    """The column of the tools where they are messages; a record without it has none."""
    roles: Roles = "strict"
    """Where they are messages: ``any`` allows roles of other names and in any order."""
    repeats_prompt: bool | None = None
    """Whether the sides hold the prompt again before what is answered. By default messages that do are
    recognised, and texts that may are an error."""

    def parse(self, record: Record) -> list[Example]:
        sides = {f"its '{name}'": column(record, name) for name in (self.chosen, self.rejected)}
        pair = answers(self, record, record.get(self.prompt), sides)
        return [Ranked(pair, _scores(record, self.margin))]

    def example_record(self, conversation: Conversation) -> Record | None:
        if not ends_with_answer(conversation):
            return None
        prompt, (chosen, rejected) = example_sides(conversation, 1)
        record = {self.chosen: chosen, self.rejected: rejected, self.prompt: prompt}
        return record | ({self.tools_field: conversation.tools} if conversation.tools else {})


class ShareGPTPreference(Format):
    """``{"conversations": [{"from": "human", "value": "..."}], "chosen": {"from": "gpt", ...}, "rejected": {...}}``."""

    produces = Ranked

    field: str = "conversations"
    """The column of the turns before the answer."""
    chosen: str = "chosen"
    """The column of the preferred turn."""
    rejected: str = "rejected"
    """The column of the other turn."""
    margin: str = "margin"
    """A column of a number, by how much the preferred answer is better; a record without it has none."""
    role_field: str = "from"
    """The key of a turn that says who speaks."""
    content_field: str = "value"
    """The key of a turn that holds what is said."""
    system_field: str = "system"
    """A column with a system prompt; a record without it has none."""
    tools_field: str = "tools"
    """A column with the tools, a list or JSON in a text; a record without it has none."""
    roles: Roles = "strict"
    """``any`` allows roles of other names and in any order."""

    def parse(self, record: Record) -> list[Example]:
        if not list_column(record, self.field):
            raise BadRecord(f"its '{self.field}' has no turn")
        pair = [self._side(record, name) for name in (self.chosen, self.rejected)]
        check_different(pair, [f"its '{name}'" for name in (self.chosen, self.rejected)])
        return [Ranked(pair, _scores(record, self.margin))]

    def example_record(self, conversation: Conversation) -> Record | None:
        record = self._reader(self.chosen).example_record(conversation) if ends_with_answer(conversation) else None
        rejected = {self.role_field: "gpt", self.content_field: OTHER_ANSWERS[0]}
        return None if record is None else {**record, self.rejected: rejected}

    def _reader(self, reply_field: str) -> ShareGPT:
        shared = {key: value for key, value in self if key in ShareGPT.model_fields}
        return ShareGPT(reply_field=reply_field, **shared)

    def _side(self, record: Record, name: str) -> Conversation:
        column(record, name)
        [whole] = self._reader(name).parse(record)
        assert isinstance(whole, Conversation)
        return answer_after(whole, len(whole.messages) - 1, f"its '{name}'")


def _scores(record: Record, name: str) -> tuple[float, float] | None:
    margin = record.get(name)
    return None if margin is None else (number(margin, f"its '{name}'"), 0.0)
