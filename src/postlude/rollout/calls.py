"""Tool calls in texts: what a turn says together with its calls, and the calls that a text makes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

_BEGINS, _ENDS = "<tool_call>", "</tool_call>"
_OBJECT = re.compile(r'\{[ \t\n\r]*["}]')
_MOST_WORK = 64
"""So many times the length of a text is read at most to find calls in it: what begins like JSON, one thing in
another, and never ends is read again from each beginning."""


def spoken(message: Mapping[str, Any]) -> str:
    """What a message says, and after it its calls, each as ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``:
    as Qwen, Hermes and others write them."""
    calls = [call.get("function") or call for call in message.get("tool_calls") or ()]
    said = [{"name": call.get("name"), "arguments": call.get("arguments")} for call in calls]
    marked = [f"<tool_call>{json.dumps(call, ensure_ascii=False, default=str)}</tool_call>" for call in said]
    return "".join([str(message.get("content") or ""), *marked])


def calls_of_answer(answer: Any) -> list[str]:
    """The calls, as :func:`calls_in` tells them, that a right answer consists of: marked ones in a text, a text that is
    nothing but JSON of calls, or such objects. None where it is something else."""
    if isinstance(answer, str):
        marked = marked_calls(answer)
        return [call for text in marked or [answer] for call in _only_calls(text)]
    several = answer if isinstance(answer, list | tuple) else [answer]
    calls = [_call(call) for call in several]
    return [call for call in calls if call is not None] if None not in calls else []


def marked_calls(text: str) -> list[str]:
    """What stands between the marks of calls in a text, without the white space at its ends."""
    marked = []
    begin = text.find(_BEGINS)
    while begin >= 0 and (end := text.find(_ENDS, begin + len(_BEGINS))) >= 0:
        marked.append(text[begin + len(_BEGINS) : end].strip())
        begin = text.find(_BEGINS, end + len(_ENDS))
    return marked


def calls_in(text: str) -> list[str]:
    """The calls that a model makes in a text, in their order, each as JSON that is the same for the same call.

    A call is an object with a ``name`` and with ``arguments`` or ``parameters``, whatever marks stand round it.
    """
    calls: list[str] = []
    begin, work = _OBJECT.search(text), 0
    while begin is not None and work <= _MOST_WORK * len(text):
        place = begin.start()
        end = place + 1
        try:
            value, end = _DECODER.raw_decode(text, place)
            calls += _calls_below(value)
        except json.JSONDecodeError as error:
            work += error.pos - place + error.pos // _MOST_WORK  # such an error counts the lines before it
        except (ValueError, RecursionError):
            work += _MOST_WORK * sys.getrecursionlimit()
        begin = _OBJECT.search(text, end)
    return calls


def _calls_below(value: Any) -> list[str]:
    """The calls that a value of JSON is, or that stand in it."""
    call = _call(value)
    if call is not None:
        return [call]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [call for part in parts for call in _calls_below(part)]


def _only_calls(text: str) -> list[str]:
    try:
        return calls_of_answer(value) if isinstance(value := _DECODER.decode(text), Mapping | list) else []
    except (ValueError, RecursionError):
        return []


def _call(value: Any) -> str | None:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    arguments = next((function[key] for key in ("arguments", "parameters") if key in function), None)
    try:
        arguments = _DECODER.decode(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(arguments, Mapping):
            return None
        return json.dumps([function["name"], _plain(arguments)], sort_keys=True)
    except (ValueError, TypeError, RecursionError):
        return None


def _plain(value: Any) -> Any:
    """With numbers that are whole as whole numbers: 1.0 is 1, and true is not."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


_DECODER = json.JSONDecoder()
