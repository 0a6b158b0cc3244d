"""``postlude status`` and ``postlude runs``: what run directories say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Group, RenderableType
from rich.text import Text

from postlude.manifest.lock import read_lock
from postlude.manifest.problem import ManifestError
from postlude.runs import Ancestor, Run, Stage, list_runs, open_run, revision_of, walk
from postlude.storage import CorruptError, NewerSchema, StorageError
from postlude.telemetry import events
from postlude.telemetry.alarms import Standing, standing
from postlude.telemetry.screen import Kind, Listing
from postlude.telemetry.summary import StageSummary, summarize
from postlude.workflow.drawing import draw

if TYPE_CHECKING:
    from postlude.telemetry.summary import ColumnsOf

ALARMS_SHOWN = 5

T = TypeVar("T")


@dataclass(frozen=True)
class StageStatus:
    """One stage: its numbers, and the newest checkpoint."""

    summary: StageSummary
    checkpoint: int | None
    error: str | None
    needs: list[str] = field(default_factory=list)
    """The stages that it hangs on."""
    revision: int = 1
    fingerprint: str | None = None
    taken_over_from: str | None = None
    """The run that made what stands here, where it was not this one."""
    lineage: Ancestor | None = None
    """Its artifact, with all that it comes from."""
    readings: list[dict[str, Any]] = field(default_factory=list)
    """The newest of each worker, while it is running."""
    damages: tuple[str, ...] = ()
    """What of its files is not what was written."""

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.summary.stage,
            "state": self.summary.state,
            "step": self.summary.steps,
            "first_loss": self.summary.first_loss,
            "loss": self.summary.last_loss,
            "tokens": self.summary.tokens,
            "seconds": self.summary.seconds,
            "last_checkpoint": self.checkpoint,
            "error": self.error,
            "needs": self.needs,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "taken_over_from": self.taken_over_from,
            "lineage": asdict(self.lineage) if self.lineage else None,
            "readings": self.readings,
            "damages": list(self.damages),
        }


@dataclass(frozen=True)
class RunStatus:
    """A run: every stage of its manifest, who works on it, and what it is alarmed about."""

    run: Run
    stages: list[StageStatus]
    holder: str | None
    alarms: list[events.Event]
    damage: str | None = None
    """What is wrong with a file of the run as a whole."""
    is_newer: bool = False
    """Whether a newer version wrote it, so that this one cannot tell more of it."""
    standing: list[Standing] = field(default_factory=list)
    """The alarms among them that last or that nobody has acknowledged."""

    @property
    def is_damaged(self) -> bool:
        """Whether something of it is not what was written."""
        return bool(self.damage or any(stage.damages for stage in self.stages))

    @property
    def state(self) -> str:
        """The state of the run as a whole: that of the first stage that is not done."""
        if self.damage and not self.stages:
            return "newer" if self.is_newer else "damaged"
        return next((stage.summary.state for stage in self.stages if stage.summary.state != "done"), "done")

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run.uri,
            "state": self.state,
            "held_by": self.holder,
            "stages": [stage.to_json() for stage in self.stages],
            "damage": self.damage,
            "alarms": [alarm.model_dump(mode="json") for alarm in self.alarms],
            "open_alarms": [each.to_json() for each in self.standing],
        }

    def render(self) -> RenderableType:
        heads: dict[str, Kind] = {"stage": "whole", "state": "text", "step": "number"}
        listing = Listing(f"{self.run.name}: {self.state}", heads | {"loss": "number", "checkpoint": "whole"})
        by_name = {stage.summary.stage: stage for stage in self.stages}
        for name, branch, _ in draw({name: stage.needs for name, stage in by_name.items()}):
            stage, summary = by_name[name], by_name[name].summary
            state = [summary.state] + [f"revision {stage.revision}"] * (stage.revision > 1)
            state += [f"from {stage.taken_over_from}"] * (stage.taken_over_from is not None)
            listing.add_row(
                branch,
                ", ".join(state),
                f"{summary.steps:,}" if summary.steps else "",
                "" if summary.last_loss is None else f"{summary.last_loss:z.4f}",
                "" if stage.checkpoint is None else f"step {stage.checkpoint:,}",
            )
        notes = [f"held by {self.holder}"] if self.holder else []
        notes += [self.damage] if self.damage else []
        notes += [f"{stage.summary.stage}: {damage}" for stage in self.stages for damage in stage.damages]
        notes += [f"{stage.summary.stage}: {stage.error}" for stage in self.stages if stage.error]
        notes += [_worker(reading) for stage in self.stages for reading in stage.readings]
        others = [event for event in self.alarms if event.kind != "alarm"]
        notes += [f"{event.time} {event.kind}: {_describe(event)}" for event in others[-ALARMS_SHOWN:]]
        notes += [_stands(each) for each in self.standing[-ALARMS_SHOWN:]]
        if (hidden := len(self.standing) - ALARMS_SHOWN) > 0:
            notes.append(f"and {hidden} more alarms: `postlude acknowledge` takes away those that are known")
        return Group(listing, *map(Text, notes))


@dataclass(frozen=True)
class Runs:
    """The runs in a folder."""

    runs: list[RunStatus]

    def to_json(self) -> dict[str, Any]:
        return {"runs": [run.to_json() for run in self.runs]}

    def render(self) -> Listing:
        listing = Listing("", {"run": "text", "state": "whole", "stages done": "whole", "last loss": "number"})
        for run in self.runs:
            done = sum(stage.summary.state == "done" for stage in run.stages)
            losses = [stage.summary.last_loss for stage in run.stages if stage.summary.last_loss is not None]
            shown = f"{losses[-1]:z.4f}" if losses else ""
            state = run.state + (", damaged" if run.is_damaged and run.stages else "")
            listing.add_row(run.run.name, state, f"{done} of {len(run.stages)}", shown)
        return listing


def status(place: str) -> RunStatus:
    """The state of a run. UserError if there is none at ``place``, CorruptError if its manifest lock is damaged,
    NewerSchema if a newer version wrote what it tells."""
    return status_of(open_run(place))


def runs(folder: str) -> Runs:
    """The state of every run directly in a folder."""
    states = []
    for run in list_runs(folder):
        try:
            states.append(status_of(run))
        except (StorageError, ManifestError) as error:
            states.append(RunStatus(run, [], None, [], str(error), isinstance(error, NewerSchema)))
    return Runs(states)


def status_of(run: Run, columns_of: ColumnsOf | None = None) -> RunStatus:
    """The state of a run that there is; errors as of :func:`status`. Who follows it gives the columns that it keeps."""
    locked = read_lock(run.read_manifest_lock() or "", run.manifest_lock).stages
    holder, damage, happened = run.holder(), None, []
    try:
        happened = events.read(run.events)
    except CorruptError as error:
        damage = str(error)
    return RunStatus(
        run,
        [_stage(run, summary, locked[summary.stage].needs) for summary in summarize(run, list(locked), columns_of)],
        str(holder) if holder else None,
        [event for event in happened if event.kind in ("alarm", "failure", "checkpoint_skipped")],
        damage,
        standing=standing(happened),
    )


def _stage(run: Run, summary: StageSummary, needs: list[str]) -> StageStatus:
    stage, damages = run.stage(summary.stage), list(summary.damages)
    checkpoints, details = stage.checkpoints(), stage.status().details
    identity = _read(stage.identity, damages)
    return StageStatus(
        summary,
        checkpoints[0].step if checkpoints else None,
        details.get("error"),
        needs,
        revision_of(run, summary.stage),
        identity.fingerprint if identity else None,
        identity.taken_over_from if identity else None,
        _read(lambda: walk(run, summary.stage), damages),
        (_read(lambda: _newest_readings(stage), damages) or []) if summary.state == "running" else [],
        tuple(damages),
    )


def _read(read: Callable[[], T], damages: list[str]) -> T | None:
    """What can be read; None, and noted, if it is damaged."""
    try:
        return read()
    except CorruptError as error:
        damages.append(str(error))
        return None


def _newest_readings(stage: Stage) -> list[dict[str, Any]]:
    """The newest reading of each worker that was there at the last one."""
    newest = {reading["rank"]: reading for reading in stage.readings.read()}
    last = max((reading["time"] for reading in newest.values()), default="")
    return [newest[rank] for rank in sorted(newest) if newest[rank]["step"] or newest[rank]["time"] == last]


def _worker(reading: Mapping[str, Any]) -> str:
    """A reading in a line."""
    seconds = reading.get("seconds", {})
    parts = [f"worker {reading['rank']} on {reading['host']}, step {reading['step']}"]
    parts.append(f"{reading['resident_bytes'] / 2**20:,.0f} MiB")
    if "device_bytes" in reading:
        parts.append(f"{reading['device_bytes'] / 2**20:,.0f} MiB of its GPU")
    if "seconds" in seconds:
        parts.append(f"{seconds['seconds']:.2f} s a step, {seconds.get('seconds_data_wait', 0.0):.2f} of them for data")
    parts.append(f"answers in {1000 * reading['round_trip_seconds']:.1f} ms")
    return ", ".join(parts)


def _stands(each: Standing) -> str:
    """An alarm in a line."""
    alarm, over = each.alarm, each.over
    where = [alarm.stage] if alarm.stage else []
    where += [f"step {alarm.step:,}"] if alarm.step is not None else []
    state = "acknowledged " if each.acknowledged else ""
    end = "" if over is None else ", over" + (f" since step {over.step:,}" if over.step is not None else "")
    return f"{alarm.time} {state}alarm, {', '.join([*where, alarm.what])}: {alarm.reason}{end}"


def _describe(event: events.Event) -> str:
    fields = event.model_dump(exclude={"time", "kind", "stage"}, exclude_none=True)
    return ", ".join(f"{key} {value}" for key, value in fields.items())
