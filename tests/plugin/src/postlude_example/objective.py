"""An objective of a user's own, on the general path of the fused head."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from postlude.objectives.objective import ObjectiveConfig


class ConfidencePenalty(ObjectiveConfig):
    """Negative log-likelihood minus ``beta`` times the entropy, over trained tokens."""

    beta: Annotated[float, Field(ge=0)] = 0.1

    def build(self):
        from postlude_example.penalty import Penalty

        return Penalty(self.beta)
