"""What can go wrong with a group of workers, and what is done about each.

A rank tells how it ended in an :class:`Outcome`, made where the exception still stands: what crosses a process border
is what was found out about it. From the outcomes of all ranks follows one :class:`Failure`, the first cause: when a
process dies, the others fail too, in the collective that they shared with it.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from postlude import storage
from postlude.errors import UserError
from postlude.secrecy import without_secrets


class Kind(Enum):
    """Of a failure; the value is the word that events and messages use. In the order in which they explain others."""

    USER = "user"
    """Data, manifest or machines are wrong, and the error says how to mend them."""
    PROGRAM = "program"
    """Code raised: the project's, or a user's."""
    PREEMPTION = "preemption"
    """The machine will be taken away, and said so; the ranks have left, with a checkpoint."""
    STANDSTILL = "standstill"
    """The controlling process stood still itself, and the ranks, at which nobody looked, have ended."""
    CLUSTER = "cluster"
    """A process of Ray's own on this machine is gone, or the one that controls the workers."""
    NODE = "node"
    """A machine is gone, or cut off."""
    PROCESS = "process"
    """A process died."""
    HANG = "hang"
    """A rank does not answer, or makes no progress."""
    COLLECTIVE = "collective"
    """Ranks lost each other, though none is known to have died."""

    @property
    def recovers(self) -> bool:
        """Whether the group is formed anew."""
        return self not in (Kind.USER, Kind.PROGRAM)

    @property
    def budget(self) -> str | None:
        """Out of which key of ``compute.supervision`` that is paid, if it is."""
        if self is Kind.STANDSTILL:
            return None
        return "preemptions" if self is Kind.PREEMPTION else "failures"


@dataclass(frozen=True)
class Outcome:
    """How the work of one rank ended."""

    rank: int
    value: Any = None
    error: UserError | None = None
    """A user's mistake, as it was raised."""
    kind: Kind | None = None
    """None for a rank that came to its end."""
    reason: str = ""
    """One line."""
    trace: str = ""
    """The traceback, where there was an exception."""
    host: str = ""


@dataclass(eq=False)
class Failure(Exception):
    """A group did not come to its end."""

    kind: Kind
    reason: str
    rank: int | None = None
    host: str = ""
    trace: str = ""
    error: UserError | None = None

    def __str__(self) -> str:
        who = "" if self.rank is None else f"rank {self.rank}" + (f" on {self.host}" if self.host else "") + ": "
        return f"{who}{self.reason}"


class ProgramError(UserError):
    """Code raised on a rank, or a failure came too often. The message has the rank's own traceback, if there is one."""


def outcome_of(rank: int, host: str, error: BaseException) -> Outcome:
    """What an exception says of the work of a rank. For the process in which it was raised."""
    trace = without_secrets("".join(traceback.format_exception(error)))
    error = storage.explain(error) or error
    if isinstance(error, UserError):
        return Outcome(rank, error=error, kind=Kind.USER, reason=str(error), trace=trace, host=host)
    reason = without_secrets(f"{type(error).__name__}: {str(error) or 'without a message'}".splitlines()[0])
    kind = Kind.COLLECTIVE if _is_of_a_collective(error) else Kind.PROGRAM
    return Outcome(rank, kind=kind, reason=reason, trace=trace, host=host)


def first_cause(outcomes: Sequence[Outcome]) -> Failure:
    """The failure that explains the others, of ranks at least one of which did not come to its end."""
    order = list(Kind)
    failed = [(order.index(outcome.kind), outcome.rank, outcome) for outcome in outcomes if outcome.kind is not None]
    _, _, first = min(failed, key=lambda each: each[:2])
    assert first.kind is not None
    return Failure(first.kind, first.reason, first.rank, first.host, first.trace, first.error)


def _is_of_a_collective(error: BaseException | None) -> bool:
    """Whether an exception, or what led to it, is that a collective of torch lost its peers or its patience."""
    import torch.distributed as dist

    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "TCPStore")):
            return True
        error = error.__cause__ or error.__context__
    return False
