"""The reward ``exact_match``: the whole completion is the right answer."""

from __future__ import annotations

from postlude.data.example import Record
from postlude.rollout.calls import calls_in, calls_of_answer
from postlude.rollout.reward import Asked, ReferenceReward


class ExactMatch(ReferenceReward):
    """1 where the completion is the right answer, 0 elsewhere.

    Where the right answer is calls of tools, the completion has to make these very calls, in this order; what it says
    beside them, and the marks and spaces round them, do not count.
    """

    ignore_case: bool = False
    """Take upper and lower case as the same."""
    ignore_space: bool = True
    """Take any stretch of white space as one space, and none at the ends."""

    def score(self, prompt: Asked, completion: str, record: Record) -> float | bool:
        return any(self._is_right(completion, answer) for answer in self.answers(record))

    def _is_right(self, completion: str, answer: str) -> bool:
        calls = calls_of_answer(answer)
        return calls_in(completion) == calls if calls else self._plain(completion) == self._plain(answer)

    def _plain(self, text: str) -> str:
        text = " ".join(text.split()) if self.ignore_space else text
        return text.casefold() if self.ignore_case else text
