"""The format ``messages``: conversations as OpenAI's chat interface has them."""

from __future__ import annotations

from postlude.data.example import Conversation, Example, Format, Record
from postlude.data.formats.columns import column
from postlude.data.formats.conversation import Roles, conversation


class Messages(Format):
    """``{"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}``.

    Messages may have ``tool_calls``, ``tool_call_id``, ``name``, ``reasoning_content``, and a ``weight``: 0 keeps a
    turn from being trained, as ``loss: false`` or ``train: false`` does. What else they hold is handed to the chat
    template.
    """

    produces = Conversation

    field: str = "messages"
    """The column of the messages."""
    tools_field: str = "tools"
    """The column of the tools, a list or JSON in a text; a record without it has none."""
    roles: Roles = "strict"
    """``any`` allows roles of other names and in any order."""

    def parse(self, record: Record) -> list[Example]:
        return [conversation(column(record, self.field), record.get(self.tools_field), self.roles)]

    def example_record(self, conversation: Conversation) -> Record | None:
        record = {self.field: list(conversation.messages)}
        return record | ({self.tools_field: conversation.tools} if conversation.tools else {})
