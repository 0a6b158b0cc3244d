"""What can happen in a run, typed: one class for each kind, one line in ``events.jsonl`` for each event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import ConfigDict, ValidationError

from postlude.runs.schemas import EventLine
from postlude.secrecy import told
from postlude.storage import Journal, damaged

_KINDS: dict[str, type[Event]] = {}


class Event(EventLine):
    """What every event tells. A class of its own for each kind says what that tells besides."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=False)

    @property
    def moment(self) -> float:
        """When it happened, in seconds since 1970."""
        return datetime.fromisoformat(self.time).timestamp()

    def __init_subclass__(cls, kind: str, **keys: Any) -> None:
        super().__init_subclass__(**keys)
        _KINDS[kind] = cls


class RunStarted(Event, kind="run_started"):
    """A process took the run up, for the first time or again."""

    host: str
    pid: int
    amendments: int | None = None
    """The version of requests to running stages that it knows; None for the first."""


class RunFinished(Event, kind="run_finished"):
    """All stages are done."""


class RunInterrupted(Event, kind="run_interrupted"):
    """The process was asked to stop and left; the run can be continued."""

    reason: str | None = None


class StageStarted(Event, kind="stage_started"):
    """A stage was taken up."""

    from_step: int = 0
    """How many steps it had behind it: above zero for a resume."""


class StageFinished(Event, kind="stage_finished"):
    """A stage is done and its artifact committed."""

    steps: int


class StageTakenOver(Event, kind="stage_taken_over"):
    """What another run finished with the same fingerprint stands in the stage now."""

    run: str
    """The run that made it."""
    revision: int = 1


class StageSetAside(Event, kind="stage_set_aside"):
    """What stood in a stage was moved to its revisions, because something that it follows from has changed."""

    revision: int
    """Of what was moved."""
    reasons: Sequence[str] = ()


class StreamsStored(Event, kind="streams_stored"):
    """A frozen model was run over the data of the stage, and what it said is stored."""

    name: str
    """What the model is to the stage."""
    parts: int
    """How many the data make."""
    computed: int
    """How many of them were missing."""


class CheckpointSaved(Event, kind="checkpoint_saved"):
    """A checkpoint was committed."""

    step: int
    uri: str


class CheckpointSkipped(Event, kind="checkpoint_skipped"):
    """A checkpoint could not be used for a resume; the one before it is tried."""

    step: int
    reason: str


class StepSkipped(Event, kind="step_skipped"):
    """A step's loss or gradient was not finite, and the weights were left as they are."""

    step: int
    loss: float | None = None
    grad_norm: Mapping[str, float] = {}
    """By model."""


class Evaluation(Event, kind="evaluation"):
    """The loss on one held-out data set, and what else is measured there."""

    step: int
    name: str
    loss: float | None = None
    """None where answers are measured."""
    metrics: Mapping[str, float] = {}


class Measured(Event, kind="measured"):
    """What an evaluation found, of one model on one data set."""

    name: str
    """What was measured on what."""
    values: Mapping[str, float | int]


class AmendmentApplied(Event, kind="amendment_applied"):
    """A recorded change to the running stage took effect."""

    step: int
    """The first step with it."""
    assignment: str
    """``KEY=VALUE``."""


class GroupFormed(Event, kind="group_formed"):
    """The workers of a stage are there, for the first time or again."""

    workers: int
    hosts: Sequence[str]


class GroupGrows(Event, kind="group_grows"):
    """An elastic group left at a checkpoint, to be formed again with more workers."""

    workers: int
    """How many it had."""


class WorkerFailure(Event, kind="worker_failure"):
    """A group of workers came to an early end, from which the stage recovers if it may."""

    what: str
    """One of the kinds of :mod:`postlude.cluster.failure`."""
    reason: str
    rank: int | None = None
    host: str | None = None
    trace: str | None = None


class StoodStill(Event, kind="stood_still"):
    """The process that controls the workers was stopped, or its machine slept. What came of it costs no budget."""

    seconds: float
    reason: str


class Recovery(Event, kind="recovery"):
    """The workers are started again, and go on from the last committed checkpoint."""

    attempt: int
    """Since the last checkpoint."""
    pause_seconds: float


class EngineDied(Event, kind="engine_died"):
    """An engine that answers prompts died or hung; another takes its place, and is asked again what it was asked."""

    engine: str
    reason: str


class RewardsWork(Event, kind="rewards_work"):
    """How rewards are computed on this machine: what parts programs of models from it, for one."""

    remarks: Sequence[str]


class Alarm(Event, kind="alarm"):
    """Something a person should look at, though the run goes on."""

    what: str
    """Within a stage it tells which alarm this is."""
    reason: str
    step: int | None = None
    rule: str | None = None
    """The rule whose alarm it is: it lasts until it is said to be over. None for what only happened."""
    timed: bool | None = None
    """Whether it follows from times, rates or memory: then a replay need not come to it."""


class AlarmOver(Event, kind="alarm_over"):
    """An alarm of a rule has ended; the rule is armed again."""

    what: str
    reason: str
    rule: str
    step: int | None = None
    timed: bool | None = None


class AlarmAcknowledged(Event, kind="alarm_acknowledged"):
    """A person knows of an alarm."""

    what: str


class NotificationsDropped(Event, kind="notifications_dropped"):
    """A receiver was not told of alarms."""

    receiver: str
    count: int
    """Since this was said of it before."""
    reason: str
    """Of the last."""


class StepsDropped(Event, kind="steps_dropped"):
    """A sink was not told of steps before its time was over; it is when the run is run again."""

    sink: str
    count: int
    reason: str


class Failure(Event, kind="failure"):
    """What stopped the stage or the run."""

    error: str
    step: int | None = None


def record(journal: Journal, kind: str, stage: str | None = None, **fields: Any) -> Event:
    """Make an event of this moment, without secrets, and add it to a run's journal; it is durable on return.

    KeyError if there is no such kind, ValidationError if ``fields`` are not those of it.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    event = _KINDS[kind](time=now, kind=kind, stage=stage, **told(fields))
    journal.append(event.model_dump(exclude_none=True), sync=True)
    return event


def read(journal: Journal) -> list[Event]:
    """All events of a run, in order. CorruptError if one is damaged."""
    return typed(journal, journal.read())


def typed(journal: Journal, entries: Sequence[Mapping[str, Any]], first: int = 1) -> list[Event]:
    """Entries of a run's journal as events; ``first`` is the number of the first. CorruptError if one is damaged."""
    return [_event(journal, number, entry) for number, entry in enumerate(entries, first)]


def drop_damaged(journal: Journal) -> str | None:
    """Drop the lines that are no events; what stood there is kept beside. What was wrong, or None."""
    return journal.drop_damaged(_is_event)


def _is_event(line: Mapping[str, Any]) -> bool:
    try:
        return bool(_KINDS[line["kind"]].model_validate(line))
    except (KeyError, ValidationError):
        return False


def _event(journal: Journal, number: int, line: Mapping[str, Any]) -> Event:
    try:
        return _KINDS[line["kind"]].model_validate(line)
    except (KeyError, ValidationError) as error:
        why = f"entry {number} is no event of this version ({str(error).splitlines()[0]})"
        raise damaged(journal.uri, why) from error
