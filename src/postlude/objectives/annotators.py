"""What a frozen model says of each trained token, to be stored before the training: the streams that an objective reads
in place of running the model along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from postlude.data.document import REFERENCE_LOGP
from postlude.objectives.distillation import top_streams
from postlude.objectives.head import FusedHead


class Annotator(Protocol):
    """A function from a frozen model's hidden states to streams. Its ``repr`` says all that the values follow from
    beside model and data."""

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that it computes."""

    def vocabulary(self, own: int, policy: int) -> int:
        """Over how many tokens the head goes, given how many the frozen model and the trained one have.

        ValueError, with what to do, if it cannot be.
        """

    def __call__(self, head: FusedHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """The values of each stream, [rows, *width], of ``hidden`` [rows, hidden] and the tokens after them, [rows]."""


@dataclass(frozen=True)
class TokenLikelihood:
    """The log-probability of the token itself under a reference."""

    streams = (REFERENCE_LOGP.name,)

    def vocabulary(self, own: int, policy: int) -> int:
        return own

    def __call__(self, head: FusedHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return (head.log_probabilities(hidden, targets)[0],)


@dataclass(frozen=True)
class LikeliestTokens:
    """The ``k`` tokens that a teacher finds likeliest, with their log-probabilities and that of all others together.

    The distribution is that over the tokens which both models have, as with a teacher that runs along.
    """

    k: int
    temperature: float = 1.0

    @property
    def streams(self) -> tuple[str, ...]:
        return top_streams(self.k)

    def vocabulary(self, own: int, policy: int) -> int:
        if own < policy:
            raise ValueError(
                f"its vocabulary has {own:,} tokens and that of the model which is trained {policy:,}; stored "
                "probabilities need a teacher that has all of them. Leave top_k out, so that the teacher runs along"
            )
        if self.k > policy:
            raise ValueError(f"top_k is {self.k:,}, and the vocabulary has {policy:,} tokens. Lower top_k")
        return policy

    def __call__(self, head: FusedHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return head.top_log_probabilities(hidden, self.k, self.temperature)
