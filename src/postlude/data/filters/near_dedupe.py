"""The filter ``near_dedupe``: records that say almost the same as one before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from postlude.data.filters.filter import Content, ContentFilter, words


class NearDedupe(ContentFilter):
    """Keeps the first of the records whose sequences of words overlap by ``threshold``, as MinHash estimates it.

    Deterministic. Holds about 0.7 kB for each kept record. Give ``fields`` where all records share a long text, such
    as a system prompt: what is equal everywhere makes everything similar.
    """

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Shared sequences among all those of two records (Jaccard similarity)."""
    ngram: Annotated[int, Field(gt=0)] = 5
    """Words of a sequence; a shorter text is one sequence."""

    def judge_pass(self) -> Callable[[Content], str | None]:
        from postlude.data.filters.minhash import MinHashIndex, shingles

        index = MinHashIndex(self.threshold)

        def judge(content: Content) -> str | None:
            sequence = words(content.text.casefold())
            if sequence and not index.add(shingles(sequence, self.ngram)):
                return "nearly the same text as an earlier record"
            return None

        return judge
