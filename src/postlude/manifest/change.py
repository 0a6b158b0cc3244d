"""Whether a key of the manifest may change while a stage runs: said by the class that has the key, in ``changes``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Change:
    """The answer for a key, and for all keys below it that have none of their own."""

    holds: Literal["step", "round", "never"]
    """From when an amendment of the key holds: the next step, the first step of the next round, or it may not be."""
    text: str
    """What it changes from then on; or why it may not be."""

    @property
    def allowed(self) -> bool:
        """Whether it may be amended."""
        return self.holds != "never"

    def __str__(self) -> str:
        if not self.allowed:
            return f"It may not change while the stage runs: {self.text}."
        return f"It may be amended while the stage runs, from the next {self.holds} on: {self.text}."


EVERY = "*"
"""In ``changes`` the answer for every key of the class that has none of its own."""
UNSAID = Change("never", "what has this key does not say that it may")


def from_step(effect: str) -> Change:
    """It may be amended, and holds from the next step on."""
    return Change("step", effect)


def from_round(effect: str) -> Change:
    """It may be amended, and holds from the first step of the next round of online learning on."""
    return Change("round", effect)


def never(reason: str) -> Change:
    """It may not be amended."""
    return Change("never", reason)
