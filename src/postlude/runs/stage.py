"""The directory of one stage: where its state, metrics, losses, checkpoints and artifact stand.

- What a stage says of itself is in ``state.json``, replaced as a whole; a stage that says it is running in a run
  that no process holds was interrupted.
- Writers are the process that holds the run and its ranks; readers may come at any moment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, get_args

from postlude import storage
from postlude.manifest.lock import ANEW
from postlude.runs import examples
from postlude.runs.identity import Identity
from postlude.runs.requests import Requests, read_requests
from postlude.runs.schemas import AmendmentLine, MetricsLine, ReadingLine, RolloutLine
from postlude.secrecy import told

if TYPE_CHECKING:
    import pyarrow

State = Literal["pending", "running", "interrupted", "failed", "done"]


@dataclass(frozen=True)
class Status:
    """What is known of a stage at a glance."""

    state: State = "pending"
    begun_at: str | None = None
    """When it first ran, ISO 8601, UTC."""
    changed_at: str | None = None
    """When it entered this state."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What was written together with the state: why it failed, its fingerprint, ..."""
    damage: str | None = field(default=None, compare=False)
    """What is wrong with the file that says this: then the state is what the stage's other files show."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    step: int
    uri: str


_STEP = re.compile(r"step-(\d+)")


class Stage:
    """The stage behind a URI, whether it has begun or not: making this object writes nothing."""

    def __init__(self, uri: str, name: str, is_held: Callable[[], bool] = lambda: False) -> None:
        self.uri, self.name = uri, name
        self._is_held = is_held
        self.metrics = storage.Journal(storage.join(uri, "metrics.jsonl"), MetricsLine)
        """One entry for each optimiser step."""
        self.rollouts = storage.Journal(storage.join(uri, "rollouts", "part-00000000.jsonl"), RolloutLine)
        """What a policy answered, and what became of it, by the optimiser step that it was trained in."""
        self.readings = storage.Journal(storage.join(uri, "readings.jsonl"), ReadingLine, sealed=True)
        """What was read of each rank, at intervals."""
        self.amendments = storage.Journal(
            storage.join(uri, "amendments.jsonl"),
            AmendmentLine,
            remedy=f"It says what was changed while the stage ran: put it back, or run with --from {name}.",
            sealed=True,
        )
        """What is asked of the running stage, and from which steps it holds: read by :meth:`requests`."""
        self.journals = (self.metrics, self.rollouts, self.readings, self.amendments)
        self.identity_uri = storage.join(uri, "identity.json")
        """Where it stands what the stage was begun with."""
        self.annotations = storage.join(uri, "annotations")
        """Where the streams stand that frozen models computed before the first step."""
        self.artifact = storage.join(uri, "model")
        """Where the stage's artifact stands or will stand: a Hugging Face directory with its lineage."""
        self.tokenizer = storage.join(uri, "tokenizer")
        """Where a tokenizer that was trained for the stage stands."""
        self.examples = storage.join(uri, "examples")
        """Where the losses by example stand."""
        self._state = storage.join(uri, "state.json")
        self._checkpoints = storage.join(uri, "checkpoints")

    @property
    def run_name(self) -> str:
        """The name of the run that it stands in."""
        return storage.name(storage.parent(storage.parent(self.uri)))

    # --- state ----------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """The stage's state, with what was written beside it. Of a file that is damaged, what the others show."""
        try:
            body = storage.read_document(self._state, ANEW)
            if body["state"] not in get_args(State):
                raise storage.damaged(self._state, f"'{body['state']}' is no state", ANEW)
            if body["state"] == "running" and not self._is_held():
                body["state"] = "interrupted"
            return Status(**body)
        except storage.NotFound:
            return Status()
        except (KeyError, TypeError) as error:
            damage = str(storage.damaged(self._state, f"it is not what was written ({error})", ANEW))
        except storage.CorruptError as error:
            damage = str(error)
        return Status("done" if self.has_artifact() else "interrupted", damage=damage)

    def enter(self, state: State, **details: Any) -> None:
        """Note that the stage is in this state from now on. ``details`` replace those of the state before."""
        if state not in get_args(State):
            raise ValueError(f"'{state}' is no state of a stage: {', '.join(get_args(State))}.")
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        begun_at = self.status().begun_at or now
        body = {"state": state, "begun_at": begun_at, "changed_at": now, "details": told(details)}
        storage.write_document(self._state, body)

    def committed(self) -> tuple[int, int]:
        """How far the stage is for good: the step of its newest checkpoint, and how many portions of other work or
        parts of stored streams are there. Only good for telling whether something was added."""
        newest = next((checkpoint.step for checkpoint in self.checkpoints()), 0)
        folders = [storage.join(self.uri, "portions"), self.annotations]
        folders += [storage.join(self.annotations, name) for name in storage.list_directory(self.annotations)]
        return newest, sum(len(storage.list_directory(folder)) for folder in folders)

    def has_begun(self) -> bool:
        """Whether it has made a step: before that there is nothing to lose.

        What lies in a stage that is pending is on its way out or in: a kill has left it behind.
        """
        if self.status().state == "pending":
            return False
        return bool(self.metrics.size_bytes() or self._all_checkpoints() or self.has_artifact())

    def is_done(self) -> bool:
        """Whether it is finished, with its artifact."""
        return self.status().state == "done" and self.has_artifact()

    def clear(self) -> None:
        """Remove all that the stage wrote, so that a new revision begins from nothing.

        It is pending from the first moment, and its state goes last: killed on the way, it is still known to need this.
        """
        if storage.exists(self._state) and self.status().state != "pending":
            self.enter("pending")
        storage.discard(self.artifact)
        self.drop_checkpoints()
        for name in storage.list_directory(self.uri):
            if name != storage.name(self._state):
                storage.remove(storage.join(self.uri, name))
        storage.remove(self.uri)

    # --- what it was begun with -----------------------------------------------------------------------------

    def identity(self) -> Identity | None:
        """What the stage was begun with; None if that is not known."""
        return Identity.read(self.identity_uri)

    def applied_amendments(self) -> list[list[Any]]:
        """The changes made to the running stage, each with the step from which it holds."""
        requests = self.requests().amendments.values()
        return [[request.from_step, request.assignment] for request in requests if request.from_step is not None]

    def requests(self) -> Requests:
        """What was asked of the running stage. CorruptError if something of it is lost."""
        try:
            return read_requests(self.amendments.read())
        except ValueError as error:
            raise storage.damaged(self.amendments.uri, str(error), self.amendments.remedy) from error

    def result_fingerprint(self) -> str | None:
        """What the result of the stage follows from; None if that is not known."""
        identity = self.identity()
        return identity.result_fingerprint(self.applied_amendments()) if identity else None

    # --- losses by example ----------------------------------------------------------------------------------

    def examples_writer(self, rank: int = 0) -> examples.ExamplesWriter:
        """A writer of the losses that one rank measures."""
        return examples.ExamplesWriter(self.examples, rank)

    def read_examples(self) -> pyarrow.Table:
        """The losses by example, in the order of steps: step, epoch, example_id, source, loss, tokens."""
        return examples.read_examples(self.examples)

    # --- checkpoints ----------------------------------------------------------------------------------------

    def checkpoint_uri(self, step: int) -> str:
        """Where the checkpoint after ``step`` steps stands or will stand."""
        return storage.join(self._checkpoints, f"step-{step:08d}")

    def checkpoints(self) -> list[Checkpoint]:
        """The committed checkpoints, newest first."""
        return [checkpoint for checkpoint in self._all_checkpoints() if storage.is_committed(checkpoint.uri)]

    def drop_checkpoints(self) -> None:
        """Remove every checkpoint."""
        for checkpoint in self._all_checkpoints():
            storage.discard(checkpoint.uri)

    def set_state_aside(self) -> str | None:
        """Keep a damaged state beside, and write what the stage's other files show. What was wrong, or None."""
        status = self.status()
        if status.damage is not None:
            storage.set_aside(self._state)
            details: dict[str, Any] = {}
            with suppress(storage.CorruptError):
                if identity := self.identity():
                    details = {"fingerprint": identity.fingerprint, "revision": identity.revision}
            self.enter(status.state, **details)
        return status.damage

    def prune(self, keep: int) -> None:
        """Remove all committed checkpoints but the ``keep`` newest, and what never was committed before those.

        What is not committed yet and newer than all of them may be in the making, and stays.
        """
        if keep < 1:
            raise ValueError("At least the newest checkpoint must be kept.")
        committed = self.checkpoints()
        kept = {checkpoint.step for checkpoint in committed[:keep]}
        for checkpoint in self._all_checkpoints():
            if committed and checkpoint.step < committed[0].step and checkpoint.step not in kept:
                storage.discard(checkpoint.uri)

    def _all_checkpoints(self) -> list[Checkpoint]:
        checkpoints = [
            Checkpoint(int(match[1]), storage.join(self._checkpoints, match[0]))
            for match in map(_STEP.fullmatch, storage.list_directory(self._checkpoints))
            if match
        ]
        return sorted(checkpoints, key=lambda checkpoint: checkpoint.step, reverse=True)

    def cut_back(self, step: int) -> tuple[int, list[str]]:
        """Remove what was written after ``step`` steps, so that a resume from there writes every step once. How many
        losses by example are left, and what was damaged, which is kept beside."""
        for checkpoint in self._all_checkpoints():
            if checkpoint.step > step:
                storage.discard(checkpoint.uri)
        told = []
        for journal in (self.metrics, self.rollouts):
            try:
                journal.cut(lambda line: line["step"] <= step)
            except storage.CorruptError:
                told += [damage] if (damage := journal.drop_damaged()) else []
                journal.cut(lambda line: line["step"] <= step)
        left, damages = examples.cut_back(self.examples, step)
        return left, told + damages

    # --- what frozen models said of the data ----------------------------------------------------------------

    def drop_annotations(self) -> None:
        """Remove these streams: they can be computed again."""
        for name in storage.list_directory(self.annotations):
            storage.discard(storage.join(self.annotations, name))
        storage.remove(self.annotations)

    # --- what it makes --------------------------------------------------------------------------------------

    def has_artifact(self) -> bool:
        """Whether the artifact is there, whole."""
        return storage.is_committed(self.artifact)

    def write_artifact(self) -> AbstractContextManager[str]:
        """A local folder to write the artifact into; it becomes the artifact when the block ends without an error."""
        return storage.new_folder(self.artifact)
