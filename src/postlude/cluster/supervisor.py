"""The one path of recovery: tear the group down, form it anew, go on from the committed state.

Whatever goes wrong with a group at work comes here as a :class:`postlude.cluster.failure.Failure`. What the ranks call
must take its work up where the last committed state ends; then there is nothing else to recover.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from postlude.cluster import placement
from postlude.cluster.budget import Budget
from postlude.cluster.failure import Failure, Kind, ProgramError
from postlude.cluster.group import WorkerGroup
from postlude.cluster.placement import Demand
from postlude.cluster.standstill import LIMIT_SECONDS, Standstill
from postlude.cluster.watch import Observer, Watch
from postlude.cluster.worker import Look, WorkerSetup
from postlude.errors import ComputeError
from postlude.manifest.compute import Supervision
from postlude.telemetry.progress import waiting

LOOK_AROUND_SECONDS = 1.0
"""Between two looks for nodes that go away, and for room in which an elastic group could grow."""
PLACE_SECONDS = 3.0
CONTENT_SECONDS = 60.0
"""How long a group that found no more room than before does not ask again."""
EXCUSED_SECONDS = 60.0
"""How long after this process stood still a loss of ranks is laid to that."""


@dataclass(frozen=True)
class Job:
    """What a group is to do."""

    name: str
    """Unique among all that may be at work at once on the cluster."""
    function: str
    """``module:name``, called on every rank with the task, the request to stop and a display."""
    task: Any
    demand: Demand
    least: int
    """Workers that are enough."""
    most: int
    setup: WorkerSetup
    limits: Supervision
    interface: str | None = None
    """The network interface by which ranks reach each other; by default the one with the node's address."""


class Supervisor:
    """Has a job done, however often its group must be formed.

    ``progress`` tells how far the committed state is: failures count from its last change on. ``tell`` records an event
    (its kind and fields), ``show`` gets what the leading rank has to show, ``observer`` every look at a rank.
    """

    def __init__(
        self,
        job: Job,
        progress: Callable[[], Any],
        tell: Callable[..., None],
        show: Callable[[Look], None],
        observer: Observer,
    ) -> None:
        self._job, self._tell, self._show, self._observer = job, tell, show, observer
        self._budget = Budget(job.limits, progress)
        self._stop, self._abandon = threading.Event(), threading.Event()
        self._standstill = Standstill(min(LIMIT_SECONDS, job.limits.silence_seconds / 2))
        self._group: WorkerGroup | None = None
        self._told_to_stop = self._told_to_yield = self._told_to_leave = False
        self._size_before = 0
        self._safe_at = 0.0
        """From when on no worker of an earlier group can be at work, wherever it is."""
        self._look_around_at = self._grow_at = 0.0

    def stop(self) -> None:
        """Ask the ranks to stop with a checkpoint. From any thread."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop, or to abandon its work."""
        return self._stop.is_set() or self._abandon.is_set()

    def abandon(self) -> None:
        """Kill the ranks at once. From any thread."""
        self._abandon.set()

    def run(self) -> list[Any] | None:
        """What every rank returns in the end; None if asked to stop before a group stood.

        UserError as a rank raised it, :class:`ProgramError` for what is not recovered from, ComputeError if there is
        no room.
        """
        with self._standstill:
            while True:
                try:
                    with self._form() as group:
                        if group is None:
                            return None
                        results = self._watch(group)
                        if results is not None:
                            return results
                except Failure as failure:
                    self._recover(failure)

    # --- one group ------------------------------------------------------------------------------------------

    def _form(self) -> AbstractContextManager[WorkerGroup | None]:
        """A group of as many workers as find room, at least as many as are enough."""
        job = self._job
        with waiting(f"room for {_count(job)} of {job.name}"):
            size, room = self._place()
        if room is None:
            return nullcontext()
        if self._told_to_yield and size <= self._size_before:
            self._grow_at = time.monotonic() + CONTENT_SECONDS
        self._told_to_stop = self._told_to_yield = self._told_to_leave = False
        self._size_before = size
        group = WorkerGroup(job.name, job.demand, room, size, job.setup, job.interface)
        self._tell("group_formed", workers=size, hosts=sorted({address.host for address in group.addresses}))
        return group

    def _place(self) -> tuple[int, Any]:
        job, deadline = self._job, time.monotonic() + self._job.limits.room_seconds
        while not self._stop.is_set():
            # First as many as there would be room for: what the group before has held is given back only by and by.
            for free in (placement.capacity(job.demand), placement.room(job.demand)):
                size = max(job.least, min(job.most, free))
                room = placement.place(job.demand, size, PLACE_SECONDS, self._stop.is_set)
                if room is not None:
                    return size, room
            if time.monotonic() > deadline:
                raise ComputeError(
                    f"There is no room for {_count(job)} of {job.name}: each needs {job.demand}, and there is room for "
                    f"{placement.room(job.demand)} now, on {placement.describe_nodes()}. Free or add nodes "
                    "and run again; what was committed is kept."
                )
        return 0, None

    def _watch(self, group: WorkerGroup) -> list[Any] | None:
        """What the ranks return; None if they left so that the group can grow. :class:`Failure`."""
        watch = Watch(group, self._job.limits, self._show, self._observer, self._standstill)
        try:
            results = watch.until_over(self._job.function, self._job.task, lambda: self._attend(group))
        except Failure as failure:
            if failure.kind in (Kind.NODE, Kind.HANG) and failure.host != group.own_host:
                self._safe_at = watch.leases_end(failure.rank)
            raise
        left_early = any(getattr(result, "interrupted", False) for result in results)
        if left_early and not self._stop.is_set():
            if watch.noticed or self._told_to_leave:
                raise Failure(Kind.PREEMPTION, "a machine was said to go away", min(watch.noticed, default=None))
            self._tell("group_grows", workers=group.size)
            return None
        return results

    def _attend(self, group: WorkerGroup) -> None:
        """What has to be done while the ranks work."""
        if self._abandon.is_set():
            raise KeyboardInterrupt
        if self._stop.is_set() and not self._told_to_stop:
            self._told_to_stop = True
            group.stop()
        for stand in self._standstill.look():
            self._tell("stood_still", seconds=stand.seconds, reason=str(stand))
        now = time.monotonic()
        if now < self._look_around_at:
            return
        self._look_around_at = now + LOOK_AROUND_SECONDS
        if not self._told_to_leave and placement.leaving() & {address.node for address in group.addresses}:
            self._told_to_leave = True
            group.stop()
        may_grow = group.size < self._job.most and not self._told_to_yield and now > self._grow_at
        if may_grow and placement.room(self._job.demand) > 0:
            self._told_to_yield = True
            group.stop(at_checkpoint=True)

    # --- recovery -------------------------------------------------------------------------------------------

    def _recover(self, failure: Failure) -> None:
        """Charge a failure to its budget and wait a little; raise what cannot be recovered from."""
        if not failure.kind.recovers:
            raise failure.error or ProgramError(f"{failure}\n\n{failure.trace}".rstrip())
        if failure.kind is not Kind.PREEMPTION and self._standstill.ended_within(EXCUSED_SECONDS):
            failure = replace(failure, kind=Kind.STANDSTILL, reason=f"{failure.reason}, while nobody looked at it")
        where = {"what": failure.kind.value, "rank": failure.rank, "host": failure.host or None}
        self._tell("worker_failure", reason=failure.reason, trace=failure.trace or None, **where)
        if self._stop.is_set() and failure.kind is not Kind.PREEMPTION:
            return  # the next group is not formed
        attempt, pause = self._budget.charge(failure)
        self._tell("recovery", attempt=attempt, pause_seconds=pause)
        self._stop.wait(max(pause, self._safe_at - time.monotonic()))


def _count(job: Job) -> str:
    workers = str(job.most) if job.least == job.most else f"{job.least} to {job.most}"
    return f"{workers} worker" + ("" if workers == "1" else "s")
