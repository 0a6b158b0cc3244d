"""The filter ``length``: records that are too short or too long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field, model_validator

from postlude.data.filters.filter import Content, ContentFilter, words

Count = Annotated[int, Field(ge=0)]


class Length(ContentFilter):
    """Keeps records within all the bounds that are given."""

    min_characters: Count | None = None
    """Characters of all the text in the record, at least."""
    max_characters: Count | None = None
    """Characters of all the text in the record, at most."""
    min_words: Count | None = None
    """Words, at least; a character counts as one in scripts without spaces."""
    max_words: Count | None = None
    """Words, at most; a character counts as one in scripts without spaces."""
    min_turns: Count | None = None
    """Messages of the conversation, at least; of the longest, where the record holds several."""
    max_turns: Count | None = None
    """Messages of the conversation, at most; of the longest, where the record holds several."""

    @model_validator(mode="after")
    def _is_bounded(self) -> Length:
        bounds = [(self._bounds(what), what) for what in ("characters", "words", "turns")]
        if all(bound == (None, None) for bound, _ in bounds):
            raise ValueError("give at least one bound, such as 'min_words'")
        for (low, high), what in bounds:
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{what} ({low}) is above max_{what} ({high}): nothing would be kept")
        return self

    def _bounds(self, what: str) -> tuple[int | None, int | None]:
        return getattr(self, f"min_{what}"), getattr(self, f"max_{what}")

    def judge_pass(self) -> Callable[[Content], str | None]:
        return self._judge

    def _judge(self, content: Content) -> str | None:
        for what, count in (
            ("characters", lambda: len(content.text)),
            ("words", lambda: len(words(content.text))),
            ("turns", lambda: content.turns),
        ):
            low, high = self._bounds(what)
            if low is None and high is None:
                continue
            size = count()
            if low is not None and size < low:
                return f"fewer than {low} {what}"
            if high is not None and size > high:
                return f"more than {high} {what}"
        return None
