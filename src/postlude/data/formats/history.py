"""The format ``history``: what somebody did, one thing after another, as one text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Formatter
from typing import Annotated, Any

from pydantic import Field, field_validator

from postlude.data.example import BadRecord, Conversation, Example, Format, Record, Text
from postlude.data.formats.columns import kind_of, list_column


class History(Format):
    """``{"items": [...]}``: texts, or objects that ``item`` makes a text of. What is learned is what comes next."""

    produces = Text

    items: str = "items"
    """The column of the list, the earliest first."""
    item: str | None = None
    """The text of an item that is an object: ``{title}, {rating}`` with its keys in braces."""
    separator: str = "\n"
    """After each item but the last."""
    train_last: Annotated[int, Field(gt=0)] | None = None
    """Train only so many of the last items; by default all."""

    @field_validator("item")
    @classmethod
    def _names_keys(cls, template: str | None) -> str | None:
        if template is None:
            return None
        keys = _keys_of(template)
        if not all(keys) or not keys:
            raise ValueError("name the keys of an item in braces, as in '{title}'")
        return template

    def parse(self, record: Record) -> list[Example]:
        items = list_column(record, self.items)
        if not items:
            raise BadRecord(f"its '{self.items}' is empty")
        texts = [self._text(item, f"item {number}") for number, item in enumerate(items, 1)]
        first = 0 if self.train_last is None else max(len(texts) - self.train_last, 0)
        before = "".join(text + self.separator for text in texts[:first])
        trained = self.separator.join(texts[first:])
        return [Text([(before, 0.0), (trained, 1.0)] if before else [(trained, 1.0)])]

    def example_record(self, conversation: Conversation) -> Record | None:
        texts = [message["content"] for message in conversation.messages]
        if not texts or (self.separator and any(self.separator in text for text in texts)):
            return None
        keys = None if self.item is None else _keys_of(self.item)
        return {self.items: texts if keys is None else [dict.fromkeys(keys, text) for text in texts]}

    def _text(self, item: Any, what: str) -> str:
        if self.item is None:
            if not isinstance(item, str):
                raise BadRecord(f"{what} is {kind_of(item)}, not text; the key 'item' makes a text of an object")
            text = item
        elif not isinstance(item, Mapping):
            raise BadRecord(f"{what} is {kind_of(item)}, not an object for the template '{self.item}'")
        else:
            missing = next((key for key in _keys_of(self.item) if item.get(key) is None), None)
            if missing is not None:
                raise BadRecord(f"{what} has no '{missing}'; it has {', '.join(item) or 'nothing'}")
            try:
                text = self.item.format_map(item)
            except (LookupError, ValueError, AttributeError, TypeError) as error:
                raise BadRecord(f"{what} does not fit the template '{self.item}': {error!r}") from error
        if self.separator and self.separator in text:
            raise BadRecord(f"{what} holds the separator {self.separator!r}, so it would count as several: {text!r}")
        return text


def _keys_of(template: str) -> list[str]:
    """The keys that a template takes from an item; empty ones where it counts instead of naming."""
    fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    return [re.split(r"[.\[]", name)[0] for name in fields]
