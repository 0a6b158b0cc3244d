"""What people ask of a running stage, as its journal ``amendments.jsonl`` holds it.

A request has a number: how many there were when it was made. Of two with one number the first holds; whoever wrote the
other one sees that when it reads the journal again. A reader takes the lines in any order: on an object store the
writers of requests and of answers have segments of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Request:
    """A change that was asked for."""

    number: int
    assignment: str
    """``KEY=VALUE``."""
    time: str | None = None
    """When, ISO 8601, UTC."""
    by: str | None = None
    """Who."""
    undoes: int | None = None
    """The number of the request that it takes back."""
    from_step: int | None = None
    """The first step with it; None as long as it waits."""


@dataclass(frozen=True)
class Requests:
    """All that was asked of a stage."""

    amendments: Mapping[int, Request] = field(default_factory=dict)
    """By number, in order."""
    checkpoints: Mapping[int, int | None] = field(default_factory=dict)
    """The checkpoints that were asked for, with the step of the one that answered."""

    @property
    def assignments(self) -> list[str]:
        """What was asked for, in order."""
        return [request.assignment for request in self.amendments.values()]


def read_requests(lines: Iterable[Mapping[str, Any]]) -> Requests:
    """What the lines of the journal come to. ValueError for one that is not known, or answers what is not there."""
    amendments: dict[int, Request] = {}
    from_step: dict[int, int] = {}
    checkpoints: dict[int, int | None] = {}
    saved: dict[int, int] = {}
    for line in lines:
        match line:
            case {"id": int(number), "assignment": str(assignment)}:
                said = {key: line.get(key) for key in ("time", "by", "undoes")}
                amendments.setdefault(number, Request(number, assignment, **said))
            case {"applied": int(number), "from_step": int(step)}:
                from_step[number] = step
            case {"checkpoint": int(number)}:
                checkpoints[number] = None
            case {"checkpointed": int(number), "step": int(step)}:
                saved[number] = step
            case _:
                raise ValueError(f"it says {dict(line)}")
    if lost := [*(from_step.keys() - amendments.keys()), *(saved.keys() - checkpoints.keys())]:
        raise ValueError(f"it answers the request {lost[0]}, which is not there")
    held = {n: replace(request, from_step=from_step.get(n)) for n, request in sorted(amendments.items())}
    return Requests(held, {**checkpoints, **saved})
