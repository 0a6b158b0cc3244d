"""The reward ``exact_match``: the whole completion is the right answer."""

from __future__ import annotations

from postlude.data.example import Record
from postlude.rollout.reward import Asked, ReferenceReward


class ExactMatch(ReferenceReward):
    """1 where the completion is the right answer, 0 elsewhere."""

    ignore_case: bool = False
    """Take upper and lower case as the same."""
    ignore_space: bool = True
    """Take any stretch of white space as one space, and none at the ends."""

    def score(self, prompt: Asked, completion: str, record: Record) -> float | bool:
        return self._plain(completion) in [self._plain(answer) for answer in self.answers(record)]

    def _plain(self, text: str) -> str:
        text = " ".join(text.split()) if self.ignore_space else text
        return text.casefold() if self.ignore_case else text
