"""A format and a filter of a user's own."""

from __future__ import annotations

from postlude.data.example import BadRecord, Conversation, Example, Format, Record
from postlude.data.filters.filter import Filter


class Dialogue(Format):
    """A script in one text column: lines that begin with a speaker's name and a colon."""

    field: str = "script"
    assistant: str = "Guide"

    def parse(self, record: Record) -> list[Example]:
        messages = []
        for line in record[self.field].splitlines():
            speaker, colon, said = line.partition(":")
            if not colon:
                raise BadRecord(f"the line {line!r} names no speaker")
            role = "assistant" if speaker.strip() == self.assistant else "user"
            messages.append({"role": role, "content": said.strip()})
        return [Conversation(messages)]


class Mentions(Filter):
    """Keeps records whose script holds a word."""

    word: str

    def reason_to_drop(self, record: Record) -> str | None:
        return None if self.word in record["script"] else f"does not mention '{self.word}'"
