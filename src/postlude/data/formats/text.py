"""The format ``text``: plain text, all of it trained."""

from __future__ import annotations

from postlude.data.example import Conversation, Example, Format, Record, Text
from postlude.data.formats.columns import text_column


class PlainText(Format):
    """``{"text": "..."}``."""

    produces = Text

    field: str = "text"
    """The column."""

    def parse(self, record: Record) -> list[Example]:
        return [Text([(text_column(record, self.field), 1.0)])]

    def example_record(self, conversation: Conversation) -> Record | None:
        return {self.field: "\n".join(message["content"] for message in conversation.messages)}
