"""The reward ``regex``: a regular expression is found in the completion."""

from __future__ import annotations

import re

from pydantic import field_validator

from postlude.data.example import Record
from postlude.rollout.reward import Asked, RewardFunction


class Regex(RewardFunction):
    """1 where a regular expression finds something in the completion, 0 elsewhere."""

    pattern: str
    """Python's regular expression; the dot matches line ends, too."""
    whole: bool = False
    """The whole completion must match, but for white space at its ends."""

    @field_validator("pattern")
    @classmethod
    def _is_an_expression(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"this is no regular expression: {error}") from error
        return pattern

    def score(self, prompt: Asked, completion: str, record: Record) -> float | bool:
        if self.whole:
            return re.fullmatch(self.pattern, completion.strip(), re.DOTALL) is not None
        return re.search(self.pattern, completion, re.DOTALL) is not None
