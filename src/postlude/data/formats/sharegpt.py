"""The format ``sharegpt``: conversations of ``from`` and ``value``, with tools as LLaMA-Factory writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from postlude.data.example import BadRecord, Conversation, Example, Format, Record
from postlude.data.formats.columns import column, kind_of, list_column, parse_json
from postlude.data.formats.conversation import TRAINED_KEYS, Roles, conversation

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


class ShareGPT(Format):
    """``{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "tools": "[...]"}``.

    ``function_call`` turns hold the call as JSON, or several in a list; ``observation`` turns hold the result.
    """

    produces = Conversation

    field: str = "conversations"
    """The column of the turns."""
    role_field: str = "from"
    """The key of a turn that says who speaks."""
    content_field: str = "value"
    """The key of a turn that holds what is said."""
    system_field: str = "system"
    """A column with a system prompt; a record without it has none."""
    tools_field: str = "tools"
    """A column with the tools, a list or JSON in a text; a record without it has none."""
    reply_field: str | None = None
    """A column that holds one more turn, after the others: ``chosen`` trains on the chosen side of pairs."""
    roles: Roles = "strict"
    """``any`` allows roles of other names and in any order."""

    def parse(self, record: Record) -> list[Example]:
        turns = list(list_column(record, self.field))
        if self.reply_field is not None:
            turns.append(column(record, self.reply_field))
        messages: list[dict[str, Any]] = []
        if system := record.get(self.system_field):
            messages.append({"role": "system", "content": system})
        for number, turn in enumerate(turns, 1):
            self._add(messages, turn, f"turn {number}")
        return [conversation(messages, record.get(self.tools_field), self.roles)]

    def example_record(self, conversation: Conversation) -> Record | None:
        if self.reply_field is not None and len(conversation.messages) < 2:
            return None
        names = {"user": "human", "assistant": "gpt", "tool": "observation"}
        turns: list[dict[str, Any]] = []
        for message in conversation.messages:
            calls = [call["function"] for call in message.get("tool_calls", ())]
            if message["content"] or not calls:
                role = names.get(message["role"], message["role"])
                turns.append({self.role_field: role, self.content_field: message["content"]})
            if calls:
                content = json.dumps(calls[0] if len(calls) == 1 else calls)
                turns.append({self.role_field: "function_call", self.content_field: content})
        reply = {} if self.reply_field is None else {self.reply_field: turns.pop()}
        tools = {self.tools_field: json.dumps(conversation.tools)} if conversation.tools else {}
        return {self.field: turns, **reply, **tools}

    def _add(self, messages: list[dict[str, Any]], turn: Any, what: str) -> None:
        if not isinstance(turn, Mapping):
            raise BadRecord(f"{what} is {kind_of(turn)}, not an object")
        name, content = turn.get(self.role_field), turn.get(self.content_field)
        if not isinstance(name, str):
            raise BadRecord(f"{what} has no '{self.role_field}' that says who speaks")
        message: dict[str, Any] = {"role": _ROLES.get(name, name), "content": content}
        message |= {key: turn[key] for key in ("weight", *TRAINED_KEYS) if turn.get(key) is not None}
        if name == "function_call":
            calls = parse_json(content, what)
            calls = calls if isinstance(calls, list | tuple) else [calls]
            if messages and messages[-1]["role"] == "assistant":
                # The assistant's words and the call that follows them are one message everywhere else.
                messages[-1].setdefault("tool_calls", []).extend(calls)
                return
            message |= {"content": "", "tool_calls": list(calls)}
        messages.append(message)
