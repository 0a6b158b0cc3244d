"""What failed in a run, how it was recovered from, and what it cost: read out of its events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from postlude.telemetry import events

Reached = Callable[[str, str], int | None]
"""The step that a stage is known to have reached by a moment, ISO 8601; None where nothing tells."""


@dataclass(frozen=True)
class Incident:
    """Something that failed."""

    time: str
    stage: str | None
    what: str
    recovered: str | None = None
    """How it went on; None as long as it has not."""
    seconds: float | None = None
    """From the failure until the work went on."""
    steps_again: int | None = None
    """Steps that were lost and made again, at least; None where nothing tells."""


def incidents(happened: Sequence[events.Event], reached: Reached = lambda stage, time: None) -> list[Incident]:
    """Of a run, in the order in which they began. What is open ends where its stage goes on."""
    found: list[Incident] = []
    open_places: dict[str | None, int] = {}
    ended = True
    """Whether the process that worked on the run has said so."""

    def begin(event: events.Event, what: str, where: str | None) -> None:
        if where not in open_places:
            open_places[where] = len(found)
            found.append(Incident(event.time, event.stage, what))

    for place, event in enumerate(happened):
        match event:
            case events.RunStarted():
                if not ended:  # killed, or its machine went: nobody could say so
                    begin(happened[place - 1], "the process that worked on the run ended without a word", None)
                ended = False
            case events.RunFinished():
                ended = True
            case events.RunInterrupted():
                ended = True
                begin(
                    event, f"interrupted: {event.reason}" if event.reason else "interrupted: it was asked to stop", None
                )
            case events.Failure():
                ended = True
                begin(event, event.error, event.stage)
            case events.WorkerFailure():
                where = f" on {event.host}" if event.host else ""
                who = "" if event.rank is None else f"rank {event.rank}{where}: "
                begin(event, f"{event.what} failure: {who}{event.reason}", event.stage)
            case events.Recovery() if event.stage in open_places:
                at = open_places[event.stage]
                found[at] = replace(found[at], recovered=f"the workers are started again, attempt {event.attempt}")
            case events.StageStarted():
                for place_of in {event.stage, None} & set(open_places):
                    at = open_places.pop(place_of)
                    found[at] = _closed(found[at], event, reached)
            case _ if simple := _at_once(event):
                found.append(simple)
    return found


def _closed(incident: Incident, event: events.StageStarted, reached: Reached) -> Incident:
    stage = event.stage or ""
    before = reached(stage, incident.time)
    how = f"{stage} went on after step {event.from_step:,}" if event.from_step else f"{stage} began anew"
    return replace(
        incident,
        recovered=f"{incident.recovered}; {how}" if incident.recovered else how,
        seconds=_seconds(incident.time, event.time),
        steps_again=None if before is None else max(before - event.from_step, 0),
    )


def _at_once(event: events.Event) -> Incident | None:
    """What is over with the event that tells of it."""
    match event:
        case events.StoodStill():
            return Incident(event.time, event.stage, event.reason, "the workers went on", event.seconds)
        case events.EngineDied():
            text = f"the engine '{event.engine}' ended: {event.reason}"
            return Incident(event.time, event.stage, text, "another took its place, and was asked again")
        case events.CheckpointSkipped():
            text = f"the checkpoint of step {event.step:,} could not be used: {event.reason}"
            return Incident(event.time, event.stage, text, "the one before it was tried")
        case events.StepSkipped():
            text = f"the loss or a gradient of step {event.step:,} was not finite"
            return Incident(event.time, event.stage, text, "the weights were left as they were")
        case events.NotificationsDropped():
            text = f"{event.receiver} was not told of {event.count} alarms: {event.reason}"
            return Incident(event.time, event.stage, text, "they stand here all the same")
    return None


def _seconds(begin: str, end: str) -> float | None:
    try:
        return max((datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None
