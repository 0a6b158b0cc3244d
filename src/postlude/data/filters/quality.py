"""The filter ``quality``: rules that need no knowledge of the language.

After the repetition and symbol rules of Rae et al. 2021 ("Scaling Language Models", appendix A.1), with bounds wide
enough for conversations, code and mathematics.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Annotated

from pydantic import Field

from postlude.data.filters.filter import Content, ContentFilter, words
from postlude.manifest.component import Share

_ENOUGH_LINES, _ENOUGH_NGRAMS = 5, 20
"""Below so many, a repetition says nothing."""


class Quality(ContentFilter):
    """Drops text that repeats itself, or is hardly text. A share of 1 (of 0 for a minimum) switches a rule off."""

    max_repeated_lines: Share = 0.3
    """Share of the lines that occurred before, blank ones apart, in texts of at least 5 lines."""
    max_repeated_ngrams: Share = 0.3
    """Share of the sequences of ``ngram`` words that occurred before, in texts of at least 20 of them."""
    ngram: Annotated[int, Field(gt=0)] = 5
    """Words of a sequence."""
    min_letters: Share = 0.2
    """Letters, with their marks, among the characters that are not white space."""
    max_digits: Share = 0.5
    """Digits among the characters that are not white space."""
    max_symbols: Share = 0.5
    """What is neither letter nor digit nor control character, among the characters that are not white space."""
    max_control: Share = 0.01
    """Control, private and unassigned characters and the replacement character, among all."""
    max_mean_word: Annotated[float, Field(gt=0)] = 20.0
    """Characters of a word on average; long ones are data in disguise."""

    def judge_pass(self) -> Callable[[Content], str | None]:
        return self._judge

    def _judge(self, content: Content) -> str | None:
        text = content.text
        kinds: Counter[str] = Counter()
        for character, count in Counter(text).items():
            kinds[_kind(character)] += count
        visible = kinds.total() - kinds["space"]
        if not visible:
            return "no visible character"
        if kinds["control"] > self.max_control * len(text):
            return "control characters"
        if kinds["digit"] > self.max_digits * visible:
            return "many digits"
        if kinds["symbol"] > self.max_symbols * visible:
            return "many symbols"
        if kinds["letter"] < self.min_letters * visible:
            return "few letters"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if _share_repeated(lines, _ENOUGH_LINES) > self.max_repeated_lines:
            return "repeated lines"
        text_words = words(text)
        if visible > self.max_mean_word * len(text_words):
            return "long words"
        ngrams = list(zip(*(text_words[i:] for i in range(self.ngram)), strict=False))
        if _share_repeated(ngrams, _ENOUGH_NGRAMS) > self.max_repeated_ngrams:
            return "repeated sequences of words"
        return None


@lru_cache(2**16)
def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if character.isspace() or category[0] == "Z":
        return "space"
    if category == "Cf":  # joins emoji and shapes Arabic and Indic letters
        return "letter"
    if category[0] == "C" or character == "\N{REPLACEMENT CHARACTER}":
        return "control"
    return {"L": "letter", "M": "letter", "N": "digit"}.get(category[0], "symbol")


def _share_repeated(items: Sequence[object], enough: int) -> float:
    """The share of the items that occurred before."""
    return 1 - len(set(items)) / len(items) if len(items) >= enough else 0.0
