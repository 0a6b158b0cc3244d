"""What the server knows of runs: each is read once, by one background task, however many tabs show it.

A run is followed from when somebody looks at it until nobody has for a while. What is read is only what came since; a
tab copies from here. Reading runs in threads: whoever takes columns, events or the status takes :attr:`Followed.lock`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from postlude.dashboard.memory import given_back
from postlude.errors import UserError
from postlude.runs import Run, Stage
from postlude.storage import Entries
from postlude.telemetry import events
from postlude.workflow.overview import Overview
from postlude.workflow.status import RunStatus, status_of

if TYPE_CHECKING:
    import numpy as np

    from postlude.runs.columns import Columns, Curve

LOOK_SECONDS = 0.5
"""Between two looks at what is followed."""
STATUS_SECONDS = 5.0
"""The state of a run is told anew after so long, though no event came."""
KEPT_SECONDS = 120.0
"""A run that nobody looks at is followed so long."""


class Followed:
    """One run, kept up with."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.lock = threading.RLock()
        self.status: RunStatus | None = None
        """None until it was read, and where it cannot be."""
        self.troubles: dict[str, str] = {}
        """What cannot be told and why, by what it is: the run, its events, a stage's metrics."""
        self.version = 0
        """Grows with every change that was read."""
        self.looked_at = time.monotonic()
        self._events: list[events.Event] = []
        self._entries = Entries(run.events)
        self._columns: dict[str, Columns] = {}
        self._read_at = 0.0
        self._states: Sequence[object] = ()

    def update(self) -> None:
        """Read what came. Nothing of the run's files raises an error here: it stands in :attr:`troubles`."""
        with self.lock, given_back():
            changed = self._try("events", self._update_events)
            for name, columns in list(self._columns.items()):
                changed |= self._try(f"metrics of {name}", columns.update)
            changed |= self._try("run", self._update_status)
            self.version += changed

    def touch(self) -> None:
        """Say that somebody looks at it."""
        self.looked_at = time.monotonic()

    def events(self) -> list[events.Event]:
        """What happened, in order."""
        with self.lock:
            return list(self._events)

    def stages(self) -> list[str]:
        """The stages of its manifest."""
        return [stage.summary.stage for stage in self.status.stages] if self.status else []

    def current_stage(self) -> str | None:
        """That which is at work, else the last that has begun."""
        if self.status is None:
            return None
        begun = [each.summary for each in self.status.stages if each.summary.state != "pending"]
        running = [summary.stage for summary in begun if summary.state == "running"]
        chosen = running or [summary.stage for summary in begun]
        return chosen[-1] if chosen else None

    def columns(self, stage: str) -> Columns:
        """The metrics of a stage, followed from now on. Take the lock to read more than one thing of them."""
        from postlude.runs.columns import Columns

        with self.lock, given_back():
            if stage not in self._columns:
                self._columns[stage] = Columns(self.run.stage(stage).metrics)
                self._try(f"metrics of {stage}", self._columns[stage].update)
            return self._columns[stage]

    def curve(
        self, stage: str, metric: str, width: int, first: int | None = None, last: int | None = None, over: int = 1
    ) -> Curve:
        """A metric in ``width`` pixel columns, from one step to another; ``over`` 1 exactly what was told, else means
        of so many values."""
        from postlude.runs.columns import thin

        with self.lock:
            columns = self.columns(stage)
            if over <= 1:
                return columns.curve(metric, width, first, last)
            (steps, values), every = columns.column(metric), columns.steps
        ends = every[[0, -1]].tolist() if len(every) else [0, 0]
        steps, values = trailing_means(steps, values, over)
        return thin(steps, values, width, ends[0] if first is None else first, ends[1] if last is None else last)

    def _update_events(self) -> bool:
        before = len(self._events)
        kept = self._entries.update()
        del self._events[kept:]
        self._events += events.typed(self.run.events, self._entries.entries[len(self._events) :], len(self._events) + 1)
        return kept != before or len(self._events) != before

    def _update_status(self) -> bool:
        if not self.run.exists():
            self.status = None
            raise UserError(f"There is no run at '{self.run.uri}' any more: it was removed or moved.")
        stages = [self.run.stage(name).status() for name in self.stages()]
        states = [*((stage.state, stage.changed_at) for stage in stages), len(self._events), self.run.holder()]
        if self.status and states == self._states and time.monotonic() - self._read_at < STATUS_SECONDS:
            return False
        self.status = status_of(self.run, self._columns_of)
        self._states, self._read_at = states, time.monotonic()
        return True

    def _columns_of(self, stage: Stage) -> Columns:
        return self.columns(stage.name)

    def _try(self, what: str, read: Callable[[], bool]) -> bool:
        """Read something; whether it, or what is wrong with it, has changed."""
        before = self.troubles.pop(what, None)
        try:
            return read() or before is not None
        except (UserError, OSError) as error:
            if what == "run":
                self.status = None
            self.troubles[what] = str(error)
            return self.troubles[what] != before


def trailing_means(steps: np.ndarray, values: np.ndarray, over: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the last ``over`` finite values at each step that has one; of fewer at the begin."""
    import numpy as np

    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - over, 0)
    return steps, (sums[ends] - sums[starts]) / (ends - starts)


def seconds_left(columns: Columns) -> float | None:
    """How long the rest of a stage will take at the rate of its recent steps; None while that cannot be told."""
    (steps, shares), (timed, seconds) = columns.column("progress"), columns.column("seconds")
    if len(steps) < 2 or not len(timed):
        return None
    first = max(len(steps) - 64, 0)
    spent = float(seconds[timed > steps[first]].sum())
    done = float(shares[-1] - shares[first])
    return (1.0 - float(shares[-1])) * spent / done if done > 0 and spent > 0 else None


class Following:
    """The runs of a folder, those that somebody looks at followed."""

    def __init__(self, folder: str) -> None:
        self.overview = Overview(folder)
        self._followed: dict[str, Followed] = {}

    def find(self, name: str) -> Followed | None:
        """The run of that name in the folder, of which nothing is read yet; None if there is none."""
        run = self.overview.find(name)
        if run is None:
            return self._followed.get(name)  # removed while somebody looks: it says so
        followed = self._followed.setdefault(name, Followed(run))
        followed.touch()
        return followed

    def update(self) -> None:
        """Read what came of all runs that are looked at, and let go of the others."""
        now = time.monotonic()
        for name, followed in list(self._followed.items()):
            if now - followed.looked_at > KEPT_SECONDS:
                del self._followed[name]
            else:
                followed.update()
