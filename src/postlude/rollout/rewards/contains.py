"""The reward ``contains``: the right answer stands somewhere in the completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from postlude.rollout.reward import ReferenceReward


class Contains(ReferenceReward):
    """1 where the completion contains the right answer, or one of the given texts, 0 elsewhere."""

    texts: list[str] | None = None
    """The texts of which one is enough, in place of the record's answer."""
    ignore_case: bool = False
    """Take upper and lower case as the same."""

    def score(
        self, prompt: str | Sequence[Mapping[str, Any]], completion: str, record: Mapping[str, Any]
    ) -> float | bool:
        wanted = self.answers(record) if self.texts is None else self.texts
        if self.ignore_case:
            completion, wanted = completion.casefold(), [text.casefold() for text in wanted]
        return any(text in completion for text in wanted)
