"""The format ``prompt_completion``: what is given, and what is to be learned."""

from __future__ import annotations

from postlude.data.example import BadRecord, Conversation, Example, Format, Record, Text
from postlude.data.formats.answers import conversations
from postlude.data.formats.columns import column, kind_of, text_column
from postlude.data.formats.conversation import Roles, messages_in, untrain_before


class PromptCompletion(Format):
    """``{"prompt": ..., "completion": ...}``, both text or both lists of messages. Only the completion is trained.

    The prompt may also be the text that a user says before a list, and a list may hold its prompt again.
    """

    produces = Text | Conversation

    prompt: str = "prompt"
    """The column of what is given."""
    completion: str = "completion"
    """The column of what is to be learned."""
    separator: str = ""
    """Between the two where they are text; belongs to the prompt."""
    tools_field: str = "tools"
    """The column of the tools where they are messages; a record without it has none."""
    roles: Roles = "strict"
    """Where they are messages: ``any`` allows roles of other names and in any order."""

    def parse(self, record: Record) -> list[Example]:
        prompt, completion = messages_in(column(record, self.prompt)), messages_in(column(record, self.completion))
        if isinstance(prompt, str) and not isinstance(completion, list | tuple):
            return [Text([(prompt + self.separator, 0.0), (text_column(record, self.completion), 1.0)])]
        if not isinstance(prompt, str | list | tuple):
            raise BadRecord(f"its '{self.prompt}' is {kind_of(prompt)}, neither text nor a list of messages")
        if not isinstance(completion, list | tuple):
            raise BadRecord(
                f"its '{self.prompt}' is a list of messages, but its '{self.completion}' is {kind_of(completion)}"
            )
        sides = {f"its '{self.completion}'": completion}
        [(_, side)] = conversations(prompt, sides, record.get(self.tools_field), self.roles)
        return [untrain_before(*side)]

    def example_record(self, conversation: Conversation) -> Record | None:
        if len(conversation.messages) < 2:
            return None
        *prompt, answer = conversation.messages
        if len(prompt) == 1 and not conversation.tools:
            return {self.prompt: prompt[0]["content"], self.completion: answer["content"]}
        record = {self.prompt: prompt, self.completion: [answer]}
        return record | ({self.tools_field: conversation.tools} if conversation.tools else {})
