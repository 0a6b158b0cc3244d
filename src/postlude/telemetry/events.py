"""What can happen in a run, typed: one class for each kind, one line in ``events.jsonl`` for each event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from postlude.storage import Journal


class BaseEvent(BaseModel):
    """What every event tells."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    time: str
    """ISO 8601, UTC."""
    kind: str
    stage: str | None = None
    """The stage it belongs to; None for the run as a whole."""


class RunStarted(BaseEvent):
    """A process took the run up, for the first time or again."""

    kind: Literal["run_started"] = "run_started"
    host: str
    pid: int


class RunFinished(BaseEvent):
    """All stages are done."""

    kind: Literal["run_finished"] = "run_finished"


class RunInterrupted(BaseEvent):
    """The process was asked to stop and left; the run can be continued."""

    kind: Literal["run_interrupted"] = "run_interrupted"
    reason: str | None = None


class StageStarted(BaseEvent):
    """A stage was taken up."""

    kind: Literal["stage_started"] = "stage_started"
    from_step: int = 0
    """How many steps it had behind it: above zero for a resume."""


class StageFinished(BaseEvent):
    """A stage is done and its artifact committed."""

    kind: Literal["stage_finished"] = "stage_finished"
    steps: int


class StageTakenOver(BaseEvent):
    """What another run finished with the same fingerprint stands in the stage now."""

    kind: Literal["stage_taken_over"] = "stage_taken_over"
    run: str
    """The run that made it."""
    revision: int = 1


class StageSetAside(BaseEvent):
    """What stood in a stage was moved to its revisions, because something that it follows from has changed."""

    kind: Literal["stage_set_aside"] = "stage_set_aside"
    revision: int
    """Of what was moved."""
    reasons: Sequence[str] = ()


class StreamsStored(BaseEvent):
    """A frozen model was run over the data of the stage, and what it said is stored."""

    kind: Literal["streams_stored"] = "streams_stored"
    name: str
    """What the model is to the stage."""
    parts: int
    """How many the data make."""
    computed: int
    """How many of them were missing."""


class CheckpointSaved(BaseEvent):
    """A checkpoint was committed."""

    kind: Literal["checkpoint_saved"] = "checkpoint_saved"
    step: int
    uri: str


class CheckpointSkipped(BaseEvent):
    """A checkpoint could not be used for a resume; the one before it is tried."""

    kind: Literal["checkpoint_skipped"] = "checkpoint_skipped"
    step: int
    reason: str


class StepSkipped(BaseEvent):
    """A step's loss or gradient was not finite, and the weights were left as they are."""

    kind: Literal["step_skipped"] = "step_skipped"
    step: int
    loss: float | None = None
    grad_norm: Mapping[str, float] = {}
    """By model."""


class Evaluation(BaseEvent):
    """The loss on one held-out data set, and what else is measured there."""

    kind: Literal["evaluation"] = "evaluation"
    step: int
    name: str
    loss: float | None = None
    """None where answers are measured."""
    metrics: Mapping[str, float] = {}


class Measured(BaseEvent):
    """What an evaluation found, of one model on one data set."""

    kind: Literal["measured"] = "measured"
    name: str
    """What was measured on what."""
    values: Mapping[str, float | int]


class AmendmentApplied(BaseEvent):
    """A recorded change to the running stage took effect."""

    kind: Literal["amendment_applied"] = "amendment_applied"
    step: int
    """The first step with it."""
    assignment: str
    """``KEY=VALUE``."""


class GroupFormed(BaseEvent):
    """The workers of a stage are there, for the first time or again."""

    kind: Literal["group_formed"] = "group_formed"
    workers: int
    hosts: Sequence[str]


class GroupGrows(BaseEvent):
    """An elastic group left at a checkpoint, to be formed again with more workers."""

    kind: Literal["group_grows"] = "group_grows"
    workers: int
    """How many it had."""


class WorkerFailure(BaseEvent):
    """A group of workers came to an early end, from which the stage recovers if it may."""

    kind: Literal["worker_failure"] = "worker_failure"
    what: str
    """One of the kinds of :mod:`postlude.cluster.failure`."""
    reason: str
    rank: int | None = None
    host: str | None = None
    trace: str | None = None


class Recovery(BaseEvent):
    """The workers are started again, and go on from the last committed checkpoint."""

    kind: Literal["recovery"] = "recovery"
    attempt: int
    """Since the last checkpoint."""
    pause_seconds: float


class EngineDied(BaseEvent):
    """An engine that answers prompts died or hung; another takes its place, and is asked again what it was asked."""

    kind: Literal["engine_died"] = "engine_died"
    engine: str
    reason: str


class Alarm(BaseEvent):
    """Something a person should look at, though the run goes on."""

    kind: Literal["alarm"] = "alarm"
    what: str
    reason: str
    step: int | None = None


class Failure(BaseEvent):
    """What stopped the stage or the run."""

    kind: Literal["failure"] = "failure"
    error: str
    step: int | None = None


Event = (
    RunStarted
    | RunFinished
    | RunInterrupted
    | StageStarted
    | StageFinished
    | StageTakenOver
    | StageSetAside
    | StreamsStored
    | CheckpointSaved
    | CheckpointSkipped
    | StepSkipped
    | Evaluation
    | Measured
    | AmendmentApplied
    | GroupFormed
    | GroupGrows
    | WorkerFailure
    | Recovery
    | EngineDied
    | Alarm
    | Failure
)

_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def make(kind: str, stage: str | None = None, **fields: Any) -> Event:
    """An event of this moment. pydantic's ValidationError if ``fields`` are not those of the kind."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return _EVENT.validate_python({"time": now, "kind": kind, "stage": stage, **fields})


def record(journal: Journal, event: Event) -> None:
    """Add an event to a run's journal; it is durable when the call returns."""
    journal.append(event.model_dump(exclude_none=True), sync=True)


def read(journal: Journal) -> list[Event]:
    """All events of a run, in order."""
    return [_EVENT.validate_python(line) for line in journal.read()]
