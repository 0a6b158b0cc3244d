"""The reward ``contains``: the right answer stands somewhere in the completion."""

from __future__ import annotations

from collections import Counter

from postlude.data.example import Record
from postlude.rollout.calls import calls_in, calls_of_answer
from postlude.rollout.reward import Asked, ReferenceReward


class Contains(ReferenceReward):
    """1 where the completion contains the right answer, or one of the given texts, 0 elsewhere.

    Where the right answer is calls of tools, the completion has to make all of them, among others or not.
    """

    texts: list[str] | None = None
    """The texts of which one is enough, in place of the record's answer."""
    ignore_case: bool = False
    """Take upper and lower case as the same."""

    def score(self, prompt: Asked, completion: str, record: Record) -> float | bool:
        wanted = self.answers(record) if self.texts is None else self.texts
        if self.texts is None and (calls := [calls_of_answer(answer) for answer in wanted]) and any(calls):
            made = Counter(calls_in(completion))
            if any(own and Counter(own) <= made for own in calls):
                return True
            wanted = [answer for answer, own in zip(wanted, calls, strict=True) if not own]
        if self.ignore_case:
            completion, wanted = completion.casefold(), [text.casefold() for text in wanted]
        return any(text in completion for text in wanted)
