"""The format ``alpaca``: an instruction, perhaps with an input, and its output."""

from __future__ import annotations

from typing import Any

from postlude.data.example import BadRecord, Conversation, Example, Format, Record
from postlude.data.formats.columns import text_column
from postlude.data.formats.conversation import conversation


class Alpaca(Format):
    """``{"instruction": "...", "input": "...", "output": "...", "history": [["...", "..."]]}``, as a conversation.

    The user says the instruction and, after a line's end, the input; the assistant says the output. The pairs of
    the history are earlier turns of both.
    """

    produces = Conversation

    instruction_field: str = "instruction"
    """The column of the instruction."""
    input_field: str = "input"
    """A column of what the instruction is applied to; a record without it has none."""
    output_field: str = "output"
    """The column of the output."""
    history_field: str = "history"
    """A column of earlier pairs of instruction and output; a record without it has none."""
    system_field: str = "system"
    """A column with a system prompt; a record without it has none."""

    def parse(self, record: Record) -> list[Example]:
        messages: list[dict[str, Any]] = []
        if system := record.get(self.system_field):
            messages.append({"role": "system", "content": system})
        for number, pair in enumerate(record.get(self.history_field) or (), 1):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise BadRecord(f"entry {number} of its '{self.history_field}' is no pair of instruction and output")
            messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        question = text_column(record, self.instruction_field)
        if record.get(self.input_field):
            question += "\n" + text_column(record, self.input_field)
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": text_column(record, self.output_field)},
        ]
        return [conversation(messages)]

    def example_record(self, conversation: Conversation) -> Record | None:
        messages = list(conversation.messages)
        system = {self.system_field: messages.pop(0)["content"]} if messages and messages[0]["role"] == "system" else {}
        roles = [message["role"] for message in messages]
        if conversation.tools or not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            return None
        texts = [message["content"] for message in messages]
        *history, (instruction, output) = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
        last = {self.instruction_field: instruction, self.input_field: "", self.output_field: output}
        return last | system | ({self.history_field: history} if history else {})
