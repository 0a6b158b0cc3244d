"""A loss over pairs of a user's own, for the recipe ``dpo``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from postlude.objectives.preference import PreferenceLoss


class Exponential(PreferenceLoss):
    """exp(-b h), cut off where it is larger than ``ceiling`` (Freund and Schapire, 1997, for the loss)."""

    ceiling: Annotated[float, Field(gt=0)] = 10.0
    """No pair counts more than this."""

    def losses(self, pairs):
        return (-self.beta * pairs.difference).exp().clamp(max=self.ceiling)
