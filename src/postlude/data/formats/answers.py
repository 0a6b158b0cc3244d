"""What the formats of preferences have in common: a prompt with several answers, of which only the answers are trained.

A prompt and its answers are all text or all lists of messages; a text can be the user's message before lists. Where no
prompt is given it is what the answers have in common at their beginning: of conversations the messages before the first
that differs, of texts the words before it.

Answers may hold their prompt again. Messages that do are whole conversations, and recognised: no answer begins with a
user's turn. A text that begins with its prompt may be an answer all the same, so that the manifest has to say which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations, takewhile
from typing import Any, Protocol

from postlude.data.example import Answer, BadRecord, Conversation, Record, Text
from postlude.data.formats.columns import LARGEST, kind_of, shown
from postlude.data.formats.conversation import Roles, conversation, messages_in, untrain_before

OTHER_ANSWERS = ("I would rather not say.", "It depends.")
"""Answers in example records that are worse than the one in the conversation."""


class AnswerKeys(Protocol):
    """The keys that formats of answers share: a format itself. Each documents its own."""

    @property
    def separator(self) -> str: ...
    @property
    def tools_field(self) -> str: ...
    @property
    def roles(self) -> Roles: ...
    @property
    def repeats_prompt(self) -> bool | None: ...


def answers(keys: AnswerKeys, record: Record, prompt: Any, sides: Mapping[str, Any]) -> list[Answer]:
    """Each of ``sides`` of a record (what it is called, and its value) as an answer to ``prompt``, as the ``keys`` of
    its format say; None for a prompt in their beginning.

    :class:`BadRecord` for a side that is empty, of another kind than the prompt, or an answer to something else, and
    for two that are equal.
    """
    prompt, sides = messages_in(prompt), {what: messages_in(value) for what, value in sides.items()}
    kinds = {what: _kind(value, what) for what, value in sides.items()}
    kind = kinds[next(iter(kinds))] if prompt is None else _kind(prompt, "its prompt")
    if kind is str and set(kinds.values()) == {list}:
        prompt, kind = _user_says(prompt), list
    for what, own_kind in kinds.items():
        if own_kind is not kind:
            beside = "its prompt" if prompt is not None else next(iter(kinds))
            raise BadRecord(f"{what} is {kind_of(sides[what])}, but {beside} is {'text' if kind is str else 'a list'}")
    several: list[Answer] = []
    if kind is str:
        several += _texts(prompt, sides, keys.separator, keys.repeats_prompt)
    else:
        read = conversations(prompt, sides, record.get(keys.tools_field), keys.roles, keys.repeats_prompt)
        several += [answer_after(*side, what) for what, side in read]
    check_different(several, list(sides))
    return several


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
    """A finite number. :class:`BadRecord` for anything else, also for one that single precision does not hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRecord(f"{what} is {kind_of(value)}, not a number")
    if not abs(value) <= LARGEST:
        raise BadRecord(f"{what} is {shown(value)}, not a finite number of single precision")
    return float(value)


def _kind(value: Any, what: str) -> type:
    if isinstance(value, str):
        return str
    if isinstance(value, list | tuple):
        return list
    raise BadRecord(f"{what} is {kind_of(value)}, neither text nor a list of messages")


# --- texts --------------------------------------------------------------------------------------------------


def _texts(prompt: str | None, sides: Mapping[str, str], separator: str, repeats_prompt: bool | None) -> list[Answer]:
    if prompt is None:
        prompt, sides = _split(sides)
        separator = ""
    elif _is_repeated(prompt, sides, repeats_prompt):
        sides = {what: text[len(prompt) :] for what, text in sides.items()}
        separator = ""
    for what, text in sides.items():
        if not text.strip():
            raise BadRecord(f"{what} is empty: there is nothing to prefer or to avoid")
    return [Text([(prompt + separator, 0.0), (text, 1.0)]) for text in sides.values()]


def _is_repeated(prompt: str, sides: Mapping[str, str], repeats_prompt: bool | None) -> bool:
    """Whether the texts hold their prompt again. :class:`BadRecord` where nothing says it."""
    without = next((what for what, text in sides.items() if not text.startswith(prompt)), None)
    if repeats_prompt and without is not None:
        raise BadRecord(
            f"{without} does not begin with its prompt, which the format's 'repeats_prompt' says it repeats"
        )
    if repeats_prompt is None and without is None and len(prompt.split()) > 1:
        raise BadRecord(
            f"{' and '.join(sides)} begin with the whole of its prompt. If they hold it again before the answer, set "
            "the format's 'repeats_prompt: true'; if they are answers that begin so, set it to false"
        )
    return bool(repeats_prompt)


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


def conversations(
    prompt: Any, sides: Mapping[str, Any], tools: Any, roles: Roles, repeats_prompt: bool | None = None
) -> list[tuple[str, tuple[Conversation, int]]]:
    """Lists of messages by what they are called, each as a whole conversation and how many of its messages are the
    prompt: a text, messages, or None for what the lists have in common."""
    for what, messages in sides.items():
        if not messages:
            raise BadRecord(f"{what} has no message")
    if prompt is None:
        whole = {what: conversation(messages, tools, roles) for what, messages in sides.items()}
        shared = _shared_messages(list(whole.values()))
        if shared < max(len(side.messages) for side in whole.values()):
            _check_prompts(whole, shared)
        else:  # one, or equal ones, which are told as such
            shared -= 1
    else:
        before = _user_says(prompt) if isinstance(prompt, str) else list(prompt)
        shared = 0 if repeats_prompt is False else _end_of_prompt(before, sides)
        if repeats_prompt and not shared:
            raise BadRecord(f"{' and '.join(sides)} do not begin with its prompt, as 'repeats_prompt' says")
        if not shared and roles == "strict":
            _check_joint(before, sides)
        if shared:
            before = []
        whole = {what: conversation([*before, *messages], tools, roles) for what, messages in sides.items()}
        shared = shared or len(before)
    return [(what, (side, shared)) for what, side in whole.items()]


def _user_says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _end_of_prompt(prompt: Sequence[Any], sides: Mapping[str, Sequence[Any]]) -> int:
    """After how many messages, the same in every side, the prompt was said again; 0 where it is not.

    :class:`BadRecord` where one side repeats it and another does not.
    """
    asked = _said(prompt)
    said = {what: _said(messages) for what, messages in sides.items()}
    last = min(map(len, said.values())) - 1
    several = list(said.values())
    shared = sum(1 for _ in takewhile(lambda messages: all(each == messages[0] for each in messages), zip(*several)))
    if asked and several[0][0][0] not in _ANSWERING:
        for end in range(min(shared, last), len(asked) - 1, -1):
            if several[0][end - len(asked) : end] == asked:
                return end
    repeating = [what for what, own in said.items() if asked and own[: len(asked)] == asked]
    if repeating:
        raise BadRecord(
            f"{repeating[0]} says its prompt again, "
            + ("and answers nothing" if len(several[0]) == len(asked) else "but not all of its answers begin with it")
        )
    return 0


def _said(messages: Sequence[Any]) -> list[tuple[Any, ...]]:
    """What tells whether two messages say the same: role, text and calls of each."""
    read = conversation(messages, None, "any").messages if messages else ()
    return [(message["role"], message["content"].strip(), message.get("tool_calls")) for message in read]


def _check_joint(prompt: Sequence[Any], sides: Mapping[str, Sequence[Any]]) -> None:
    """:class:`BadRecord` where an answer begins as prompts do, although it does not repeat its own."""
    ends = _said(prompt)[-1][0] if prompt else "assistant"
    for what, messages in sides.items():
        begins = _said(messages[:1])[0][0]
        if ends == "user" and begins in ("user", "system", "developer"):
            raise BadRecord(
                f"{what} is out of order: it begins with a message of the role '{begins}', though its prompt ends with "
                "one of the user, and it does not repeat this prompt word by word. Where it is a whole conversation, "
                "give as 'prompt' the name of a column that is not there: the prompt is then what the sides share"
            )


_ANSWERING = ("assistant", "tool")
"""Roles that an answer to a prompt begins with."""


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
