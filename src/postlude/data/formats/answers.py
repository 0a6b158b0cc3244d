"""What the formats of preferences have in common: a prompt with several answers, of which only the answers are trained.

A prompt and its answers are all text or all lists of messages. Where no prompt is given it is what the answers have in
common at their beginning: of conversations the messages before the first that differs, of texts the words before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import combinations, takewhile
from typing import Any

from postlude.data.example import Answer, BadRecord, Conversation, Text
from postlude.data.formats.columns import kind_of
from postlude.data.formats.conversation import Roles, conversation, untrain_before

OTHER_ANSWERS = ("I would rather not say.", "It depends.")
"""Answers in example records that are worse than the one in the conversation."""


def answers(
    prompt: Any, sides: Mapping[str, Any], *, separator: str = "", tools: Any = None, roles: Roles = "strict"
) -> list[Answer]:
    """Each of ``sides`` (what it is called, and its value) as an answer to ``prompt``; None for one in their beginning.

    :class:`BadRecord` for a side that is empty, of another kind than the prompt, or an answer to something else, and
    for two that are equal.
    """
    kinds = {what: _kind(value, what) for what, value in sides.items()}
    kind = kinds[next(iter(kinds))] if prompt is None else _kind(prompt, "its prompt")
    for what, own_kind in kinds.items():
        if own_kind is not kind:
            beside = "its prompt" if prompt is not None else next(iter(kinds))
            raise BadRecord(f"{what} is {kind_of(sides[what])}, but {beside} is {'text' if kind is str else 'a list'}")
    texts = _texts(prompt, sides, separator) if kind is str else _conversations(prompt, sides, tools, roles)
    check_different(texts, list(sides))
    return texts


def check_different(several: Sequence[Answer], names: Sequence[str]) -> None:
    """:class:`BadRecord` if two of the answers are equal."""
    for (name, answer), (other_name, other) in combinations(zip(names, several, strict=True), 2):
        if answer == other:
            raise BadRecord(f"{name} and {other_name} are equal, so neither is preferred")


def answer_after(whole: Conversation, prompt: int, what: str) -> Conversation:
    """A conversation whose first so many messages are the prompt, which is not trained.

    :class:`BadRecord`, naming ``what``, if nothing is answered.
    """
    turns = [message for message in whole.messages[prompt:] if message["role"] == "assistant"]
    if not turns:
        raise BadRecord(f"{what} has no turn of the assistant to prefer or to avoid")
    if not any(message["content"].strip() or message.get("tool_calls") for message in turns):
        raise BadRecord(f"{what} is empty: the assistant says nothing")
    return untrain_before(whole, prompt)


def ends_with_answer(conversation: Conversation) -> bool:
    """Whether the conversation ends with something that can be preferred to :data:`OTHER_ANSWERS`."""
    last = conversation.messages[-1] if len(conversation.messages) > 1 else {}
    content = last.get("content")
    says = isinstance(content, str) and content.strip() not in ("", *OTHER_ANSWERS)
    return last.get("role") == "assistant" and (says or bool(last.get("tool_calls")))


def example_sides(conversation: Conversation, others: int) -> tuple[Any, list[Any]]:
    """The prompt, and the last turn with so many other answers after it, as texts or as lists of messages."""
    *prompt, answer = conversation.messages
    if len(prompt) == 1 and not conversation.tools:
        return prompt[0]["content"], [answer["content"], *OTHER_ANSWERS[:others]]
    return prompt, [[answer], *([{"role": "assistant", "content": text}] for text in OTHER_ANSWERS[:others])]


def number(value: Any, what: str) -> float:
    """A finite number. :class:`BadRecord` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRecord(f"{what} is {kind_of(value)}, not a number")
    if not math.isfinite(value):
        raise BadRecord(f"{what} is {value}, not a finite number")
    return float(value)


def _kind(value: Any, what: str) -> type:
    if isinstance(value, str):
        return str
    if isinstance(value, list | tuple):
        return list
    raise BadRecord(f"{what} is {kind_of(value)}, neither text nor a list of messages")


# --- texts --------------------------------------------------------------------------------------------------


def _texts(prompt: str | None, sides: Mapping[str, str], separator: str) -> list[Answer]:
    if prompt is None:
        prompt, sides = _split(sides)
        separator = ""
    for what, text in sides.items():
        if not text.strip():
            raise BadRecord(f"{what} is empty: there is nothing to prefer or to avoid")
    return [Text([(prompt + separator, 0.0), (text, 1.0)]) for text in sides.values()]


def _split(sides: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """What the texts have in common, cut back to the end of a word, and what is left of each."""
    if len(set(sides.values())) == 1:
        return "", dict(sides)  # equal sides are told as such
    first, last = min(sides.values()), max(sides.values())  # what these two share, all that lie between them do
    common = first[: next((i for i, pair in enumerate(zip(first, last)) if pair[0] != pair[1]), len(first))]
    words = re.match(r".*\s", common, re.DOTALL)
    if words is None:
        raise BadRecord(
            f"it has no prompt, and {' and '.join(sides)} do not begin with the same words: they answer different "
            "prompts"
        )
    prompt = words.group()
    return prompt, {what: text[len(prompt) :] for what, text in sides.items()}


# --- conversations ------------------------------------------------------------------------------------------


def _conversations(prompt: Any, sides: Mapping[str, Any], tools: Any, roles: Roles) -> list[Answer]:
    for what, messages in sides.items():
        if not messages:
            raise BadRecord(f"{what} has no message")
    before = list(prompt or ())
    whole = {what: conversation([*before, *messages], tools, roles) for what, messages in sides.items()}
    shared = len(before)
    if prompt is None:
        first, *others = whole.values()
        if any(other != first for other in others):
            shared = _shared_messages(list(whole.values()))
            _check_prompts(whole, shared)
        else:
            shared = len(first.messages) - 1
    return [answer_after(side, shared, what) for what, side in whole.items()]


def _shared_messages(several: Sequence[Conversation]) -> int:
    """How many messages the conversations have in common at their beginning."""
    together = zip(*(side.messages for side in several), strict=False)
    return sum(1 for _ in takewhile(lambda messages: all(each == messages[0] for each in messages), together))


def _check_prompts(whole: Mapping[str, Conversation], shared: int) -> None:
    """:class:`BadRecord` if the conversations part before the assistant speaks."""
    for what, side in whole.items():
        role = side.messages[shared]["role"] if len(side.messages) > shared else "assistant"
        if role != "assistant":
            raise BadRecord(
                f"{' and '.join(whole)} answer different prompts: they part at message {shared + 1} of {what}, which "
                f"is of the role '{role}'"
            )
