"""The reward ``contains``: the right answer stands somewhere in the completion."""

from __future__ import annotations

from postlude.data.example import Record
from postlude.rollout.reward import Asked, ReferenceReward


class Contains(ReferenceReward):
    """1 where the completion contains the right answer, or one of the given texts, 0 elsewhere."""

    texts: list[str] | None = None
    """The texts of which one is enough, in place of the record's answer."""
    ignore_case: bool = False
    """Take upper and lower case as the same."""

    def score(self, prompt: Asked, completion: str, record: Record) -> float | bool:
        wanted = self.answers(record) if self.texts is None else self.texts
        if self.ignore_case:
            completion, wanted = completion.casefold(), [text.casefold() for text in wanted]
        return any(text in completion for text in wanted)
