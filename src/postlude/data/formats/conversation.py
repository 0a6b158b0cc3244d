"""What the chat formats have in common: messages brought into the one form that chat templates take, and checked.

Notable:

- The arguments of a tool call become a mapping, whether they came as one or as JSON in a text: templates print
  them in their own way and would quote a text once more.
- Content in parts becomes one text, with what was thought and what was called taken out of it.
- Nulls count as absent: a table has a value for each key in every message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from postlude.data.example import BadRecord, Conversation
from postlude.data.formats.columns import LARGEST, kind_of, parse_json, read_json, shown, without_nulls
from postlude.nearest import suggestion_or_list

Roles = Literal["strict", "any"]
"""``strict``: the roles below, in an order that a conversation can have. ``any``: whatever roles in whatever order."""

TRAINED_KEYS = ("loss", "train")
"""Keys of a message that say, true or false, whether it is trained, where it has no ``weight``."""
FIRST = ("system", "developer")
KNOWN = (*FIRST, "user", "assistant", "tool")


def conversation(messages: Any, tools: Any = None, roles: Roles = "strict") -> Conversation:
    """A conversation from messages and tools as they are found in records. :class:`BadRecord` if it is none."""
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # as a table of texts has them
        messages = parse_json(messages, "the text of its messages")
    if not isinstance(messages, list | tuple):
        raise BadRecord(f"its messages are {kind_of(messages)}, not a list")
    if not messages:
        raise BadRecord("it is an empty conversation: it has no message")
    read = [_message(message, f"message {number}") for number, message in enumerate(messages, 1)]
    if roles == "strict":
        check_roles(read)
    return Conversation(read, tool_descriptions(tools))


def messages_in(value: Any) -> Any:
    """``value``, or the messages that a text is nothing but the JSON of, as a table of texts has them."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        read = read_json(value)
    except ValueError:
        return value
    are_messages = isinstance(read, list) and all(isinstance(one, Mapping) and "role" in one for one in read)
    return read if read and are_messages else value


def untrain_before(whole: Conversation, start: int) -> Conversation:
    """The conversation, with the messages before ``start`` not trained."""
    prompt = [{**message, "weight": 0.0} for message in whole.messages[:start]]
    return Conversation([*prompt, *whole.messages[start:]], whole.tools)


def check_roles(messages: Sequence[Mapping[str, Any]]) -> None:
    """:class:`BadRecord` if a role is unknown or out of order.

    The order: system or developer messages first, then a user, then turns of assistant and user; an assistant that
    calls tools may be followed by one result for each call, and those by the assistant again.
    """
    before, unanswered = "", list[Any]()
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in KNOWN:
            hint = suggestion_or_list(role, KNOWN)
            raise BadRecord(
                f"message {number} has the unknown role '{role}'.{hint} The format's 'roles: any' takes others"
            )
        if role == "tool":
            _answer(unanswered, message.get("tool_call_id"), number)
        else:
            unanswered = [call.get("id") for call in message.get("tool_calls", ())]
        if role not in _AFTER[before]:
            place = f"it follows a message of the role '{before}'" if before else "it comes first"
            raise BadRecord(
                f"message {number}, of the role '{role}', is out of order: {place}. "
                "The format's 'roles: any' allows that"
            )
        before = role


def _answer(unanswered: list[Any], call_id: Any, number: int) -> None:
    """Take the call that message ``number`` answers from those without an answer."""
    if not unanswered:
        raise BadRecord(f"message {number} is the result of a tool, but no call before it is without a result")
    if call_id in unanswered:
        unanswered.remove(call_id)
    elif call_id is None or None in unanswered:
        unanswered.pop(0)
    else:
        raise BadRecord(f"message {number} is the result of the call '{call_id}', which is not among those before it")


_AFTER = {
    "": (*FIRST, "user"),
    **dict.fromkeys(FIRST, (*FIRST, "user")),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def tool_descriptions(tools: Any) -> list[dict[str, Any]] | None:
    """Tools as templates take them: ``{"type": "function", "function": {...}}``; None for none."""
    tools = parse_json(tools, "its tools") if tools else None
    if not tools:
        return None
    if not isinstance(tools, list | tuple):
        raise BadRecord(f"its tools are {kind_of(tools)}, not a list")
    described = []
    for number, tool in enumerate(tools, 1):
        tool = parse_json(without_nulls(tool), f"tool {number}")
        if not isinstance(tool, Mapping):
            raise BadRecord(f"tool {number} is {kind_of(tool)}, not an object")
        function = tool.get("function") or tool
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRecord(f"tool {number} has no name")
        described.append({"type": "function", "function": dict(function)} if function is tool else dict(tool))
    return described


def tool_call(call: Any, what: str) -> dict[str, Any]:
    """A tool call as templates take it, from OpenAI's form or from ``{"name": ..., "arguments": ...}``."""
    call = parse_json(without_nulls(call), what)
    if not isinstance(call, Mapping):
        raise BadRecord(f"{what} is {kind_of(call)}, not an object")
    function = call.get("function") or call
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRecord(f"{what} names no function")
    name = function["name"]
    arguments = function.get("arguments")
    arguments = parse_json(arguments, f"what {what} passes to '{name}'") if arguments not in (None, "") else {}
    if not isinstance(arguments, Mapping):
        raise BadRecord(f"what {what} passes to '{name}' is {kind_of(arguments)}, not an object")
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _message(message: Any, what: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRecord(f"{what} is {kind_of(message)}, not an object")
    read: dict[str, Any] = without_nulls(message)
    role = read.get("role")
    if not isinstance(role, str):
        raise BadRecord(
            f"{what} has no role" if role is None else f"{what} has a role that is {kind_of(role)}, not text"
        )
    if role == "function":  # what OpenAI called it before there were several calls in a message
        read["role"] = role = "tool"
    calls = read.pop("tool_calls", None) or []
    if not isinstance(calls, list | tuple):
        raise BadRecord(f"the tool calls of {what} are {kind_of(calls)}, not a list")
    calls = [*calls, read.pop("function_call")] if "function_call" in read else list(calls)
    content = read.get("content")
    if isinstance(content, list | tuple):
        content, reasoning, called = _join(content, what)
        if reasoning:
            read.setdefault("reasoning_content", reasoning)
        calls += called
    elif isinstance(content, Mapping) and role == "tool":
        content = json.dumps(content, ensure_ascii=False)
    elif content is None and role == "assistant" and calls:
        content = ""
    if not isinstance(content, str):
        raise BadRecord(f"{what} has no content" if content is None else f"the content of {what} is {kind_of(content)}")
    if calls and role != "assistant":
        raise BadRecord(f"{what} calls a tool, but its role is '{role}', not 'assistant'")
    read["content"] = content
    if calls:
        read["tool_calls"] = [tool_call(call, f"tool call {i} of {what}") for i, call in enumerate(calls, 1)]
    flags = [read.pop(key) for key in TRAINED_KEYS if isinstance(read.get(key), bool)]
    if "weight" in read or flags:
        read["weight"] = weight(read.get("weight", all(flags)), what)
    return read


def weight(value: Any, what: str) -> float:
    """How much ``what`` counts. :class:`BadRecord` unless it is a finite number from 0."""
    if not isinstance(value, int | float) or not 0 <= value <= LARGEST:
        raise BadRecord(f"the weight of {what} is {shown(value)}; it should be a number from 0")
    return float(value)


def _join(parts: Sequence[Any], what: str) -> tuple[str, str, list[Any]]:
    """The text of the parts, what they say was thought, and the calls among them."""
    texts, thoughts, calls = [], [], []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else kind_of(part)
        if kind == "text":
            texts.append(_text_of(part, kind, what))
        elif kind in ("reasoning", "thinking"):
            thoughts.append(_text_of(part, kind, what))
        elif kind == "tool_call":
            calls.append(part.get("value") or part.get("tool_call"))
        else:
            raise BadRecord(f"the content of {what} has a part of the type '{kind}'; only text can be trained on")
    return "".join(texts), "".join(thoughts), calls


def _text_of(part: Mapping[str, Any], kind: str, what: str) -> str:
    text = next((part[key] for key in ("text", kind, "value", "content") if part.get(key) is not None), None)
    if not isinstance(text, str):
        raise BadRecord(f"the content of {what} has a part of the type '{kind}' without a text")
    return text
