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
from postlude.data.formats.judged import JudgedAnswer
from postlude.data.formats.messages import Messages
from postlude.data.formats.multiple_choice import MultipleChoice
from postlude.data.formats.preference import Preference, ShareGPTPreference
from postlude.data.formats.prompt_completion import PromptCompletion
from postlude.data.formats.ranked import RankedAnswers
from postlude.data.formats.sharegpt import ShareGPT
from postlude.data.formats.text import PlainText
from postlude.data.formats.tokens import IGNORED, TokenIds
from postlude.data.formats.tree import Tree
from postlude.manifest.problem import ManifestError

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


# --- preferences: the last turn is the answer, and others are made up beside it --------------------------------

_OTHERS = ("I would rather not say.", "It depends.")
"""Answers that are worse than the one in the messages."""


def _has_answer(messages: Turns) -> bool:
    """Whether the messages end with something that can be preferred to the others."""
    last = messages[-1] if len(messages) > 1 else {}
    spoken = last.get("content")
    says = isinstance(spoken, str) and spoken.strip() not in ("", *_OTHERS)
    return last.get("role") == "assistant" and (says or bool(last.get("tool_calls")))


def _prompt_and_sides(messages: Turns, others: int, as_text: bool) -> tuple[Any, list[Any]]:
    """The prompt, and the answer with so many others after it, as texts or as lists of messages."""
    if as_text:
        return messages[0]["content"], [messages[-1]["content"], *_OTHERS[:others]]
    return list(messages[:-1]), [[messages[-1]], *([{"role": "assistant", "content": o}] for o in _OTHERS[:others])]


@write.register
def _(format: Preference, messages: Turns, tools: Tools) -> Record | None:
    if not _has_answer(messages):
        return None
    prompt, (chosen, rejected) = _prompt_and_sides(messages, 1, len(messages) == 2 and not tools)
    record = {format.chosen: chosen, format.rejected: rejected, format.prompt: prompt}
    return record | ({format.tools_field: tools} if tools else {})


@write.register
def _(format: ShareGPTPreference, messages: Turns, tools: Tools) -> Record | None:
    if not _has_answer(messages):
        return None
    turns = ShareGPT(field=format.field, role_field=format.role_field, content_field=format.content_field)
    record = write(turns, messages, tools)
    assert record is not None, "turns can say any messages"
    said = list(record[format.field])
    chosen = said.pop()
    rejected = {format.role_field: "gpt", format.content_field: _OTHERS[0]}
    return {**record, format.field: said, format.chosen: chosen, format.rejected: rejected}


@write.register
def _(format: RankedAnswers, messages: Turns, tools: Tools) -> Record | None:
    if not _has_answer(messages):
        return None
    prompt, sides = _prompt_and_sides(messages, 2, len(messages) == 2 and not tools)
    record: dict[str, Any] = {format.answers: sides, format.prompt: prompt}
    if format.scores is not None:
        record[format.scores] = [1.0, 0.5, 0.0]
    if format.ranks is not None:
        record[format.ranks] = [0, 1, 2]
    return record | ({format.tools_field: tools} if tools else {})


@write.register
def _(format: JudgedAnswer, messages: Turns, tools: Tools) -> Record | None:
    if not _has_answer(messages):
        return None
    return {format.field: list(messages), format.label: True} | ({format.tools_field: tools} if tools else {})
