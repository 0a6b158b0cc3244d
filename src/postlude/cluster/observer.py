"""What the controller sees of the ranks at work, written down at intervals, with the alarms that follow from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from postlude.cluster.worker import Address, Look
from postlude.storage import Journal
from postlude.telemetry.readings import Alarms, Reading


class Observer:
    """Keeps a reading of each rank in a journal, one line a rank, every so many seconds; ``tell`` records an alarm (its
    kind and fields)."""

    def __init__(self, journal: Journal, tell: Callable[..., None], seconds: float) -> None:
        self._journal, self._tell, self._seconds = journal, tell, seconds
        self._alarms = Alarms()
        self._newest: dict[int, Reading] = {}
        self._size = 0
        self._due = time.monotonic() + seconds

    def begin(self, size: int) -> None:
        """A group of this size was formed: what others did before it says nothing of it."""
        self._alarms, self._newest, self._size = Alarms(), {}, size
        self._due = time.monotonic() + self._seconds

    def saw(self, rank: int, address: Address, look: Look, round_trip_seconds: float) -> None:
        """Take a look at a rank; ``round_trip_seconds`` is how long it took."""
        if time.monotonic() >= self._due and rank not in self._newest:
            self._newest[rank] = look.reading
            line: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "rank": rank}
            line |= {"host": address.host, "round_trip_seconds": round_trip_seconds, **look.reading.to_json()}
            self._journal.append(line)
        if len(self._newest) == self._size:
            for alarm in self._alarms.look(self._newest):
                self._tell("alarm", what=f"{alarm.what}, rank {alarm.rank}", reason=alarm.reason)
            self._newest, self._due = {}, time.monotonic() + self._seconds
