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
    """The list in a column. :class:`BadRecord` if it holds anything else."""
    value = column(record, name)
    if not isinstance(value, list | tuple):
        raise BadRecord(f"its '{name}' is {kind_of(value)}, not a list")
    return value


def parse_json(value: Any, what: str) -> Any:
    """``value``, or what it says where it is JSON in a text. :class:`BadRecord`, naming ``what``, if it is broken."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise BadRecord(f"{what} should be JSON but is not: {error.msg} at character {error.pos + 1}") from error


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
