"""Taking values out of a record, with an error that says what is there instead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from postlude.data.example import BadRecord, Record
from postlude.nearest import suggestion_or_list


def column(record: Record, name: str) -> Any:
    """The value of a column. :class:`BadRecord` if it is missing or null."""
    value = record.get(name)
    if value is None:
        if name in record:
            raise BadRecord(f"its '{name}' is null")
        raise BadRecord(f"it has no column '{name}'.{suggestion_or_list(name, record).removesuffix('.')}")
    return value


def text_column(record: Record, name: str) -> str:
    """The text in a column. :class:`BadRecord` if it holds anything else."""
    value = column(record, name)
    if not isinstance(value, str):
        raise BadRecord(f"its '{name}' is {kind_of(value)}, not text")
    return value


def list_column(record: Record, name: str) -> Sequence[Any]:
    """The list in a column, or in JSON in its text. :class:`BadRecord` if it holds anything else."""
    value = column(record, name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, f"its '{name}'")
    if not isinstance(value, list | tuple):
        raise BadRecord(f"its '{name}' is {kind_of(value)}, not a list")
    return value


LARGEST = 3e38
"""Numbers beyond it have no place in single precision, in which weights and scores are kept."""
DEEPEST = 200
"""Levels of nesting that a value may have: templates, and what else walks through it, recurse at each."""


def read_json(text: str) -> Any:
    """The value of a JSON text. ValueError, which says what is wrong, also where Python's limits are passed."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError:
        raise ValueError("it holds a number of too many digits") from None
    # Counting is cheap and enough for nearly every text; only the others are walked through.
    if text.count("[") + text.count("{") > DEEPEST and _is_deeper(value, DEEPEST):
        raise ValueError("it is nested too deeply")
    if ("\\ud" in text or "\\uD" in text) and not _is_unicode(value):
        raise ValueError("it holds half of a surrogate pair, which is no character")
    return value


def parse_json(value: Any, what: str) -> Any:
    """``value``, or what it says where it is JSON in a text. :class:`BadRecord`, naming ``what``, if it is broken."""
    if not isinstance(value, str):
        return value
    try:
        return read_json(value)
    except json.JSONDecodeError as error:
        raise BadRecord(f"{what} should be JSON but is not: {error.msg} at character {error.pos + 1}") from error
    except ValueError as error:
        raise BadRecord(f"{what} cannot be read: {error}") from error


def without_nulls(value: Any) -> Any:
    """The value without the keys of its objects, however deep, that are null: a table has every key everywhere."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(item, dict | list) for item in level)


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """A value in an error: its beginning, where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return "a number" if isinstance(value, int | float) else f"of type {type(value).__name__}"
