"""What may still be recovered from: failures are counted from the last change of the committed state on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from postlude.cluster.failure import Failure, ProgramError
from postlude.manifest.compute import Supervision

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0


class Budget:
    """How often what is at work may fail. ``progress`` tells how far the committed state is."""

    def __init__(self, limits: Supervision, progress: Callable[[], Any]) -> None:
        self._limits, self._progress = limits, progress
        self._spent: Counter[str] = Counter()
        self._reached: Any = None

    def charge(self, failure: Failure) -> tuple[int, float]:
        """Pay for a recovery: the which it is since the committed state has changed, and how many seconds to wait
        before it. :class:`ProgramError` if that is more than is allowed."""
        reached = self._progress()
        if reached != self._reached:
            self._reached = reached
            self._spent.clear()
        budget = failure.kind.budget
        if budget is None:
            return 1, 0.0
        self._spent[budget] += 1
        attempt, allowed = self._spent[budget], getattr(self._limits, budget)
        if attempt > allowed:
            raise ProgramError(
                f"{failure} This was the {attempt}. of the {budget} since the last checkpoint, and "
                f"compute.supervision.{budget} allows {allowed}. Run again to go on from that checkpoint."
                + (f"\n\n{failure.trace}" if failure.trace else "")
            )
        return attempt, min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (attempt - 2)) if attempt > 1 else 0.0
