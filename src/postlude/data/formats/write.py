"""Writing a conversation as a record of a format: the way back from :meth:`Format.parse`.

A format of one's own takes part by registering a function for its class::

    @write.register
    def _(format: MyFormat, messages, tools):
        return {"dialogue": [message["content"] for message in messages]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

from postlude.data.example import Format, Record
from postlude.data.formats.alpaca import Alpaca
from postlude.data.formats.history import History, keys_of_template
from postlude.data.formats.messages import Messages
from postlude.data.formats.multiple_choice import MultipleChoice
from postlude.data.formats.prompt_completion import PromptCompletion
from postlude.data.formats.sharegpt import ShareGPT
from postlude.data.formats.text import PlainText
from postlude.data.formats.tokens import IGNORED, TokenIds
from postlude.data.formats.tree import Tree
from postlude.manifest.errors import ManifestError

Turns = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None


@singledispatch
def write(format: Format, messages: Turns, tools: Tools) -> Record | None:
    """The record that says what the messages say, its main column first; None if the format cannot say it.

    ManifestError if nobody has said how the format is written.
    """
    raise ManifestError(
        f"Records of the format '{format.component_name}' cannot be made: its package registers no way to write them "
        "(postlude.data.formats.write). Check the format on real records instead."
    )


@write.register
def _(format: Messages, messages: Turns, tools: Tools) -> Record | None:
    return {format.field: list(messages)} | ({format.tools_field: tools} if tools else {})


@write.register
def _(format: ShareGPT, messages: Turns, tools: Tools) -> Record | None:
    if format.reply_field is not None and len(messages) < 2:
        return None
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    turns: list[dict[str, Any]] = []
    for message in messages:
        calls = [call["function"] for call in message.get("tool_calls", ())]
        if message["content"] or not calls:
            role = names.get(message["role"], message["role"])
            turns.append({format.role_field: role, format.content_field: message["content"]})
        if calls:
            content = json.dumps(calls[0] if len(calls) == 1 else calls)
            turns.append({format.role_field: "function_call", format.content_field: content})
    record: dict[str, Any] = {format.field: turns}
    if format.reply_field is not None:
        record[format.reply_field] = turns.pop()
    return record | ({format.tools_field: json.dumps(tools)} if tools else {})


@write.register
def _(format: Alpaca, messages: Turns, tools: Tools) -> Record | None:
    record: dict[str, Any] = {}
    if messages and messages[0]["role"] == "system":
        record[format.system_field], messages = messages[0]["content"], messages[1:]
    roles = [message["role"] for message in messages]
    if tools or not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        return None
    said = [message["content"] for message in messages]
    pairs = [list(pair) for pair in zip(said[::2], said[1::2], strict=True)]
    (instruction, output), history = pairs[-1], pairs[:-1]
    last = {format.instruction_field: instruction, format.input_field: "", format.output_field: output}
    return last | record | ({format.history_field: history} if history else {})


@write.register
def _(format: PromptCompletion, messages: Turns, tools: Tools) -> Record | None:
    if len(messages) == 2 and not tools:
        return {format.prompt: messages[0]["content"], format.completion: messages[1]["content"]}
    if len(messages) < 2:
        return None
    record = {format.prompt: list(messages[:-1]), format.completion: [messages[-1]]}
    return record | ({format.tools_field: tools} if tools else {})


@write.register
def _(format: MultipleChoice, messages: Turns, tools: Tools) -> Record | None:
    """The answer is the first of three choices."""
    if tools or [message["role"] for message in messages] != ["user", "assistant"]:
        return None
    choices = [messages[1]["content"], "I would rather not say.", "It depends."]
    return {format.question: messages[0]["content"], format.choices: choices, format.answer: 0}


@write.register
def _(format: PlainText, messages: Turns, tools: Tools) -> Record | None:
    return {format.field: "\n".join(message["content"] for message in messages)}


@write.register
def _(format: TokenIds, messages: Turns, tools: Tools) -> Record | None:
    """One token a byte, those of the assistant trained."""
    said = [(byte, message["role"] == "assistant") for message in messages for byte in message["content"].encode()]
    if not said:
        return None
    record: dict[str, Any] = {format.field: [byte for byte, _ in said]}
    if format.weights is not None:
        record[format.weights] = [float(trained) for _, trained in said]
    if format.labels is not None:
        record[format.labels] = [byte if trained else IGNORED for byte, trained in said]
    return record


@write.register
def _(format: History, messages: Turns, tools: Tools) -> Record | None:
    said = [message["content"] for message in messages]
    if not said or (format.separator and any(format.separator in text for text in said)):
        return None
    if format.item is None:
        return {format.items: said}
    return {format.items: [dict.fromkeys(keys_of_template(format.item), text) for text in said]}


@write.register
def _(format: Tree, messages: Turns, tools: Tools) -> Record | None:
    if tools or not messages or not all(message["content"] for message in messages):
        return None
    names = {"user": "prompter"}
    replies: list[dict[str, Any]] = []
    for message in reversed(messages):
        role = names.get(message["role"], message["role"])
        replies = [{"role": role, "text": message["content"], "rank": 0, "replies": replies}]
    return {format.field: replies[0]}
