"""The special tokens of a tokenizer, as they stand in rendered text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopTokens:
    """Tells where in a text a special token stands: what ends a turn is mostly any_token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special.update(tokenizer.all_special_tokens)
        known = sorted(filter(None, special), key=len, reverse=True)
        any_token = "|".join(map(re.escape, known)) if known else "(?!)"
        self._next = re.compile(rf"\s*(?:{any_token})")
        self._longest = max(map(len, known), default=0)
        self._before = re.compile(rf"(?:{any_token})$")
        self._end_of_sequence = tokenizer.eos_token

    def end_after(self, text: str, position: int) -> int | None:
        """Where the special token ends that comes next in ``text``; None if something else comes."""
        match = self._next.match(text, position)
        return match and match.end()

    def stand_before(self, text: str, position: int) -> bool:
        """Whether a special token ends at ``position``."""
        return self._before.search(text[max(position - self._longest, 0) : position]) is not None

    def until_end_of_sequence(self, text: str) -> str:
        """``text`` up to the end of the first end-of-sequence token, or all of it if there is none."""
        token = self._end_of_sequence
        return text[: text.index(token) + len(token)] if token and token in text else text
