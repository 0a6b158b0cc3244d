"""Learning-rate schedules that a manifest may name: pure functions of how far a stage has come.

A stage measured in epochs over a stream does not know its number of steps in advance, so a schedule takes the
step and the share of the work done, and estimates the total as their ratio. For a stage measured in steps the
ratio is exact, and the schedules are the usual ones.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from postlude.manifest.component import Component

Share = Annotated[float, Field(ge=0, le=1)]


class Schedule(Component):
    """Base of the kind ``schedules``: a linear warm-up to the peak, then :meth:`decayed`."""

    warmup_steps: Annotated[int, Field(ge=0)] = 0

    def factor(self, step: int, progress: float) -> float:
        """The share of the peak rate at ``step`` (the first is 0) when ``progress`` (0 to 1) of the work is done."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if progress <= 0:
            return self.decayed(0.0)
        total_steps = step / progress
        left = total_steps - self.warmup_steps
        return self.decayed(min((step - self.warmup_steps) / left, 1.0) if left > 0 else 1.0)

    def decayed(self, progress: float) -> float:
        """The share of the peak rate after the warm-up; ``progress`` runs from 0 at its end to 1."""
        raise NotImplementedError


class Constant(Schedule):
    """The peak rate to the end."""

    def decayed(self, progress: float) -> float:
        return 1.0


class Linear(Schedule):
    """A straight line from the peak down to ``floor``."""

    floor: Share = 0.0

    def decayed(self, progress: float) -> float:
        return 1.0 - (1.0 - self.floor) * progress


class Cosine(Schedule):
    """Half a cosine from the peak down to ``floor`` (Loshchilov and Hutter, 2017)."""

    floor: Share = 0.0

    def decayed(self, progress: float) -> float:
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


class WarmupStableDecay(Schedule):
    """The peak rate until the last ``decay`` of the work, then a straight line down to ``floor`` (Hu et al., 2024)."""

    decay: Share = 0.2
    floor: Share = 0.0

    def decayed(self, progress: float) -> float:
        if progress <= 1.0 - self.decay:
            return 1.0
        return 1.0 - (1.0 - self.floor) * (progress - (1.0 - self.decay)) / self.decay
