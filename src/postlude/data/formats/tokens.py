"""The format ``tokens``: token ids that somebody else made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import model_validator

from postlude.data.example import BadRecord, Conversation, Example, Format, Record, Tokens
from postlude.data.formats.columns import kind_of, list_column
from postlude.data.formats.conversation import weight

IGNORED = -100
"""The label of a token that is not trained, everywhere in the field."""


class TokenIds(Format):
    """``{"input_ids": [...]}``, all trained, or only where ``weights`` or ``labels`` say so."""

    produces = Tokens

    field: str = "input_ids"
    """The column of the ids."""
    weights: str | None = None
    """A column with a weight for each token."""
    labels: str | None = None
    """A column with a label for each token: its own id, or -100 where it is not trained. Not shifted."""

    @model_validator(mode="after")
    def _one_mask(self) -> TokenIds:
        if self.weights is not None and self.labels is not None:
            raise ValueError("give 'weights' or 'labels', not both: each says which tokens are trained")
        return self

    def parse(self, record: Record) -> list[Example]:
        ids = _integers(record, self.field)
        if not ids:
            raise BadRecord(f"its '{self.field}' is empty")
        if min(ids) < 0:
            raise BadRecord(f"its '{self.field}' has the id {min(ids)} at position {ids.index(min(ids)) + 1}")
        if self.labels is not None:
            return [Tokens(ids, self._weights_of_labels(record, ids))]
        if self.weights is None:
            return [Tokens(ids, [1.0] * len(ids))]
        weights = list_column(record, self.weights)
        self._check_same_length(ids, weights, self.weights)
        return [Tokens(ids, [weight(value, f"token {number}") for number, value in enumerate(weights, 1)])]

    def example_record(self, conversation: Conversation) -> Record | None:
        """One token a byte, those of the assistant trained."""
        turns = [(turn["content"].encode(), turn["role"] == "assistant") for turn in conversation.messages]
        tokens = [(byte, trained) for content, trained in turns for byte in content]
        if not tokens:
            return None
        record: dict[str, Any] = {self.field: [byte for byte, _ in tokens]}
        if self.weights is not None:
            record[self.weights] = [float(trained) for _, trained in tokens]
        if self.labels is not None:
            record[self.labels] = [byte if trained else IGNORED for byte, trained in tokens]
        return record

    def _weights_of_labels(self, record: Record, ids: list[int]) -> list[float]:
        labels = _integers(record, self.labels or "")
        self._check_same_length(ids, labels, self.labels or "")
        for number, (token, label) in enumerate(zip(ids, labels, strict=True), 1):
            if label not in (token, IGNORED):
                raise BadRecord(
                    f"label {number} is {label} where the token is {token}; a label is its token's id or {IGNORED}, "
                    "and labels are not shifted"
                )
        return [0.0 if label == IGNORED else 1.0 for label in labels]

    def _check_same_length(self, ids: list[int], others: Sequence[Any], name: str) -> None:
        if len(others) != len(ids):
            raise BadRecord(f"its '{name}' has {len(others)} entries for {len(ids)} tokens")


def _integers(record: Record, name: str) -> list[int]:
    values = list(list_column(record, name))
    for number, value in enumerate(values, 1):
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadRecord(f"entry {number} of its '{name}' is {kind_of(value)}, not a whole number")
    return values
