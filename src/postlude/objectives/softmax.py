"""What a softmax over the vocabulary asks of columns: all of them here, or a part here and the rest on other ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from postlude.model.tensor_parallel import VocabularyPart, enter
from postlude.objectives.forward_gradients import add_at


class Softmax:
    """Every column is here."""

    def columns(self, vocabulary: int, rows: int) -> int:
        """How many of the head's ``rows`` here are real, of a vocabulary of so many tokens."""
        return vocabulary

    def enter(self, hidden: Tensor) -> Tensor:
        """The hidden states that logits are made of; what they are differentiated by is the sum over all columns."""
        return hidden

    def largest(self, values: Tensor) -> Tensor:
        """The largest over all columns, of what is the largest over those here; may be in place."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """The sum over all columns, of what is the sum over those here; may be in place."""
        return values

    def at(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The logits [rows, 1] of the targets [rows, 1]; zero where another rank has them: they are to be summed."""
        return logits.gather(1, targets)

    def add_at(self, targets: Tensor, into: Tensor, values: Tensor, slope: Tensor | None) -> None:
        """Add ``values``, times ``slope``, [rows, 1], at the targets that are here."""
        add_at(targets, into, values, slope)


class SharedSoftmax(Softmax):
    """Some columns are here, the others on the other ranks, which have the same rows."""

    def __init__(self, part: VocabularyPart) -> None:
        self.part = part

    def columns(self, vocabulary: int, rows: int) -> int:
        return min(vocabulary - self.part.first, rows)

    def enter(self, hidden: Tensor) -> Tensor:
        return enter(hidden, self.part.group)

    def largest(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.part.group)
        return values

    def total(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.part.group)
        return values

    def at(self, logits: Tensor, targets: Tensor) -> Tensor:
        places, here = self._places(logits, targets)
        return logits.gather(1, places).masked_fill(~here, 0)

    def add_at(self, targets: Tensor, into: Tensor, values: Tensor, slope: Tensor | None) -> None:
        places, here = self._places(into, targets)
        add_at(places, into, (values * torch.ones_like(places)).masked_fill(~here, 0), slope)

    def _places(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        places = targets - self.part.first
        here = (places >= 0) & (places < logits.shape[1])
        return places.clamp(0, logits.shape[1] - 1), here
