"""Changes to a running stage: what may be amended, what that would mean, and the recorded request. ``postlude amend``
and the page go through here.

Who asks says how many amendments there were when they looked: if another was quicker, they are told of it and nothing
is asked for.
"""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from postlude.manifest.amend import Amendment, Key, amended, check_amendment, keys_with_changes, undoing
from postlude.manifest.load import restore
from postlude.manifest.lock import read_lock
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import StageConfig, TrainingStage
from postlude.runs import Request, Run, Stage, open_run
from postlude.runs.schemas import AmendmentLine
from postlude.telemetry import events
from postlude.telemetry.screen import Listing


class Overtaken(ManifestError):
    """Somebody else has amended the stage since."""


class NotAmendable(ManifestError):
    """The stage, as it stands, takes no amendments."""


@dataclass(frozen=True)
class Steering:
    """A stage as somebody sees it who may change it."""

    stage: str
    state: str
    step: int
    """Steps made."""
    keys: list[Key]
    """Every key with its value after all amendments, and whether it may change."""
    amendments: list[Request]
    """What was asked for, oldest first."""
    refusal: str | None
    """Why nothing may be amended, as things stand."""

    @property
    def seen(self) -> int:
        """What :func:`amend` takes to know what its caller knew of."""
        return len(self.amendments)

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "state": self.state,
            "step": self.step,
            "refusal": self.refusal,
            "keys": [{"key": each.key, "value": each.value, **asdict(each.change)} for each in self.keys],
            "amendments": [asdict(each) for each in self.amendments],
        }

    def render(self) -> RenderableType:
        parts: list[RenderableType] = [Text(self.refusal)] if self.refusal else []
        keys = Listing(
            "What may be amended", {"key": "whole", "value": "text", "from the next": "whole", "then": "text"}
        )
        for each in self.keys:
            if each.change.allowed:
                keys.add_row(each.key, json.dumps(each.value), each.change.holds, each.change.text)
        made = Listing("Amendments", {"number": "number", "KEY=VALUE": "text", "from step": "number", "by": "text"})
        for request in self.amendments:
            undoes = "" if request.undoes is None else f" (undoes {request.undoes})"
            step = "" if request.from_step is None else f"{request.from_step:,}"
            asked = f"{request.by or ''} {request.time or ''}".strip()
            made.add_row(str(request.number), f"{request.assignment}{undoes}", step, asked)
        return Group(*parts, keys, *([made] if self.amendments else []))


@dataclass(frozen=True)
class Preview:
    """What an amendment means, before or after it is asked for."""

    stage: str
    assignment: str
    """``KEY=VALUE``."""
    key: str
    before: Any
    after: Any
    holds: str
    """From the next ``step`` on or from the next ``round``."""
    effect: str
    """What it changes, in words."""
    earliest_step: int
    """The first step that it can hold from."""
    seen: int
    """How many amendments there are."""
    undoes: int | None = None

    def __str__(self) -> str:
        on = f"from the next {self.holds} on, step {self.earliest_step:,} at the earliest"
        return f"{self.stage}: {self.key} {self.before} -> {self.after}, {on}: {self.effect}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> RenderableType:
        return Text(str(self))


def look(place: str, stage_name: str) -> Steering:
    """What may be amended of a stage, with present values and reasons, and what was. UserError if it is not there."""
    run, stage, begun = _find(place, stage_name)
    requests = stage.requests()
    keys = keys_with_changes(amended(begun, requests.assignments))
    made = list(requests.amendments.values())
    return Steering(stage_name, stage.status().state, _steps(stage), keys, made, _refusal(run, stage, begun))


def preview(place: str, stage_name: str, assignment: str) -> Preview:
    """What KEY=VALUE would change. UserError if the stage takes no amendments, ManifestError if not this one."""
    return _prepare(place, stage_name, assignment)[1]


def preview_undo(place: str, stage_name: str, number: int | None = None) -> Preview:
    """What it would change to undo an amendment, by its number; the newest that stands where there is none. UserError
    as for :func:`preview`."""
    assignment, number = _undoing(place, stage_name, number)
    return _prepare(place, stage_name, assignment, number)[1]


def amend(place: str, stage_name: str, assignment: str, *, seen: int | None = None, by: str | None = None) -> Preview:
    """Record KEY=VALUE for a stage. It holds from the next step on, or from the first step after a resume.

    ``seen`` is how many amendments the caller knew of, where they have looked before; ``by`` is who asks, by default
    the user of this process. UserError as for :func:`preview`; :class:`Overtaken` if somebody else was quicker.
    """
    return _record(place, stage_name, assignment, seen, by)


def undo(
    place: str, stage_name: str, number: int | None = None, *, seen: int | None = None, by: str | None = None
) -> Preview:
    """Record the amendment that undoes another, as :func:`preview_undo` tells; else as :func:`amend`."""
    assignment, number = _undoing(place, stage_name, number)
    return _record(place, stage_name, assignment, seen, by, number)


def asker() -> str:
    """Who asks: the user of this process and its machine."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user without a name
        user = "somebody"
    return f"{user}@{socket.gethostname()}"


def now() -> str:
    """The present time, as a request says it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def check_held_by_newer(run: Run) -> str | None:
    """Why the process that works on a run cannot be asked for anything, if its version would not know what is asked."""
    if run.holder() is None:
        return None
    started = [event for event in events.read(run.events) if isinstance(event, events.RunStarted)]
    if started and (started[-1].amendments or 1) < AmendmentLine.version:
        return (
            f"{run.holder()} works on '{run.uri}', and is of an earlier version of postlude, which does not know what "
            "would be asked of it. Stop it, and run again with this version: it goes on from its checkpoint."
        )
    return None


def _find(place: str, stage_name: str) -> tuple[Run, Stage, StageConfig]:
    run = open_run(place)
    manifest = restore(read_lock(run.read_manifest_lock() or "", run.manifest_lock).manifest)
    if stage_name not in manifest.stages:
        raise ManifestError(f"The run '{place}' has no stage '{stage_name}', but: {', '.join(manifest.stages)}.")
    return run, run.stage(stage_name), manifest.stages[stage_name]


def _refusal(run: Run, stage: Stage, begun: StageConfig) -> str | None:
    if stage.status().state == "done":
        return f"The stage '{stage.name}' of '{run.uri}' is done: an amendment would change nothing."
    if not isinstance(begun, TrainingStage):
        return (
            f"The stage '{stage.name}' of '{run.uri}' does not train, so nothing of it may change while it runs: all "
            "that it makes is made alike."
        )
    return check_held_by_newer(run)


def _prepare(
    place: str, stage_name: str, assignment: str, undoes: int | None = None
) -> tuple[Stage, Preview, Mapping[int, Request]]:
    run, stage, begun = _find(place, stage_name)
    if (refusal := _refusal(run, stage, begun)) is not None:
        raise NotAmendable(refusal)
    requests = stage.requests()
    change = check_amendment(begun, requests.assignments, assignment)
    return stage, _previewed(stage, change, assignment, len(requests.amendments), undoes), requests.amendments


def _previewed(stage: Stage, change: Amendment, assignment: str, seen: int, undoes: int | None) -> Preview:
    runs = stage.status().state == "running"
    made = _steps(stage) + 1 if runs else next((each.step for each in stage.checkpoints()), 0)
    meaning = change.change
    return Preview(
        stage=stage.name,
        assignment=assignment,
        key=change.key,
        before=change.before,
        after=change.value,
        holds=meaning.holds,
        effect=meaning.text,
        earliest_step=made + 1,
        seen=seen,
        undoes=undoes,
    )


def _record(
    place: str, stage_name: str, assignment: str, seen: int | None, by: str | None, undoes: int | None = None
) -> Preview:
    stage, told, before = _prepare(place, stage_name, assignment, undoes)
    if seen is not None and seen != told.seen:
        raise Overtaken(_overtaken(stage, list(before.values())[seen:]))
    request = {"id": told.seen, "assignment": assignment, "time": now(), "by": by or asker()}
    stage.amendments.append(request if undoes is None else {**request, "undoes": undoes}, sync=True)
    first = stage.requests().amendments[told.seen]
    if (first.assignment, first.time, first.by) != (assignment, request["time"], request["by"]):
        raise Overtaken(_overtaken(stage, [first]))
    return told


def _overtaken(stage: Stage, others: list[Request]) -> str:
    said = "; ".join(f"{each.assignment} ({each.by or 'unknown'}, {each.time or 'unknown'})" for each in others)
    return (
        f"The stage '{stage.name}' was amended by others meanwhile: {said or 'its amendments are others now'}. Nothing "
        "was recorded of this one: look at them, and ask again."
    )


def _undoing(place: str, stage_name: str, number: int | None) -> tuple[str, int]:
    """The KEY=VALUE that undoes an amendment, and which one that is."""
    _, stage, begun = _find(place, stage_name)
    requests = stage.requests()
    undone = {each.undoes for each in requests.amendments.values()}
    stands = [n for n, each in requests.amendments.items() if n not in undone and each.undoes is None]
    if number is None:
        number = stands[-1] if stands else None
    if number is None or number not in requests.amendments:
        which = f"no amendment {number}" if number is not None else "no amendment that stands"
        known = ", ".join(f"{n} ({each.assignment})" for n, each in requests.amendments.items()) or "none"
        raise ManifestError(f"The stage '{stage_name}' of '{place}' has {which}. It has: {known}.")
    if number in undone:
        raise ManifestError(f"Amendment {number}, {requests.amendments[number].assignment}, is undone already.")
    return undoing(begun, requests.assignments, list(requests.amendments).index(number)), number


def _steps(stage: Stage) -> int:
    last = stage.metrics.last()
    return int(last["step"]) if last else 0
