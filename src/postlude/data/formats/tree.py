"""The format ``tree``: messages with nested replies, as Open Assistant publishes them, as conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from postlude.data.example import BadRecord, Conversation, Example, Format, Record
from postlude.data.formats.columns import column, kind_of
from postlude.data.formats.conversation import Roles, conversation

_ROLES = {"prompter": "user"}


class Tree(Format):
    """``{"prompt": {"role": "prompter", "text": "...", "replies": [{"role": "assistant", "rank": 0, ...}]}}``.

    A conversation is a path from the root that ends with a turn of the assistant. A message that was deleted or has
    no text is left out with all that hangs on it.
    """

    produces = Conversation
    roles: ClassVar[Roles] = "strict"

    field: str = "prompt"
    """The column of the root message."""
    paths: Literal["best", "all"] = "best"
    """``best``: one path, by the best ranked reply at each turn of the assistant. ``all``: every path that cannot be
    made longer; what they have in common is then trained several times."""

    def parse(self, record: Record) -> list[Example]:
        root = column(record, self.field)
        if not isinstance(root, Mapping):
            raise BadRecord(f"its '{self.field}' is {kind_of(root)}, not a message")
        paths = _paths(root, []) if _is_usable(root) else []
        if not paths:
            raise BadRecord("no path through the tree ends with a turn of the assistant")
        return [conversation(path) for path in (paths[:1] if self.paths == "best" else paths)]

    def example_record(self, conversation: Conversation) -> Record | None:
        messages, texts = conversation.messages, [message["content"] for message in conversation.messages]
        if conversation.tools or not texts or not all(isinstance(text, str) and text for text in texts):
            return None
        replies: list[dict[str, Any]] = []
        for message in reversed(messages):
            role = "prompter" if message["role"] == "user" else message["role"]
            replies = [{"role": role, "text": message["content"], "rank": 0, "replies": replies}]
        return {self.field: replies[0]}


def _paths(node: Mapping[str, Any], before: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """The paths through a message that end with the assistant and cannot be made longer, the best ranked first."""
    path = [*before, _message(node)]
    longer = [path_on for reply in _replies(node) for path_on in _paths(reply, path)]
    if longer:
        return longer
    return [path] if path[-1]["role"] == "assistant" else []


def _replies(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The replies that can be used, the best ranked first; those without a rank come last, in their order."""
    replies = [reply for reply in node.get("replies") or () if _is_usable(reply)]
    return sorted(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))


def _is_usable(node: Any) -> bool:
    if not isinstance(node, Mapping):
        raise BadRecord(f"a message of the tree is {kind_of(node)}, not an object")
    return not node.get("deleted") and bool(node.get("text"))


def _message(node: Mapping[str, Any]) -> dict[str, str]:
    role = node.get("role")
    if not isinstance(role, str):
        raise BadRecord("a message of the tree has no role")
    return {"role": _ROLES.get(role, role), "content": node["text"]}
