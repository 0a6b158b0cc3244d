"""What happened in a run: what failed, how it was recovered from and what it cost, and every event."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable

from nicegui import ui

from postlude.dashboard import frame
from postlude.dashboard.followed import Followed
from postlude.dashboard.views.tables import Cell, Table
from postlude.errors import UserError
from postlude.telemetry.events import Event
from postlude.telemetry.progress import duration
from postlude.workflow.incidents import Incident, incidents

PAGE_EVENTS = 100
KINDS = {
    "all": ("",),
    "faults": ("failure", "worker_failure", "recovery", "stood_still", "engine_died", "checkpoint_skipped",
               "step_skipped", "run_interrupted"),
    "alarms": ("alarm", "alarm_over", "alarm_acknowledged", "notifications_dropped"),
    "checkpoints": ("checkpoint_saved", "checkpoint_skipped"),
    "amendments": ("amendment_applied",),
}  # fmt: skip


def reached_by(followed: Followed) -> Callable[[str, str], int | None]:
    """The step that the workers of a stage had told by a moment: their readings are never cut, the metrics are."""
    known: dict[str, list[tuple[str, int]]] = {}

    def reached(stage: str, time: str) -> int | None:
        if stage not in known:
            try:
                readings = followed.run.stage(stage).readings.read()
            except UserError:
                readings = []
            known[stage] = sorted((reading["time"], reading["step"]) for reading in readings)
        told = known[stage]
        place = bisect_right(told, time, key=lambda entry: entry[0])
        return told[place - 1][1] if place else None

    return reached


def show(followed: Followed, stage: str | None, view: dict[str, str]) -> None:
    """The run's events."""
    ui.label("What failed").classes("font-bold")
    sound = frame.nothing("Nothing has failed.")
    failed = Table(["when", "into the run", "stage", "what failed", "how it went on", "time", "steps again"])
    ui.label("Everything").classes("font-bold")
    kind = view.get("kind", "all")
    with ui.row().classes("items-center gap-4"):
        for name in KINDS:
            link = ui.link(name, frame.address(view, kind=None if name == "all" else name))
            if name == kind:
                link.classes("font-bold").props("aria-current=true")
    none = frame.nothing("Nothing of this kind has happened.")
    every = Table(["when", "into the run", "stage", "kind", "what"])
    cut = frame.nothing("")
    shown = [-1]

    async def refresh() -> None:
        if followed.version == shown[0]:
            return
        shown[0] = followed.version
        happened = followed.events()
        begin = happened[0].time if happened else ""
        found = await asyncio.to_thread(incidents, happened, reached_by(followed))
        sound.set_visibility(not found)
        rows = {f"{number}": _incident(each, begin) for number, each in enumerate(found)}
        failed.show(dict(list(rows.items())[: -PAGE_EVENTS - 1 : -1]))
        wanted = KINDS.get(kind, ("",))
        told = [(number, event) for number, event in enumerate(happened) if "" in wanted or event.kind in wanted]
        none.set_visibility(not told)
        cut.set_text(f"{len(told) - PAGE_EVENTS:,} earlier ones stand in {followed.run.events.uri}.")
        cut.set_visibility(len(told) > PAGE_EVENTS)
        every.show({f"{number}": _event(event, begin) for number, event in told[: -PAGE_EVENTS - 1 : -1]})

    frame.refreshed(refresh)


def _incident(each: Incident, begin: str) -> list[Cell]:
    time = "not known" if each.seconds is None else duration(each.seconds)
    again = "not known" if each.steps_again is None else f"{each.steps_again:,}"
    how = each.recovered or "not yet"
    return [frame.clock(each.time), frame.since(begin, each.time), each.stage or "", each.what, how, time, again]


def _event(event: Event, begin: str) -> list[Cell]:
    fields = event.model_dump(exclude={"time", "kind", "stage"}, exclude_none=True)
    what = ", ".join(f"{key} {value}" for key, value in fields.items())
    return [frame.clock(event.time), frame.since(begin, event.time), event.stage or "", event.kind, what]
