"""Watching over a group at work: it ends with what every rank returned, or with the failure that explains the rest.

Found out are: a process that died, a node that is gone, a rank that does not answer, one that makes no progress, and
whatever the ranks say themselves. Once one has failed, the others get a moment to say how they fared, because the one
that is heard first is seldom the first cause. What is seen of the ranks at work is written down at intervals, with the
alarms that follow from it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import ray

from postlude.cluster import placement
from postlude.cluster.failure import Kind, Outcome, first_cause
from postlude.cluster.group import WorkerGroup
from postlude.cluster.standstill import Standstill
from postlude.cluster.worker import Address, Look
from postlude.manifest.alarms import AlarmRule
from postlude.manifest.compute import Supervision
from postlude.storage import Journal
from postlude.telemetry import alarms
from postlude.telemetry.readings import Reading, measures

TICK_SECONDS = 0.5
LOOK_SECONDS = 1.0
"""Between two looks at a rank."""
GRACE_SECONDS = 4.0
"""How long the others may take to tell how they ended, once one has failed."""
LEASE_MARGIN_SECONDS = 1.0
LOST_SECONDS = 30.0
"""How long to wait for Ray to tell which process or node is gone, when ranks have lost each other."""


class Observer:
    """Keeps a reading of each rank in a journal, one line a rank, every so many seconds; ``tell`` records an alarm that
    one of the rules of the step finds in them (its kind and fields)."""

    def __init__(
        self,
        journal: Journal,
        tell: Callable[..., None],
        seconds: float,
        rules: Callable[[int], Sequence[AlarmRule]] = lambda step: (),
    ) -> None:
        self._journal, self._tell, self._seconds, self._rules = journal, tell, seconds, rules
        self._watch, self._held = alarms.Watch(()), list[AlarmRule]()
        self.begin(0)

    def begin(self, size: int) -> None:
        """A group of this size was formed: what others did before it says nothing of it."""
        for lasting in self._watch.open():
            over = alarms.Change("alarm_over", lasting.what, "its workers are gone", lasting.rule.called, timed=True)
            self._tell(over.kind, **over.fields(None))
        self._watch, self._size = alarms.Watch(self._held), size
        self._newest: dict[int, Reading] = {}
        self._due = time.monotonic() + self._seconds

    def saw(self, rank: int, address: Address, look: Look, round_trip_seconds: float) -> None:
        """Take a look at a rank; ``round_trip_seconds`` is how long it took."""
        if time.monotonic() >= self._due and rank not in self._newest:
            self._newest[rank] = look.reading
            line: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "rank": rank}
            line |= {"host": address.host, "round_trip_seconds": round_trip_seconds, **look.reading.to_json()}
            self._journal.append(line)
        if len(self._newest) == self._size:
            step = max((reading.step for reading in self._newest.values()), default=None)
            held = [rule for rule in self._rules(step or 0) if rule.of_workers]
            amended = self._watch.hold_to(held) if held != self._held else []
            self._held = held
            for change in (*amended, *self._watch.take_all(measures(self._newest))):
                self._tell(change.kind, **change.fields(step))
            self._newest, self._due = {}, time.monotonic() + self._seconds


class Watch:
    """One call of a function on all ranks of a group. ``show`` gets what the leading rank has to show, ``observer``
    every look at any."""

    def __init__(
        self,
        group: WorkerGroup,
        limits: Supervision,
        show: Callable[[Look], None],
        observer: Observer,
        standstill: Standstill,
    ) -> None:
        self._group, self._limits, self._show, self._observer = group, limits, show, observer
        self._standstill = standstill
        observer.begin(group.size)
        self._works: dict[Any, int] = {}
        self._looks: dict[Any, int] = {}
        self._outcomes: dict[int, Outcome] = {}
        now = time.monotonic()
        self._answered = dict.fromkeys(range(group.size), now)
        self._due = dict.fromkeys(range(group.size), now)
        self._asked: dict[int, float] = {}
        self._pulses: dict[int, tuple[int, str, float]] = {}
        """Of each rank: beats, what it does, and when they were first seen."""
        self._failed_at: float | None = None
        self.noticed: set[int] = set()
        """Ranks whose machine was said to go away."""

    def until_over(self, function: str, task: Any, attend: Callable[[], None]) -> list[Any]:
        """What every rank returns, in order. ``attend`` is called several times a second. :class:`Failure`."""
        works = self._group.work(function, task, lease_seconds=self._limits.silence_seconds)
        self._works = {work: rank for rank, work in enumerate(works)}
        while len(self._outcomes) < self._group.size and not self._grace_is_over():
            self._ask()
            ready, _ = ray.wait([*self._works, *self._looks], num_returns=1, timeout=TICK_SECONDS, fetch_local=False)
            for reference in ready:
                self._hear(reference)
            self._hold_to_deadlines()
            attend()
        if any(outcome.kind is not None for outcome in self._outcomes.values()):
            raise first_cause(list(self._outcomes.values()))
        return [self._outcomes[rank].value for rank in range(self._group.size)]

    def leases_end(self, lost: int | None) -> float:
        """When, at the latest, the worker ``lost`` and those on nodes that are gone have ended, though not killed."""
        addresses = enumerate(self._group.addresses)
        ranks = {rank for rank, address in addresses if not placement.is_alive(address.node)} | {lost}
        answered = [self._answered[rank] for rank in ranks if rank is not None]
        return max(answered, default=0.0) + self._limits.silence_seconds + LEASE_MARGIN_SECONDS

    # --- what is heard --------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Look at every rank that is due, if the last look at it has come back."""
        now = time.monotonic()
        looked_at = set(self._looks.values())
        for rank, worker in enumerate(self._group.workers):
            if rank not in looked_at and rank not in self._outcomes and now >= self._due[rank]:
                self._looks[worker.look.remote()] = rank
                self._asked[rank] = now

    def _hear(self, reference: Any) -> None:
        if reference in self._works:
            rank = self._works.pop(reference)
            self._looks_once_more(rank)
            self._end(rank, self._outcome(rank, reference))
            return
        rank = self._looks.pop(reference)
        self._due[rank] = time.monotonic() + LOOK_SECONDS
        try:
            look: Look = ray.get(reference)
        except ray.exceptions.RayError:
            return  # the work itself tells, or the silence
        self._seen(rank, look)
        self._observer.saw(rank, self._group.addresses[rank], look, time.monotonic() - self._asked[rank])

    def _seen(self, rank: int, look: Look) -> None:
        now = time.monotonic()
        self._answered[rank] = now
        if look.noticed:
            self.noticed.add(rank)
        if rank not in self._pulses or self._pulses[rank][0] != look.pulse.beats:
            self._pulses[rank] = look.pulse.beats, look.pulse.doing, now
        if rank == 0 or look.relayed.text:
            self._show(look)

    def _looks_once_more(self, rank: int) -> None:
        """What a rank showed just before its end."""
        looks = [look for look, of in self._looks.items() if of == rank]
        for look in [*looks, self._group.workers[rank].look.remote()]:
            self._looks.pop(look, None)
            with contextlib.suppress(ray.exceptions.RayError):
                self._seen(rank, ray.get(look, timeout=GRACE_SECONDS))

    def _outcome(self, rank: int, reference: Any) -> Outcome:
        host = self._group.addresses[rank].host
        try:
            return ray.get(reference)
        except ray.exceptions.RayActorError as error:
            gone = not placement.is_alive(self._group.addresses[rank].node)
            kind = Kind.NODE if gone else Kind.PROCESS
            return Outcome(rank, kind=kind, reason=_why_died(error, gone), host=host)
        except ray.exceptions.RayError as error:  # such as a result that cannot be sent
            return Outcome(rank, kind=Kind.PROGRAM, reason=f"{type(error).__name__}: {error}", host=host)

    def _end(self, rank: int, outcome: Outcome) -> None:
        self._outcomes[rank] = outcome
        if outcome.kind is not None and self._failed_at is None:
            self._failed_at = time.monotonic()

    # --- deadlines ------------------------------------------------------------------------------------------

    def _grace_is_over(self) -> bool:
        """Whether a rank has failed and the others have had time to explain it."""
        if self._failed_at is None:
            return False
        kinds = {outcome.kind for outcome in self._outcomes.values()} - {None}
        if Kind.NODE in kinds:  # nothing that the others may say explains that
            return True
        seconds = LOST_SECONDS if kinds == {Kind.COLLECTIVE} else GRACE_SECONDS
        return time.monotonic() - self._failed_at > seconds

    def _hold_to_deadlines(self) -> None:
        """Give up a rank that has been silent, or at the same thing, for too long."""
        if self._failed_at is not None:
            return
        now, limits = time.monotonic(), self._limits
        if self._standstill.ended_within(limits.silence_seconds):  # it is this process that was silent
            self._pulses = {rank: (beats, doing, now) for rank, (beats, doing, _) in self._pulses.items()}
            return
        for rank in set(self._works.values()):
            silent = now - self._answered[rank]
            if silent > limits.silence_seconds:
                self._end(rank, self._hung(rank, f"does not answer for {silent:.0f} seconds"))
                return
        behind = [
            (beats, rank, doing, now - since)
            for rank, (beats, doing, since) in self._pulses.items()
            if rank in self._works.values()
        ]
        if behind and all(seconds > limits.stall_seconds for *_, seconds in behind):
            _, rank, doing, seconds = min(behind)  # the others wait for the one that has come least far
            stacks = self._group.stacks()
            shown = "\n\n".join(f"rank {number} is here:\n{text}" for number, text in sorted(stacks.items()))
            self._end(rank, self._hung(rank, f"makes no progress for {seconds:.0f} seconds, in '{doing}'", shown))

    def _hung(self, rank: int, reason: str, trace: str = "") -> Outcome:
        address = self._group.addresses[rank]
        kind = Kind.HANG if placement.is_alive(address.node) else Kind.NODE
        return Outcome(rank, kind=kind, reason=reason, trace=trace, host=address.host)


def _why_died(error: ray.exceptions.RayActorError, node_is_gone: bool) -> str:
    """One line out of what Ray has to say."""
    if node_is_gone:
        return "its node is gone"
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "memory monitor" in str(error):
        return "its node ran out of memory, and the process was killed"
    return "the process died"
